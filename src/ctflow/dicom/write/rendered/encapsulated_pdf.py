"""A report in PDF to a DICOM Encapsulated PDF, for a PACS that shows nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from ctflow.compat.pydicom import lenient
from ctflow.core.model import RESEARCH_ONLY, ModelSpec
from ctflow.dicom.write import derived
from ctflow.dicom.write.identity import uid_from_parts
from ctflow.dicom.write.plain import plain_object
from ctflow.dicom.write.source import Sources, sources_from_headers

_SHORT_TEXT = 1024  # characters of VR ST


@lenient()
def encapsulated_pdf_from_bytes(
    pdf: bytes,
    objects: Sequence[Dataset],
    sources: Sequence[Dataset] | Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
) -> Dataset:
    """Make an Encapsulated PDF.

    Args:
        pdf: The document, without patient data: the object declares that its pages do not identify the patient.
        objects: What it reports, the SEG first (`segmentation_from_labels`); only their UIDs are read.
        sources: Headers of the source images, or `Sources` made from them; they are not changed.
        spec: The model's name and version.
        provenance: The mask's origin.

    Returns:
        The document in a series of its own, in the source's study. Its UIDs follow from the SEG's and the PDF, its
        dates from the source; the same PDF gives the same bytes.

    Raises:
        ValueError: It is no PDF.

    Source: DICOM PS3.3 A.45.1 (Encapsulated PDF IOD), C.24.1, C.24.2, C.8.6.1.
    """
    if not pdf.startswith(b"%PDF-"):
        raise ValueError("not a PDF")
    sources = sources if isinstance(sources, Sources) else sources_from_headers(sources)
    header, first = sources.header, sources.cleaned[0]
    uid = uid_from_parts("encapsulated pdf", objects[0].SOPInstanceUID, hashlib.sha256(pdf).hexdigest())
    result = plain_object(
        sources,
        spec,
        provenance,
        uid=uid,
        sop_class=EncapsulatedPDFStorage,
        transfer_syntax=ExplicitVRLittleEndian,
        modality="DOC",
        place=5,
        made_by="Report by",
    )
    _describe(result, spec, sources.part)
    result.SourceInstanceSequence = [*(_reference(each) for each in objects), *sources.instances]
    result.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    result.EncapsulatedDocumentLength = len(pdf)
    derived.give_text_encoding(result, first)
    derived.give_moment(result, *derived.moment_of(header))
    return result


def _describe(result: Dataset, spec: ModelSpec, part: str) -> None:
    notice = f"{RESEARCH_ONLY}: " if spec.demonstration else ""
    name, version = derived.fitted(spec.name), derived.fitted(spec.version)
    of_part = f": {part}" if part else ""
    result.DocumentTitle = f"{notice}Segmentation report of {name} {version}{of_part}"[:_SHORT_TEXT]
    result.ConceptNameCodeSequence = [hd.sr.CodedConcept.from_code(codes.DCM.ImagingMeasurementReport)]
    result.MIMETypeOfEncapsulatedDocument = "application/pdf"
    result.ConversionType = "WSD"  # made on a workstation
    result.BurnedInAnnotation = "NO"
    result.VerificationFlag = "UNVERIFIED"
    result.AcquisitionDateTime = None  # required, may be empty: no document was digitised


def _reference(instance: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    return item
