"""Measurements to a DICOM SR: one measurement group per tumour, on the segments of the SEG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import highdicom as hd
import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as DicomCode
from pydicom.valuerep import DS, VR

from ctflow.compat.pydicom import lenient
from ctflow.core.errors import counted
from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY, ModelSpec, Segment
from ctflow.dicom.attributes import text
from ctflow.dicom.write import derived
from ctflow.dicom.write.encode import json_from_dataset
from ctflow.dicom.write.identity import series_uid, uid_from_parts
from ctflow.dicom.write.source import Sources, sources_from_headers
from ctflow.measurements.measure import Finding, SegmentMeasurements
from ctflow.measurements.plausibility import text_of_reasons

# TID 1500 row 12. pydicom's dictionary has no UMLS codes.
_QUALITATIVE_EVALUATIONS = DicomCode("C0034375", "UMLS", "Qualitative Evaluations")
_ALGORITHM_MANUFACTURER = DicomCode("122405", "DCM", "Algorithm Manufacturer")
_ENGLISH = DicomCode("en-US", "RFC5646", "English (United States)")
_HOW_MEASURED = (
    "Lengths are between voxel centres. Long and short axis lie in one slice of the series; the short axis is the "
    "extent at right angles to the long axis."
)
_CONTAINS = hd.sr.RelationshipTypeValues.CONTAINS
_INFERRED_FROM = hd.sr.RelationshipTypeValues.INFERRED_FROM
_MODIFIES = hd.sr.RelationshipTypeValues.HAS_CONCEPT_MOD
_CONTENT_SEQUENCE = 0x0040A730
_OWN = {  # attributes that differ between findings, by the concept of their content item
    codes.DCM.TrackingIdentifier.value: "TextValue",
    codes.DCM.TrackingUniqueIdentifier.value: "UID",
    codes.DCM.ReferencedSegment.value: "ReferencedSOPSequence",
    codes.DCM.ImageRegion.value: "GraphicData",
}
_DECIMALS = 4  # of mm, mm3 and HU: far finer than a voxel resolves, far coarser than rounding on another machine


@dataclass(frozen=True, eq=False)
class _Basis:
    """Input that all groups of a report share; `header` is the first source image's.

    `parts` has the segments of the SEG that mark one finding: (number of its class, rank) -> segment number.
    `tracking_ids` has their names in the SEG.
    """

    segmentation: Dataset
    header: Dataset
    spec: ModelSpec
    provenance: derived.Provenance
    parts: Mapping[tuple[int, int], int]
    tracking_ids: Mapping[int, str]


@lenient()
def report_from_measurements(
    measured: Sequence[SegmentMeasurements],
    segmentation: Dataset,
    sources: Sequence[Dataset] | Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
    *,
    marked_as: Sequence[Segment] = (),
    remarks: Sequence[str] = (),
    previous: Sequence[Dataset] = (),
) -> Dataset:
    """Make a measurement report.

    Args:
        measured: One entry per segment of `spec`, in its order.
        segmentation: The SEG of the same mask (`segmentation_from_labels`); only its UIDs and series are read.
        sources: Headers of the source images, in array order, or `Sources` made from them; they are not changed.
        spec: The model's name, version and segments.
        provenance: The mask's origin.
        marked_as: The SEG's segments, where they are findings (`ctflow.measurements.measure.split_findings`) and not
            classes.
        remarks: Further statements to read before the numbers.
        previous: Reports that this one replaces; it refers to them (PS3.3 C.17.2, Predecessor Documents Sequence).

    Returns:
        A Comprehensive 3D SR, unverified and preliminary. COMPLETE, or PARTIAL if more was found than is listed.
        Its UIDs follow from content, its dates from the source; the same measurements give the same bytes.

    Raises:
        ValueError: The measurements are not those of the model's segments.

    Source: DICOM PS3.16 TID 1500, 1411, 4019; PS3.3 A.35.13 (Comprehensive 3D SR IOD); highdicom.
    """
    if [entry.number for entry in measured] != [segment.number for segment in spec.segments]:
        raise ValueError("measurements and the model's segments differ in number")
    parts = {(part.part_of, part.rank): part.number for part in marked_as if part.part_of and part.rank}
    sources = sources if isinstance(sources, Sources) else sources_from_headers(sources)
    header = sources.header
    named = [item for item in segmentation.SegmentSequence if "TrackingID" in item]  # a label map's background has none
    tracking_ids = {item.SegmentNumber: item.TrackingID for item in named}
    basis = _Basis(segmentation, header, spec, provenance, parts, tracking_ids)
    left_out = sum(entry.findings_left_out for entry in measured)
    content = _content(measured, basis, remarks)
    # The SEG's UID identifies sources, weights, version, settings and mask; the content, the measurements.
    earlier = sorted(str(report.SOPInstanceUID) for report in previous)
    uid = uid_from_parts("measurement report", segmentation.SOPInstanceUID, json_from_dataset(content), *earlier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values were checked in clean_sources
        report: Dataset = hd.sr.Comprehensive3DSR(
            evidence=[sources.cleaned[0], segmentation],  # patient and study come from the first
            content=_root(
                [], measured=any(entry.findings for entry in measured)
            ),  # highdicom copies and searches it, which takes seconds for a hundred groups
            series_instance_uid=series_uid(text(header, "SeriesInstanceUID"), spec.name, spec.version, "SR", uid),
            series_number=derived.series_number(header, 2),
            sop_instance_uid=uid,
            instance_number=1,
            is_complete=left_out == 0,
            is_final=False,
            is_verified=False,
            **derived.equipment(spec, provenance),
            series_description=derived.series_description(spec, "Measurements by", sources.part),
            previous_versions=list(previous) or None,
        )
    report.ContentSequence = content.ContentSequence
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    evidence[0].ReferencedSOPSequence = sources.instances  # highdicom takes long for each one passed
    if left_out:
        kind = "smaller or implausible" if any(entry.implausible.findings for entry in measured) else "smaller"
        report.CompletionFlagDescription = (
            f"{counted(left_out, f'{kind} finding is', f'{kind} findings are')} not listed"
        )
    derived.give_text_encoding(report, sources.cleaned[0])
    derived.give_moment(report, *derived.moment_of(header))
    return report


def _content(measured: Sequence[SegmentMeasurements], basis: _Basis, remarks: Sequence[str]) -> Dataset:
    """TID 1500. highdicom's `MeasurementReport` needs a group, and there may be no finding."""
    algorithm = _algorithm(basis)
    groups = [
        group
        for segment, entry in zip(basis.spec.segments, measured, strict=True)
        for group in _groups(entry.findings, segment, basis, algorithm)
    ]
    lines = (*_statements(measured, basis.spec), *remarks)
    said = [hd.sr.TextContentItem(codes.DCM.Comment, line, _CONTAINS) for line in lines]
    return _root(
        [
            *hd.sr.LanguageOfContentItemAndDescendants(_ENGLISH),
            *hd.sr.ObservationContext(observer_device_context=_observer(basis)),
            hd.sr.CodeContentItem(codes.DCM.ProcedureReported, codes.LN.CTUnspecifiedBodyRegion, _MODIFIES),
            *([_container(codes.DCM.ImagingMeasurements, groups)] if groups else []),
            _container(_QUALITATIVE_EVALUATIONS, said),
        ],
        measured=bool(groups),
    )


