"""A label map to a DICOM SEG on the source frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import VR

from ctflow.compat.highdicom import frames_known_by_class
from ctflow.compat.pydicom import lenient
from ctflow.core.model import RESEARCH_ONLY, ModelSpec, Segment
from ctflow.core.volume import Geometry, LabelArray
from ctflow.dicom.attributes import text
from ctflow.dicom.write import derived
from ctflow.dicom.write.frames import give_frames, planes_of_images
from ctflow.dicom.write.identity import digest_of_mask, instance_uid, series_uid, uid_from_parts
from ctflow.dicom.write.source import Sources, sources_from_headers

_IN_PLACE_MM = 0.001
MOST_FRACTION = 255  # MaximumFractionalValue
_NOTHING_MARKED = "Algorithm marked nothing; this does not exclude disease"


@dataclass(frozen=True)
class SegForm:
    """How a SEG holds a mask.

    Attributes:
        kind: "binary": a bit per pixel and segment; "labelmap": a label per pixel (Supplement 243);
            "fractional": each segment's probability.
        omit_empty_frames: Leave out frames that mark nothing, unless nothing at all is marked.
    """

    kind: Literal["binary", "labelmap", "fractional"] = "binary"
    omit_empty_frames: bool = True


@lenient()
def segmentation_from_labels(
    labels: LabelArray,
    sources: Sequence[Dataset] | Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
    *,
    form: SegForm = SegForm(),
    fractions: npt.NDArray[np.uint8] | None = None,
    grid: Geometry | None = None,
) -> Dataset:
    """Make a segmentation.

    Args:
        labels: (D, H, W) uint8 or uint16; value k marks the segment with number k.
        sources: Headers of the source images, in array order, or `Sources` made from them; they are not changed. D of
            them unless there is a grid.
        spec: The model's name, version and segments.
        provenance: The mask's origin.
        form: How the SEG holds it.
        fractions: (S, D, H, W) uint8, each segment's probability in 255ths; required for a fractional SEG.
        grid: The labels' orthogonal grid, if not the source images'.

    Returns:
        The SEG. Its UIDs follow from content, its dates from the source; the same mask gives the same bytes.

    Raises:
        ValueError: Labels, fractions, sources and grid differ in size, a label has no segment, or sources are not in
            order.

    Source: DICOM PS3.3 A.51 (Segmentation IOD), A.51.3 (Label Map Segmentation IOD), C.8.20; highdicom.
    """
    sources = sources if isinstance(sources, Sources) else sources_from_headers(sources)
    _check(labels, fractions, len(sources), spec, form, grid)
    header = sources.header
    uid = instance_uid(
        sources.uids,
        provenance.weights_digest,
        provenance.ctflow_version,
        {**provenance.settings, "model": spec.name, "model_version": spec.version, **_choices(spec, form, grid)},
        digest_of_mask(labels if fractions is None else fractions),
    )
    by_planes = _is_made_of_planes(form)
    marks = labels if fractions is None else fractions
    shown = None if grid is not None else [0] if by_planes else _slices_with_frames(marks, form)
    images = sources.cleaned if shown is None else [sources.cleaned[index] for index in shown]
    planes = {} if grid is None else _planes(grid)
    descriptions = [_describe(segment, header, spec, provenance, uid) for segment in spec.segments]
    with frames_known_by_class(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty mask is intended; values were checked in clean_sources
        segmentation: Dataset = hd.seg.Segmentation(
            source_images=images,
            pixel_array=np.ones((1, *labels.shape[1:]), np.uint8) if by_planes else _pixels(labels, fractions, shown),
            segmentation_type=hd.seg.SegmentationTypeValues[form.kind.upper()],
            max_fractional_value=MOST_FRACTION,
            omit_empty_frames=form.omit_empty_frames,
            **(_first(planes) if by_planes else planes),
            segment_descriptions=descriptions[:2] if by_planes else descriptions,
            series_instance_uid=series_uid(text(header, "SeriesInstanceUID"), spec.name, spec.version, "SEG", uid),
            series_number=derived.series_number(header, 1),
            sop_instance_uid=uid,
            instance_number=1,
            **derived.equipment(spec, provenance),
            content_description=_content_description(spec, marked=bool(labels.any())),
            content_label="SEGMENTATION",
            series_description=derived.series_description(spec, "Segmentation by", sources.part),
        )
    if by_planes:
        places = sources.planes if grid is None else planes_of_images(sources.cleaned, **planes)
        omit = form.omit_empty_frames
        segmentation = give_frames(segmentation, labels, places, descriptions, omit_empty_frames=omit)
    _refer_to_sources(segmentation, sources, has_all=shown is None)
    _give_measures(segmentation.SharedFunctionalGroupsSequence[0], sources, grid)
    derived.give_text_encoding(segmentation, sources.cleaned[0])
    _make_reproducible(segmentation, header, uid)
    _refer_by_frames(segmentation, sources, grid)
    segmentation.ContentCreatorName = None  # required, empty: a program made it
    return segmentation


def _choices(spec: ModelSpec, form: SegForm, grid: Geometry | None) -> dict[str, str]:
    """Choices that make another object from the same mask; empty by default, so the usual UIDs do not change."""
    colours = {str(segment.number): segment.colour for segment in spec.segments if segment.colour is not None}
    choices = {
        "seg": form.kind if form.kind != "binary" else "",
        "frames": "" if form.omit_empty_frames else "all",
        "segments": "finding" if any(segment.part_of is not None for segment in spec.segments) else "",
        "colours": repr(colours) if colours else "",
        "grid": "" if grid is None else repr((grid.shape, np.round(grid.affine_mm, 6).tolist())),
    }
    return {name: choice for name, choice in choices.items() if choice}


def _slices_with_frames(marks: npt.NDArray[Any], form: SegForm) -> list[int] | None:
    """The slices that get frames; None if all do: highdicom takes long for each image passed.

    Gain: a labelmap of 25 frames on 300 images is made in 0.019 s, without this in 0.061 s (3.2 times;
    benchmarks/own_code.py seg, 2026-11-30: AMD EPYC, 2 cores at a load of 2.8, Python 3.11.7, highdicom 0.28.2).
    """
    axes = tuple(axis for axis in range(marks.ndim) if axis != marks.ndim - 3)
    marked: list[int] = np.flatnonzero(marks.any(axis=axes)).tolist()
    return marked if form.omit_empty_frames and 0 < len(marked) < marks.shape[-3] else None


def _is_made_of_planes(form: SegForm) -> bool:
    """Whether highdicom makes the planes only (see `ctflow.dicom.write.frames`)."""
    return form.kind == "binary"


def _refer_to_sources(segmentation: Dataset, sources: Sources, *, has_all: bool) -> None:
    """Complete the references, if highdicom did not get all source images, or got frames as images."""
    if sources.frames:
        _refer_to_frames(segmentation, sources)
    if sources.frames or not has_all:
        _refer_to_all(segmentation, sources)


def _refer_to_all(segmentation: Dataset, sources: Sources) -> None:
    """Add what highdicom takes from all source images, or the first, if it got only those with frames."""
    segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = sources.instances
    first = sources.cleaned[0]
    segmentation.PositionReferenceIndicator = first.get("PositionReferenceIndicator")


def _refer_to_frames(segmentation: Dataset, sources: Sources) -> None:
    """Give each frame's source image its class and the source frame's number: for highdicom it is a CT image."""
    positions_mm = np.array([image.ImagePositionPatient for image in sources.cleaned], float)
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        place_mm = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        nearest = int(np.linalg.norm(positions_mm - place_mm, axis=1).argmin())
        for derivation in frame.get("DerivationImageSequence", []):
            for image in derivation.SourceImageSequence:
                image.ReferencedSOPClassUID = sources.references[nearest].ReferencedSOPClassUID
                image.ReferencedFrameNumber = sources.frames[nearest]


def _refer_by_frames(segmentation: Dataset, sources: Sources, grid: Geometry | None) -> None:
    """Have the frames name their images, instead of the SEG as a whole if any of them does."""
    if grid is not None:
        _refer_to_images_in_place(segmentation, sources, grid)
    if any(frame.get("DerivationImageSequence") for frame in segmentation.PerFrameFunctionalGroupsSequence):
        # OHIF takes this for the list of the frames' images, in their order: before 3.13 always, 3.13 for other frames.
        del segmentation.SourceImageSequence


def _refer_to_images_in_place(segmentation: Dataset, sources: Sources, grid: Geometry) -> None:
    """Name the image of each frame that lies on one; highdicom does so only if all do."""
    headers = sources.cleaned
    same = all(
        (header.Rows, header.Columns) == grid.shape[1:]
        and np.allclose(header.PixelSpacing, grid.spacing_mm[1:], atol=_IN_PLACE_MM)
        and np.allclose(header.ImageOrientationPatient, grid.directions[:, [2, 1]].T.reshape(-1), atol=1e-4)
        for header in headers
    )
    if not same:
        return
    positions_mm = np.array([header.ImagePositionPatient for header in headers], float)
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        apart = np.abs(positions_mm - frame.PlanePositionSequence[0].ImagePositionPatient).max(axis=1)
        nearest = int(apart.argmin())
        if apart[nearest] < _IN_PLACE_MM:
            frame.add_new("DerivationImageSequence", VR.SQ, [_derivation(sources.references[nearest])])


def _derivation(reference: Dataset) -> Dataset:
    """That a frame segments an image (DICOM PS3.3 C.7.6.16.2.6)."""
    image, derivation = Dataset(), Dataset()
    image.update(reference)
    image.SpatialLocationsPreserved = "YES"
    purpose = codes.cid7202.SourceImageForImageProcessingOperation
    image.PurposeOfReferenceCodeSequence = [hd.sr.CodedConcept.from_code(purpose)]
    derivation.SourceImageSequence = [image]
    derivation.DerivationCodeSequence = [hd.sr.CodedConcept.from_code(codes.cid7203.SegmentationImageDerivation)]
    return derivation


def _give_measures(shared: Dataset, sources: Sources, grid: Geometry | None) -> None:
    """Set distances and directions from the frames' positions: highdicom uses the first image's declarations."""
    if grid is not None:
        shared.PixelMeasuresSequence = _planes(grid)["pixel_measures"]
    elif sources.measures is None:
        raise ValueError("source images do not say where they lie, or are not in order along their normal")
    else:
        shared.PixelMeasuresSequence = sources.measures.pixel_measures()
        shared.PlaneOrientationSequence = sources.measures.plane_orientation()


def _pixels(
    labels: LabelArray, fractions: npt.NDArray[np.uint8] | None, shown: list[int] | None
) -> LabelArray | npt.NDArray[np.float32]:
    """The input of highdicom for some slices: the labels, or (D, H, W, S) float32 in [0, 1]."""
    if fractions is None:
        return labels if shown is None else labels[shown]
    some = fractions if shown is None else fractions[:, shown]
    # float32 holds k / 255 so precisely that 255 times it rounds to k again.
    return np.moveaxis(some, 0, -1).astype(np.float32) / np.float32(MOST_FRACTION)


def _planes(grid: Geometry) -> dict[str, Any]:
    """Frame positions as highdicom's arguments: a frame then refers to a source image only if it lies on one."""
    between_slices, between_rows, between_columns = grid.spacing_mm
    along = grid.directions
    origins = grid.world_from_index([(d, 0, 0) for d in range(grid.shape[0])])
    patient = hd.CoordinateSystemNames.PATIENT
    return {
        "pixel_measures": hd.PixelMeasuresSequence(
            pixel_spacing=(between_rows, between_columns),
            slice_thickness=between_slices,
            spacing_between_slices=between_slices,
        ),
        "plane_orientation": hd.PlaneOrientationSequence(patient, (*along[:, 2], *along[:, 1])),
        "plane_positions": [hd.PlanePositionSequence(patient, origin) for origin in origins],
    }


