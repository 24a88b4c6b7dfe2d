"""A picture to a DICOM Secondary Capture, for viewers that show no SEG."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ctflow.compat.pydicom import lenient
from ctflow.core.model import RESEARCH_ONLY, ModelSpec
from ctflow.dicom.attributes import text
from ctflow.dicom.write import derived
from ctflow.dicom.write.identity import series_uid, uid_from_parts
from ctflow.dicom.write.source import Sources, sources_from_headers

_SHORT_TEXT = 1024  # characters of VR ST


@lenient()
def secondary_capture_from_picture(
    picture: npt.NDArray[np.uint8],
    segmentation: Dataset,
    sources: Sequence[Dataset] | Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
) -> Dataset:
    """Make a Secondary Capture Image.

    Args:
        picture: (rows, columns, 3) uint8, RGB, without patient data: the object declares that none is burned in.
        segmentation: The SEG whose outlines are drawn (`segmentation_from_labels`); only its UIDs are read.
        sources: Headers of the source images, or `Sources` made from them; they are not changed.
        spec: The model's name and version.
        provenance: The mask's origin.

    Returns:
        A single-frame image of its own series, in the source's study. Its UIDs follow from the SEG's and the pixels,
        its dates from the source; the same picture gives the same bytes.

    Raises:
        ValueError: The picture is not RGB.

    Source: DICOM PS3.3 A.8.1 (Secondary Capture Image IOD), C.7.6.1, C.8.6; highdicom.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is (rows, columns, 3) uint8, not {picture.shape} {picture.dtype}")
    sources = sources if isinstance(sources, Sources) else sources_from_headers(sources)
    header, cleaned = sources.header, sources.cleaned
    pixels = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()
    uid = uid_from_parts("secondary capture", segmentation.SOPInstanceUID, pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values were checked in clean_sources
        image: Dataset = hd.sc.SCImage(
            pixel_array=picture,
            photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
            bits_allocated=8,
            coordinate_system=hd.CoordinateSystemNames.PATIENT,
            patient_orientation=("L", "P"),  # highdicom requires one; see _describe
            study_instance_uid=text(header, "StudyInstanceUID"),
            series_instance_uid=series_uid(text(header, "SeriesInstanceUID"), spec.name, spec.version, "SC", uid),
            series_number=derived.series_number(header, 3),
            sop_instance_uid=uid,
            instance_number=1,
            **derived.equipment(spec, provenance),
            series_description=derived.series_description(spec, "Picture by", sources.part),
        )
        image.copy_patient_and_study_information(cleaned[0])
    _describe(image, sources, spec)
    derived.give_text_encoding(image, cleaned[0])
    derived.give_moment(image, *derived.moment_of(header))
    return image


def _describe(image: Dataset, sources: Sources, spec: ModelSpec) -> None:
    """Set attributes that highdicom has no argument for, or guesses."""
    image.PatientOrientation = None  # three planes in one picture have no single orientation
    image.Laterality = None  # required, empty: no body part says whether it is paired
    image.ConversionType = "WSD"  # made on a workstation
    del image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture  # from the clock
    image.BurnedInAnnotation = "NO"
    notice = f"{RESEARCH_ONLY}. " if spec.demonstration else ""
    image.DerivationDescription = (
        f"{notice}Axial, coronal and sagittal slice of the largest plausible finding, and outlines of what "
        f"{derived.fitted(spec.name)} {derived.fitted(spec.version)} marked. For orientation, not for diagnosis."
    )[:_SHORT_TEXT]
    purpose = hd.sr.CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
    image.SourceImageSequence = [_reference(source, purpose) for source in sources.instances]
    lossy = next((source for source in sources.cleaned if text(source, "LossyImageCompression") == "01"), None)
    if lossy is not None:  # once lossy, always lossy (PS3.3 C.7.6.1.1.5)
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if keyword in lossy:
                image[keyword] = lossy[keyword]


def _reference(source: Dataset, purpose: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.ReferencedSOPClassUID
    item.ReferencedSOPInstanceUID = source.ReferencedSOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item