def _root(items: Sequence[Dataset], *, measured: bool = True) -> Dataset:
    """OHIF fails to show an "Imaging Measurement Report" without measurements, and shows the text of any other."""
    title = codes.DCM.ImagingMeasurementReport if measured else _QUALITATIVE_EVALUATIONS
    root: Dataset = hd.sr.ContainerContentItem(title, is_content_continuous=False, template_id="1500")
    root.ContentSequence = hd.sr.ContentSequence(items)
    return root


def _container(name: DicomCode, items: Sequence[Dataset]) -> Dataset:
    container: Dataset = hd.sr.ContainerContentItem(name, is_content_continuous=False, relationship_type=_CONTAINS)
    # Not highdicom's sequence, which would look up the name of each of a hundred groups.
    container.add(DataElement(_CONTENT_SEQUENCE, VR.SQ, list(items)))
    return container


def _observer(basis: _Basis) -> hd.sr.ObserverContext:
    digest = basis.provenance.weights_digest
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=uid_from_parts("device", basis.provenance.ctflow_version, digest),
        name="ctflow",
        manufacturer_name="ctflow",
        model_name=derived.fitted(basis.spec.name),
        serial_number=digest[:12],
    )
    return hd.sr.ObserverContext(codes.DCM.Device, device)


def _statements(measured: Sequence[SegmentMeasurements], spec: ModelSpec) -> Iterator[str]:
    """Statements to read before the numbers."""
    if spec.demonstration:
        yield RESEARCH_ONLY
    if not any(entry.components for entry in measured):
        yield NOTHING_MARKED
        return
    for entry in measured:
        name = f"Segment {entry.number}, {derived.fitted(entry.label)}"
        if not entry.components:
            yield f"{name}: {NOTHING_MARKED}"
        if entry.findings_left_out:
            listed, left_out = len(entry.findings), entry.findings_left_out
            rest = f"{left_out} are left out{', implausible ones first' if entry.implausible.findings else ''}"
            yield f"{name}: the {listed} largest of {entry.components} findings are listed, {rest}."
    yield _HOW_MEASURED