def _first(planes: dict[str, Any]) -> dict[str, Any]:
    """The first of a grid's planes."""
    return {**planes, "plane_positions": planes["plane_positions"][:1]} if planes else {}


def _check(
    labels: LabelArray,
    fractions: npt.NDArray[np.uint8] | None,
    images: int,
    spec: ModelSpec,
    form: SegForm,
    grid: Geometry | None,
) -> None:
    if labels.ndim != 3 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels are (D, H, W) uint8 or uint16, not {labels.shape} {labels.dtype}")
    if grid is None and len(labels) != images:
        raise ValueError(f"labels {labels.shape} do not lie on {images} source images")
    if grid is not None and (labels.shape != grid.shape or not grid.is_orthogonal):
        raise ValueError(f"labels {labels.shape} do not lie on a right-angled grid of {grid.shape}")
    numbers = [segment.number for segment in spec.segments]
    most = int(labels.max(initial=0))
    if not numbers or numbers != list(range(1, len(numbers) + 1)) or most > len(numbers):
        raise ValueError(f"labels up to {most} do not suit segments {numbers}")
    if (form.kind == "fractional") != (fractions is not None):
        raise ValueError("a fractional SEG, and no other, is made of fractions")
    if fractions is not None and (fractions.dtype != np.uint8 or fractions.shape != (len(numbers), *labels.shape)):
        raise ValueError(f"fractions {fractions.shape} {fractions.dtype} do not suit labels {labels.shape}")


