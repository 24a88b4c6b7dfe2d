"""Run in a network namespace: whether Orthanc takes SEGs over C-STORE, as it comes and with UnknownSopClassAccepted.

unshare -n python orthanc_store.py WORK SEG...

One line of JSON: {setting: [whether each SEG was taken]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pydicom
from pynetdicom import AE

from orthanc_support import DICOM, begin_alone, orthanc


def is_taken(path: Path) -> bool:
    """Store a file."""
    dataset = pydicom.dcmread(path)
    entity = AE()
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", DICOM, ae_title="ORTHANC")
    if not association.is_established:
        return False
    try:
        return bool(association.accepted_contexts) and association.send_c_store(dataset).Status == 0
    finally:
        association.release()


def answers() -> bool:
    """Whether Orthanc listens."""
    entity = AE()
    entity.add_requested_context("1.2.840.10008.1.1")
    association = entity.associate("127.0.0.1", DICOM, ae_title="ORTHANC")
    if not association.is_established:
        return False
    association.release()
    return True


def taken(work: Path, paths: list[Path], **settings: bool) -> list[bool]:
    """What an Orthanc with these settings takes."""
    given = {"HttpServerEnabled": False, "DicomPort": DICOM, "DicomAet": "ORTHANC", "DicomAlwaysAllowStore": True}
    with orthanc(work, answers=answers, **given, **settings):
        return [is_taken(path) for path in paths]


def main(work: Path, paths: list[Path]) -> None:
    begin_alone()
    found = {"as it comes": taken(work, paths), "accepting": taken(work, paths, UnknownSopClassAccepted=True)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