def _groups(
    findings: Sequence[Finding], segment: Segment, basis: _Basis, algorithm: hd.sr.AlgorithmIdentification
) -> list[Dataset]:
    """TID 1411 for each finding: highdicom makes the largest's, which takes 5 ms; the others copy it.

    Gain: a report of 100 findings is made in 0.086 s; with highdicom for each finding, in 0.450 s (5.1 times;
    benchmarks/own_code.py sr, 2026-11-29: AMD EPYC, 2 cores at a load of 2.9, Python 3.11.7, highdicom 0.28.2).
    """
    if not findings:
        return []
    first = _group(findings[0], _named(1, segment, basis), segment, basis, algorithm)
    items = [(item, _own_keyword(item)) for item in first.ContentSequence]
    others = enumerate(findings[1:], start=2)
    groups = [first, *(_group_like(first, items, finding, _named(rank, segment, basis)) for rank, finding in others)]
    for rank, (group, finding) in enumerate(zip(groups, findings, strict=True), start=1):
        group.ContentSequence.append(_comment(rank, finding, segment))
    return groups


def _comment(rank: int, finding: Finding, segment: Segment) -> hd.sr.TextContentItem:
    """A finding's name in OHIF's list, and why it is implausible: TID 1411 has no row for it and may be extended."""
    name = f"{derived.fitted(segment.label)}, finding {rank}: {finding.volume_ml:.2g} ml"
    if finding.implausible:
        why = text_of_reasons(finding.implausible, finding.outside_body, finding.mean_hu, segment.hu_range)
        name += f". Implausible: {why}."
    return hd.sr.TextContentItem(codes.DCM.Comment, name, _CONTAINS)


@dataclass(frozen=True)
class _Named:
    """A finding's identity in a report: tracking UID, name, and number of the segment that marks it."""

    tracking_uid: str
    name: str
    number: int


def _named(rank: int, segment: Segment, basis: _Basis) -> _Named:
    # Also identifies its own segment, if it has one.
    tracking = derived.finding_uid(basis.segmentation.SOPInstanceUID, segment.number, rank)
    number = basis.parts.get((segment.number, rank))
    if number is None:
        return _Named(
            tracking, f"{derived.fitted(derived.tracking_id(segment, basis.spec))}, finding {rank}", segment.number
        )
    return _Named(tracking, basis.tracking_ids[number], number)


def _group(
    finding: Finding, named: _Named, segment: Segment, basis: _Basis, algorithm: hd.sr.AlgorithmIdentification
) -> Dataset:
    """TID 1411. Findings that share a segment all refer to it; tracking, volume and centre tell them apart."""
    seg, header = basis.segmentation, basis.header
    frame_of_reference = text(header, "FrameOfReferenceUID")
    series = hd.sr.SourceSeriesForSegmentation(text(header, "SeriesInstanceUID"))
    (group,) = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(named.tracking_uid, named.name),
        referenced_segment=hd.sr.ReferencedSegment(
            seg.SOPClassUID, seg.SOPInstanceUID, named.number, source_series=series
        ),
        finding_category=hd.sr.CodedConcept.from_code(derived.concept(segment.category)),
        finding_type=hd.sr.CodedConcept.from_code(derived.concept(segment.type)),
        finding_sites=[hd.sr.FindingSite(derived.concept(region)) for region in segment.anatomy] or None,
        algorithm_id=algorithm,
        measurements=list(_measurements(finding)),
    )
    # OHIF takes a group over into its list of measurements if its first number has coordinates, too.
    first_number = next(item for item in group.ContentSequence if item.ValueType == "NUM")
    place = _centre(finding, frame_of_reference, _INFERRED_FROM)
    first_number.ContentSequence = [*first_number.get("ContentSequence", ()), place]
    group.ContentSequence.append(_centre(finding, frame_of_reference, _CONTAINS))
    made: Dataset = group
    return made


def _own_keyword(item: Dataset) -> str | None:
    """The attribute of a content item whose value is specific to its finding; None if there is none."""
    return "MeasuredValueSequence" if item.ValueType == "NUM" else _OWN.get(item.ConceptNameCodeSequence[0].CodeValue)


def _group_like(
    first: Dataset, items: Sequence[tuple[Dataset, str | None]], finding: Finding, named: _Named
) -> Dataset:
    """A group that shares with the first all that is not specific to a finding.

    Args:
        first: The group of another finding of the same segment.
        items: Its content, each item with its `_own_keyword`.
        finding: The measured finding.
        named: Its identity.
    """
    values = iter(_values(finding))
    own = {"TextValue": named.name, "UID": named.tracking_uid, "GraphicData": list(finding.centroid_mm)}
    content = []
    for item, keyword in items:
        if keyword is None:
            content.append(item)
        elif keyword == "MeasuredValueSequence":
            content.append(_number_like(item, next(values), own["GraphicData"]))
        elif keyword == "ReferencedSOPSequence":
            reference = _changed(item.ReferencedSOPSequence[0], ReferencedSegmentNumber=named.number)
            content.append(_changed(item, **{keyword: [reference]}))
        else:
            content.append(_changed(item, **{keyword: own[keyword]}))
    return _changed(first, ContentSequence=content)