def _describe(
    segment: Segment, header: Dataset, spec: ModelSpec, provenance: derived.Provenance, uid: str
) -> hd.seg.SegmentDescription:
    name = derived.tracking_id(segment, spec)
    if segment.part_of is None:
        tracking = uid_from_parts("segment", text(header, "SeriesInstanceUID"), spec.name, spec.version, name)
    else:
        tracking = derived.finding_uid(uid, segment.part_of, segment.rank)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=derived.fitted(spec.name),
        family=codes.DCM.ArtificialIntelligence,
        version=derived.fitted(spec.version),
        source=derived.ALGORITHM_SOURCE,
        parameters=derived.algorithm_parameters(provenance),
    )
    description = hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=derived.fitted(segment.label),
        segmented_property_category=derived.concept(segment.category),
        segmented_property_type=derived.concept(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=tracking,
        tracking_id=derived.fitted(name),
        anatomic_regions=[derived.concept(region) for region in segment.anatomy] or None,
        display_color=None if segment.colour is None else hd.color.CIELabColor.from_rgb(*segment.colour),
    )
    if segment.side is not None:  # highdicom has no argument for it
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        side = hd.sr.CodedConcept.from_code(derived.concept(segment.side))
        kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    return description


def _content_description(spec: ModelSpec, *, marked: bool) -> str:
    """One line of at most 64 characters; it always shows research-only and that nothing was marked."""
    if not marked and spec.demonstration:
        return f"{RESEARCH_ONLY}. None marked, not excluded"
    if not marked:
        return _NOTHING_MARKED
    return derived.series_description(spec, "Segmentation by")


def _make_reproducible(segmentation: Dataset, header: Dataset, uid: str) -> None:
    """Replace values that highdicom takes from the clock or at random."""
    derived.give_moment(segmentation, *derived.moment_of(header))
    organization = uid_from_parts("dimensions", uid)
    for item in segmentation.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = organization
    for item in segmentation.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
