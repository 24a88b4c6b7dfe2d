"""A label map to a DICOM RT Structure Set, whose contours lie in the source images' planes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage
from pydicom.valuerep import VR

from ctflow.compat.pydicom import lenient
from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY, Code, ModelSpec, Segment
from ctflow.core.volume import FloatArray, Geometry, LabelArray
from ctflow.dicom.attributes import numbers
from ctflow.dicom.write import derived
from ctflow.dicom.write.identity import instance_uid
from ctflow.dicom.write.plain import plain_object
from ctflow.dicom.write.source import Sources, sources_from_headers
from ctflow.measurements.contours import Outline, Probabilities, keyhole, outlines_of_labels
from ctflow.settings.run import Holes

_CONTOUR_DATA, _CONTOUR_IMAGE = Tag("ContourData"), Tag("ContourImageSequence")
_CONTOUR_TYPE, _CONTOUR_NUMBER, _POINTS = map(Tag, ("ContourGeometricType", "ContourNumber", "NumberOfContourPoints"))
_SHORT_STRING, _SHORT_TEXT = 16, 1024  # characters of VR SH and ST
_ORGAN = "123037004"  # SNOMED CT: Anatomical structure
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, which the standard requires though it is retired


@dataclass(frozen=True, eq=False)
class _ContourPlanes:
    """The planes of contours.

    Attributes:
        origins_mm: (D, 3) centre of each plane's first pixel.
        along_mm: (2, 3) unit directions along a row and along a column.
        pixel_mm: Distance between rows, and between columns.
        images: The image that each plane shows, as a reference; None if the planes are no images'.
    """

    origins_mm: FloatArray
    along_mm: FloatArray
    pixel_mm: tuple[float, float]
    images: tuple[Dataset, ...] | None


@lenient()
def structure_set_from_labels(
    labels: LabelArray,
    sources: Sequence[Dataset] | Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
    *,
    holes: Holes = "keyhole",
    fractions: npt.NDArray[np.uint8] | None = None,
    grid: Geometry | None = None,
    remark: str = "",
) -> Dataset:
    """Make a structure set.

    Args:
        labels: (D, H, W) uint8 or uint16; value k marks the segment with number k.
        sources: Headers of the source images, in array order, or `Sources` made from them; they are not changed. D of
            them unless there is a grid.
        spec: The model's name, version and segments; each segment is a region of interest (ROI), marked or not.
        provenance: The mask's origin.
        holes: By keyhole, or as contours of their own, which "separate" gives the type of all others, as planning
            systems do, and "xor" the type by which the standard combines contours by exclusive or.
        fractions: (S, D, H, W) uint8, each segment's probability in 255ths; contours lie where the mask's border is by
            these.
        grid: The labels' grid, if not the source images'; contours then refer to no image.
        remark: A sentence for the structure set's description.

    Returns:
        The structure set. Its UIDs follow from content, its dates from the source; the same mask gives the same bytes.
        Implicit VR: in Explicit VR a contour's points are limited to 64 kB.

    Raises:
        ValueError: Labels, sources and grid differ in size, a label has no segment, or sources are not in order.

    Source: DICOM PS3.3 A.19 (RT Structure Set IOD), C.8.8.5, C.8.8.6, C.8.8.8, C.8.8.16.
    """
    sources = sources if isinstance(sources, Sources) else sources_from_headers(sources)
    planes = _planes(sources) if grid is None else _planes_of_grid(grid)
    if len(labels) != len(planes.origins_mm):
        raise ValueError(f"labels {labels.shape} do not lie on {len(planes.origins_mm)} planes")
    likely = None if fractions is None else Probabilities(fractions, 0.5 if spec.threshold is None else spec.threshold)
    outlines = outlines_of_labels(labels, planes.pixel_mm, likely)
    unknown = {outline.number for outline in outlines} - {segment.number for segment in spec.segments}
    if unknown or not spec.segments:
        raise ValueError(f"labels {sorted(unknown)} have no segment")
    contours = {segment.number: _contours(outlines, segment.number, planes, holes) for segment in spec.segments}
    uid = instance_uid(
        sources.uids,
        provenance.weights_digest,
        provenance.ctflow_version,
        {**provenance.settings, "model": spec.name, "model_version": spec.version, "structures": holes},
        _digest(spec.segments, contours, remark),
    )
    result = _new(sources, spec, provenance, uid)
    _describe(result, sources, spec, " ".join(filter(None, [remark, "" if outlines else NOTHING_MARKED])))
    frame = sources.cleaned[0].FrameOfReferenceUID
    algorithm = _algorithm(spec, provenance)
    result.StructureSetROISequence = [_roi(segment, frame, spec, algorithm) for segment in spec.segments]
    result.ROIContourSequence = [_roi_contour(segment, contours[segment.number]) for segment in spec.segments]
    result.RTROIObservationsSequence = [_observation(segment) for segment in spec.segments]
    result.ApprovalStatus = "UNAPPROVED"
    derived.give_text_encoding(result, sources.cleaned[0])
    return result


def _planes(sources: Sources) -> _ContourPlanes:
    positions = [numbers(image, "ImagePositionPatient", 3) for image in sources.cleaned]
    if sources.measures is None or None in positions:
        raise ValueError("source images do not say where they lie, or are not in order along their normal")
    rows, columns = sources.measures.pixel_mm.tolist()
    along = sources.measures.orientation.reshape(2, 3)
    return _ContourPlanes(np.array(positions, float), along, (rows, columns), sources.references)


def _planes_of_grid(grid: Geometry) -> _ContourPlanes:
    origins = grid.world_from_index([(d, 0, 0) for d in range(grid.shape[0])])
    return _ContourPlanes(origins, grid.directions.T[[2, 1]], grid.spacing_mm[1:], None)


def _contours(outlines: Sequence[Outline], number: int, planes: _ContourPlanes, holes: Holes) -> list[Dataset]:
    """The contours of one segment; if one is to be combined by exclusive or, all are (PS3.3 C.8.8.6.3)."""
    own = [outline for outline in outlines if outline.number == number]
    kind = "CLOSEDPLANAR_XOR" if holes == "xor" and any(outline.holes for outline in own) else "CLOSED_PLANAR"
    contours: list[Dataset] = []
    for outline in own:
        for line in (keyhole(outline),) if holes == "keyhole" else (outline.outer, *outline.holes):
            contours.append(_contour(line, outline.plane, len(contours) + 1, kind, planes))
    return contours


def _contour(line: FloatArray, plane: int, number: int, kind: str, planes: _ContourPlanes) -> Dataset:
    points = np.round(planes.origins_mm[plane] + line @ planes.along_mm, 3) + 0.0  # no negative zero
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    # As text: pydicom takes long to make numbers of it that it writes as the same text.
    data = ("%.3f\\" * points.size)[:-1] % tuple(points.ravel().tolist())
    elements = [
        DataElement(_CONTOUR_TYPE, VR.CS, kind),
        DataElement(_POINTS, VR.IS, len(points)),
        DataElement(_CONTOUR_NUMBER, VR.IS, number),
        DataElement(_CONTOUR_DATA, VR.DS, data, already_converted=True),
    ]
    if planes.images is not None:
        elements.append(DataElement(_CONTOUR_IMAGE, VR.SQ, [planes.images[plane]]))
    return Dataset({element.tag: element for element in elements})


def _digest(segments: Sequence[Segment], contours: dict[int, list[Dataset]], remark: str) -> str:
    """SHA-256 of everything that is not the same for all structure sets of a run with these settings."""
    digest = hashlib.sha256(repr((segments, remark)).encode())
    for number, items in contours.items():
        for item in items:
            digest.update(f"{number} {item[_CONTOUR_DATA].value}\n".encode())
    return digest.hexdigest()


def _new(sources: Sources, spec: ModelSpec, provenance: derived.Provenance, uid: str) -> Dataset:
    """The object without its structures: patient, study, series, equipment, and what it refers to."""
    header, first = sources.header, sources.cleaned[0]
    result = plain_object(
        sources,
        spec,
        provenance,
        uid=uid,
        sop_class=RTStructureSetStorage,
        transfer_syntax=ImplicitVRLittleEndian,
        modality="RTSTRUCT",
        place=4,
        made_by="Structures by",
    )
    del result.InstanceCreationDate, result.InstanceCreationTime  # from the clock
    date, time = derived.moment_of(header)
    result.SeriesDate = result.StructureSetDate = date
    result.SeriesTime = result.StructureSetTime = time
    result.OperatorsName = None  # nobody drew
    result.FrameOfReferenceUID = first.FrameOfReferenceUID
    result.PositionReferenceIndicator = first.get("PositionReferenceIndicator")
    result.ReferencedFrameOfReferenceSequence = [_referenced_frame(sources)]
    return result


def _referenced_frame(sources: Sources) -> Dataset:
    """The frame of reference, and every source image by study and series."""
    first = sources.cleaned[0]
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ContourImageSequence = list(sources.references)
    study.ReferencedSOPClassUID = _STUDY_CLASS
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _describe(result: Dataset, sources: Sources, spec: ModelSpec, remark: str) -> None:
    name, version = derived.fitted(spec.name), derived.fitted(spec.version)
    result.StructureSetLabel = "RESEARCH ONLY" if spec.demonstration else name[:_SHORT_STRING].strip()
    result.StructureSetName = derived.series_description(spec, "Structures by", sources.part)
    notice = f"{RESEARCH_ONLY}. " if spec.demonstration else ""
    result.StructureSetDescription = f"{notice}Contours of what {name} {version} marked. {remark}"[:_SHORT_TEXT].strip()


def _algorithm(spec: ModelSpec, provenance: derived.Provenance) -> Dataset:
    item: Dataset
    (item,) = hd.AlgorithmIdentificationSequence(
        name=derived.fitted(spec.name),
        family=codes.DCM.ArtificialIntelligence,
        version=derived.fitted(spec.version),
        source=derived.ALGORITHM_SOURCE,
        parameters=derived.algorithm_parameters(provenance),
    )
    return item


def _roi(segment: Segment, frame_uid: str, spec: ModelSpec, algorithm: Dataset) -> Dataset:
    item = Dataset()
    item.ROINumber = segment.number
    item.ReferencedFrameOfReferenceUID = frame_uid
    item.ROIName = derived.fitted(segment.label)
    item.ROIGenerationAlgorithm = "AUTOMATIC"
    item.ROIGenerationDescription = derived.fitted(f"{spec.name} {spec.version}")
    item.ROIDerivationAlgorithmIdentificationSequence = [algorithm]
    return item


def _roi_contour(segment: Segment, contours: list[Dataset]) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber = segment.number
    if segment.colour is not None:
        item.ROIDisplayColor = list(segment.colour)
    if contours:
        item.ContourSequence = contours
    return item


def _observation(segment: Segment) -> Dataset:
    """What a ROI is. Only an organ has a type: whether a finding is a target volume is for a person to say."""
    kind = _coded(segment.type)
    modifiers = [segment.side, *segment.anatomy] if segment.side is not None else list(segment.anatomy)
    if modifiers:
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(each) for each in modifiers]
    item = Dataset()
    item.ObservationNumber = segment.number
    item.ReferencedROINumber = segment.number
    item.SegmentedPropertyCategoryCodeSequence = [_coded(segment.category)]
    item.RTROIIdentificationCodeSequence = [kind]
    item.RTROIInterpretedType = "ORGAN" if segment.category.value == _ORGAN else ""
    item.ROIInterpreter = None
    return item


def _coded(code: Code) -> Dataset:
    item: Dataset = hd.sr.CodedConcept.from_code(derived.concept(code))
    return item
