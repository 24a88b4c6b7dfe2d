"""An object of a class that highdicom has no constructor for: what it has in common with every other."""

from __future__ import annotations

import warnings

import highdicom as hd
from pydicom.dataset import Dataset

from ctflow.core.model import ModelSpec
from ctflow.dicom.attributes import text
from ctflow.dicom.write import derived
from ctflow.dicom.write.identity import series_uid
from ctflow.dicom.write.source import Sources


def plain_object(
    sources: Sources,
    spec: ModelSpec,
    provenance: derived.Provenance,
    *,
    uid: str,
    sop_class: str,
    transfer_syntax: str,
    modality: str,
    place: int,
    made_by: str,
) -> Dataset:
    """Make an object with patient, study, series and equipment, in a series of its own.

    Args:
        sources: Of the source images.
        spec: The model's name and version.
        provenance: The mask's origin.
        uid: Of the object.
        sop_class: UID of its class.
        transfer_syntax: UID.
        modality: Also tells its series from those of other objects.
        place: Of its series among those of a result (`derived.series_number`).
        made_by: Begins the series' description.
    """
    header = sources.header
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values were checked in clean_sources
        result: Dataset = hd.SOPClass(
            study_instance_uid=text(header, "StudyInstanceUID"),
            series_instance_uid=series_uid(text(header, "SeriesInstanceUID"), spec.name, spec.version, modality, uid),
            series_number=derived.series_number(header, place),
            sop_instance_uid=uid,
            sop_class_uid=sop_class,
            instance_number=1,
            modality=modality,
            transfer_syntax_uid=transfer_syntax,
            series_description=derived.series_description(spec, made_by, sources.part),
            **derived.equipment(spec, provenance),
        )
        result.copy_patient_and_study_information(sources.cleaned[0])
    return result
