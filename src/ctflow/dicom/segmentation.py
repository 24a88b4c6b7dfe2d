"""A label map to a DICOM SEG on the source frames."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as DicomCode

from ctflow.atomic import write_atomically
from ctflow.dicom.attributes import integer, text
from ctflow.dicom.identity import digest_of_mask, instance_uid, series_uid, uid_from_parts
from ctflow.dicom.source import clean_sources
from ctflow.model import RESEARCH_ONLY, Code, ModelSpec, Segment

# highdicom logs values of attributes, which may be patient data.
logging.getLogger("highdicom").setLevel(logging.CRITICAL)

_NOTHING_MARKED = "Algorithm marked nothing; this does not exclude disease"
_LONG_STRING = 64  # characters of VR LO


@dataclass(frozen=True)
class Provenance:
    """What made a mask.

    Attributes:
        ctflow_version: The version that writes.
        weights_digest: SHA-256 of the model's weights, as hexadecimal digits.
        settings: Every setting that changes the result.
    """

    ctflow_version: str
    weights_digest: str
    settings: Mapping[str, str | int | float | bool | None]


def segmentation_from_labels(
    labels: npt.NDArray[np.uint8], sources: Sequence[Dataset], spec: ModelSpec, provenance: Provenance
) -> Dataset:
    """Make a BINARY segmentation.

    Args:
        labels: (D, H, W); value k marks the segment with number k.
        sources: Headers of the D source images, in array order; they are not changed.
        spec: The model's name, version and segments.
        provenance: What made the mask.

    Returns:
        The SEG: frames without a marked pixel are left out, unless nothing at all is marked. Its UIDs follow from
        content, its dates from the source; the same mask gives the same bytes.

    Raises:
        ValueError: Labels and sources differ in number, or a label has no segment.

    Source: DICOM PS3.3 A.51 (Segmentation IOD), C.8.20; highdicom.
    """
    _check(labels, sources, spec)
    header = sources[0]
    uid = instance_uid(
        [text(source, "SOPInstanceUID") for source in sources],
        provenance.weights_digest,
        provenance.ctflow_version,
        {**provenance.settings, "model": spec.name, "model_version": spec.version},
        digest_of_mask(labels),
    )
    cleaned = clean_sources(sources)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty mask is meant; values were checked in clean_sources
        segmentation: Dataset = hd.seg.Segmentation(
            source_images=cleaned,
            pixel_array=labels,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_describe(segment, header, spec, provenance) for segment in spec.segments],
            series_instance_uid=series_uid(text(header, "SeriesInstanceUID"), spec.name, spec.version, "SEG"),
            series_number=_series_number(header),
            sop_instance_uid=uid,
            instance_number=1,
            manufacturer="ctflow",
            manufacturer_model_name=_fit(spec.name),
            software_versions=provenance.ctflow_version,
            device_serial_number=provenance.weights_digest[:12],
            content_description=_content_description(spec, marked=bool(labels.any())),
            content_label="SEGMENTATION",
            series_description=_series_description(spec),
            specific_character_set="ISO_IR 192",  # for highdicom, which refuses valid ones; the source's follows below
        )
    for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC"):  # highdicom leaves the second out
        if keyword in cleaned[0]:
            segmentation[keyword] = cleaned[0][keyword]
    _make_reproducible(segmentation, header, uid)
    return segmentation


def _check(labels: npt.NDArray[np.uint8], sources: Sequence[Dataset], spec: ModelSpec) -> None:
    if labels.ndim != 3 or labels.dtype != np.uint8 or len(labels) != len(sources):
        raise ValueError(f"labels {labels.shape} {labels.dtype} do not lie on {len(sources)} source images")
    numbers = [segment.number for segment in spec.segments]
    if not numbers or numbers != list(range(1, len(numbers) + 1)) or int(labels.max(initial=0)) > len(numbers):
        raise ValueError(f"labels up to {labels.max(initial=0)} do not suit segments {numbers}")


def _describe(segment: Segment, header: Dataset, spec: ModelSpec, provenance: Provenance) -> hd.seg.SegmentDescription:
    name = f"{spec.name} {segment.label} {segment.number}"
    tracking = uid_from_parts("segment", text(header, "SeriesInstanceUID"), spec.name, spec.version, name)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=_fit(spec.name),
        family=codes.DCM.ArtificialIntelligence,
        version=_fit(spec.version),
        source="ctflow",
        parameters={
            "weights_sha256": provenance.weights_digest,
            "ctflow_version": provenance.ctflow_version,
            **{key: str(value) for key, value in provenance.settings.items()},
        },
    )
    return hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=_fit(segment.label),
        segmented_property_category=_coded(segment.category),
        segmented_property_type=_coded(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking,
        tracking_id=_fit(name),
        anatomic_regions=[_coded(region) for region in segment.anatomy] or None,
    )


def _coded(code: Code) -> DicomCode:
    return DicomCode(code.value, code.scheme, code.meaning)


def _fit(value: str) -> str:
    """Text that fits a Long String: no backslash, no control characters, at most 64 characters."""
    return re.sub(r"[\\\x00-\x1f]+", " ", value).strip()[:_LONG_STRING].strip() or "unnamed"


def _series_number(header: Dataset) -> int:
    """100 times the source's and 1, so that results stand beside their source; 1 where that is no usable number."""
    source = integer(header, "SeriesNumber")
    return source * 100 + 1 if source is not None and 0 <= source < 2**31 // 100 - 1 else 1


def _series_description(spec: ModelSpec) -> str:
    return _fit(f"{RESEARCH_ONLY}: {spec.name}" if spec.demonstration else f"Segmentation by {spec.name}")


def _content_description(spec: ModelSpec, *, marked: bool) -> str:
    """One line of at most 64 characters; research-only always shows, and that nothing was marked."""
    if not marked and spec.demonstration:
        return f"{RESEARCH_ONLY}. None marked, not excluded"
    if not marked:
        return _NOTHING_MARKED
    return _series_description(spec)


def _make_reproducible(segmentation: Dataset, header: Dataset, uid: str) -> None:
    """Replace what highdicom takes from the clock and from chance."""
    date, time = _moment(header)
    segmentation.ContentDate = segmentation.SeriesDate = date
    segmentation.ContentTime = segmentation.SeriesTime = time
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in segmentation:
            del segmentation[keyword]
    for equipment in segmentation.get("ContributingEquipmentSequence", []):
        equipment.ContributionDateTime = date + time
    organization = uid_from_parts("dimensions", uid)
    for item in segmentation.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = organization
    for item in segmentation.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization


def _moment(header: Dataset) -> tuple[str, str]:
    """Date and time of the acquisition, or the nearest that the source has; its epoch where it has none."""
    for prefix in ("Acquisition", "Content", "Series", "Study"):
        date, time = text(header, f"{prefix}Date"), text(header, f"{prefix}Time")
        if re.fullmatch(r"[12]\d{3}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", date):
            usable = re.fullmatch(r"([01]\d|2[0-3])([0-5]\d){2}(\.\d{1,6})?", time)
            return date, time if usable else "000000"
    return "19000101", "000000"  # ContentDate may not be empty, and any true date would be an invention


def write_dataset(dataset: Dataset, path: Path) -> None:
    """Write a DICOM file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    write_atomically(path, lambda stream: dataset.save_as(stream, enforce_file_format=True))
