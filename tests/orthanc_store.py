"""Run in a network namespace: whether Orthanc takes SEGs over C-STORE, as it comes and with UnknownSopClassAccepted.

unshare -n python orthanc_store.py WORK SEG...

One line of JSON: {setting: [whether each SEG was taken]}.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pydicom
from pynetdicom import AE

PORT = 4242


def is_taken(path: Path) -> bool:
    """Store a file."""
    dataset = pydicom.dcmread(path)
    entity = AE()
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", PORT, ae_title="ORTHANC")
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
    association = entity.associate("127.0.0.1", PORT, ae_title="ORTHANC")
    if not association.is_established:
        return False
    association.release()
    return True


def taken(work: Path, paths: list[Path], **settings: bool) -> list[bool]:
    """What an Orthanc with these settings takes."""
    store = str(work / "store")
    shutil.rmtree(store, ignore_errors=True)
    document = {
        "StorageDirectory": store, "IndexDirectory": store, "HttpServerEnabled": False, "DicomPort": PORT,
        "DicomAet": "ORTHANC", "DicomAlwaysAllowStore": True, **settings,
    }  # fmt: skip
    (work / "orthanc.json").write_text(json.dumps(document))
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin") or "Orthanc"
    with (work / "orthanc.log").open("ab") as log:
        orthanc = subprocess.Popen([program, work / "orthanc.json"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not answers():
            if time.monotonic() > end:
                raise SystemExit("Orthanc does not answer")
            time.sleep(0.1)
        return [is_taken(path) for path in paths]
    finally:
        with contextlib.suppress(ProcessLookupError):
            orthanc.terminate()
        orthanc.wait(40)


def main(work: Path, paths: list[Path]) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    found = {"as it comes": taken(work, paths), "accepting": taken(work, paths, UnknownSopClassAccepted=True)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