def _number_like(item: Dataset, value: float, place: Any) -> Dataset:
    """A measurement of another finding; its place is another, too, if it has one."""
    changes: dict[str, Any] = {"MeasuredValueSequence": [_measured(item.MeasuredValueSequence[0], value)]}
    children = item.get("ContentSequence", ())
    if any("GraphicData" in child for child in children):
        changes["ContentSequence"] = [
            _changed(child, GraphicData=place) if "GraphicData" in child else child for child in children
        ]
    return _changed(item, **changes)


def _measured(like: Dataset, value: float) -> Dataset:
    return _changed(like, NumericValue=DS(value, auto_format=True), FloatingPointValue=value)


def _changed(dataset: Dataset, **values: Any) -> Dataset:
    """A data set with some values replaced; it shares all other elements."""
    elements = dict(dataset.items())
    for keyword, value in values.items():
        known = dataset[keyword]  # must not change: the original data set shares it
        # Already of the type that pydicom would convert to, so not converted again.
        alike = type(value) is type(known.value)
        elements[known.tag] = DataElement(known.tag, known.VR, value, already_converted=alike)
    return Dataset(elements)


def _values(finding: Finding) -> tuple[float, ...]:
    """A finding's measurements, in the order of `_measured_concepts`: mm3, mm and HU."""
    values = (
        finding.volume_ml * 1000,
        finding.long_axis_mm,
        finding.short_axis_mm,
        finding.longest_diameter_mm,
        finding.mean_hu,
        finding.sd_hu,
    )
    # Adding 0 turns minus zero, which rounding may give, into zero.
    return tuple(round(value, _DECIMALS) + 0.0 for value in values)


def _measurements(finding: Finding) -> Iterator[hd.sr.Measurement]:
    for (name, unit, derivation), value in zip(_measured_concepts(), _values(finding), strict=True):
        yield hd.sr.Measurement(name, value, unit, derivation=derivation)


@cache
def _measured_concepts() -> tuple[tuple[hd.sr.CodedConcept | None, ...], ...]:
    """Name, unit and derivation of each measurement, in the order of `_values`."""
    mm, hu = codes.UCUM.Millimeter, codes.UCUM.HounsfieldUnit
    attenuation = codes.DCM.AttenuationCoefficient
    mean, deviation = (attenuation._replace(meaning=f"{attenuation.meaning}, {word}") for word in ("mean", "SD"))
    rows = (
        (codes.SCT.Volume, codes.UCUM.CubicMillimeter, None),
        (codes.SCT.LongAxis, mm, None),
        (codes.SCT.ShortAxis, mm, None),
        (codes.SCT.Diameter, mm, codes.SCT.Maximum),
        (mean, hu, codes.SCT.Mean),  # the words tell them apart where a viewer shows no derivation
        (deviation, hu, codes.SCT.StandardDeviation),
    )
    return tuple(tuple(None if code is None else hd.sr.CodedConcept.from_code(code) for code in row) for row in rows)


def _algorithm(basis: _Basis) -> hd.sr.AlgorithmIdentification:
    """TID 4019 with the content of the SEG's macro; highdicom 0.25 has no argument for manufacturer and family."""
    parameters = derived.algorithm_parameters(basis.provenance)
    identification = hd.sr.AlgorithmIdentification(
        derived.fitted(basis.spec.name),
        derived.fitted(basis.spec.version),
        # One text, as highdicom writes it into the SEG: dcmqi reads only the first of several.
        [",".join(f"{key}={value}" for key, value in parameters.items())],
    )
    identification.append(hd.sr.TextContentItem(_ALGORITHM_MANUFACTURER, derived.ALGORITHM_SOURCE, _MODIFIES))
    identification.append(hd.sr.CodeContentItem(codes.DCM.AlgorithmFamily, codes.DCM.ArtificialIntelligence, _MODIFIES))
    return identification


def _centre(
    finding: Finding, frame_of_reference: str, relationship: hd.sr.RelationshipTypeValues
) -> hd.sr.Scoord3DContentItem:
    """The centroid, by the name under which OHIF takes a point over into its list of measurements.

    TID 1411 has no row for a point beside a segment and may be extended.
    """
    return hd.sr.Scoord3DContentItem(
        codes.DCM.ImageRegion,
        hd.sr.GraphicTypeValues3D.POINT,
        np.array([finding.centroid_mm]),
        frame_of_reference,
        relationship_type=relationship,
    )
