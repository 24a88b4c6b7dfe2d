"""A label map to a DICOM SEG on the source frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ctflow.dicom.attributes import text
from ctflow.dicom.derived import (
    ALGORITHM_SOURCE,
    Provenance,
    algorithm_parameters,
    concept,
    fitted,
    give_moment,
    give_text_encoding,
    moment_of,
    series_description,
    series_number,
    tracking_id,
)
from ctflow.dicom.identity import digest_of_mask, instance_uid, series_uid, uid_from_parts
from ctflow.dicom.source import clean_sources
from ctflow.model import RESEARCH_ONLY, ModelSpec, Segment

_NOTHING_MARKED = "Algorithm marked nothing; this does not exclude disease"


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
            series_number=series_number(header, 1),
            sop_instance_uid=uid,
            instance_number=1,
            manufacturer="ctflow",
            manufacturer_model_name=fitted(spec.name),
            software_versions=provenance.ctflow_version,
            device_serial_number=provenance.weights_digest[:12],
            content_description=_content_description(spec, marked=bool(labels.any())),
            content_label="SEGMENTATION",
            series_description=series_description(spec, "Segmentation by"),
            specific_character_set="ISO_IR 192",  # for highdicom, which refuses valid ones; the source's follows below
        )
    give_text_encoding(segmentation, cleaned[0])
    _make_reproducible(segmentation, header, uid)
    return segmentation


def _check(labels: npt.NDArray[np.uint8], sources: Sequence[Dataset], spec: ModelSpec) -> None:
    if labels.ndim != 3 or labels.dtype != np.uint8 or len(labels) != len(sources):
        raise ValueError(f"labels {labels.shape} {labels.dtype} do not lie on {len(sources)} source images")
    numbers = [segment.number for segment in spec.segments]
    if not numbers or numbers != list(range(1, len(numbers) + 1)) or int(labels.max(initial=0)) > len(numbers):
        raise ValueError(f"labels up to {labels.max(initial=0)} do not suit segments {numbers}")


def _describe(segment: Segment, header: Dataset, spec: ModelSpec, provenance: Provenance) -> hd.seg.SegmentDescription:
    name = tracking_id(segment, spec)
    tracking = uid_from_parts("segment", text(header, "SeriesInstanceUID"), spec.name, spec.version, name)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=fitted(spec.name),
        family=codes.DCM.ArtificialIntelligence,
        version=fitted(spec.version),
        source=ALGORITHM_SOURCE,
        parameters=algorithm_parameters(provenance),
    )
    return hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=fitted(segment.label),
        segmented_property_category=concept(segment.category),
        segmented_property_type=concept(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking,
        tracking_id=fitted(name),
        anatomic_regions=[concept(region) for region in segment.anatomy] or None,
    )


def _content_description(spec: ModelSpec, *, marked: bool) -> str:
    """One line of at most 64 characters; research-only always shows, and that nothing was marked."""
    if not marked and spec.demonstration:
        return f"{RESEARCH_ONLY}. None marked, not excluded"
    if not marked:
        return _NOTHING_MARKED
    return series_description(spec, "Segmentation by")


def _make_reproducible(segmentation: Dataset, header: Dataset, uid: str) -> None:
    """Replace what highdicom takes from the clock and from chance."""
    give_moment(segmentation, *moment_of(header))
    organization = uid_from_parts("dimensions", uid)
    for item in segmentation.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = organization
    for item in segmentation.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
