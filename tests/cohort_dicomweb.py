"""Run in a network namespace: a cohort whose series come from Orthanc over DICOMweb and whose results go back to it.

unshare -n python cohort_dicomweb.py FOLDER

One line of JSON at the end.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from pydicom import dcmread

from cohort_support import run_marking, write_cohort
from ctflow.cohort.destinations.from_text import destination_from_text, text_of_destination
from ctflow.cohort.manifest.digest import digest_of_series
from ctflow.cohort.manifest.rows import CohortRow, manifest_from_file, write_manifest
from ctflow.cohort.manifest.source import rows_from_source
from ctflow.cohort.stores import dicomweb
from ctflow.cohort.stores.dicomweb import DicomWeb
from ctflow.cohort.stores.patience import Patience
from ctflow.dicom.read.scan import scan_folder
from orthanc_support import DICOMWEB, HTTP, ask, begin_alone, orthanc

SERVER = f"dicomweb+http://127.0.0.1:{HTTP}/dicom-web"
SETTINGS = {
    "DicomServerEnabled": False, "Plugins": [str(DICOMWEB)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    "LimitFindResults": 2,
}  # fmt: skip


def marks(journal: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (journal / "rows").glob("*.json")]
    return {mark["id"]: {key: mark[key] for key in ("status", "reason", "digest", "attempt")} for mark in found}


def stored() -> list[str]:
    return sorted(ask(f"/instances/{each}/tags?simplify")["SOPInstanceUID"] for each in ask("/instances"))


def main(folder: Path) -> dict:
    begin_alone()
    local = write_cohort(folder / "in", 3)
    series = [folder / "in" / row.location for row in manifest_from_file(local).rows]
    other = dcmread(next(series[0].iterdir()))
    other.Modality, other.SeriesInstanceUID, other.SOPInstanceUID = "MR", "1.2.3", "1.2.3.4"
    other.save_as(folder / "mr.dcm")
    told: dict = {}
    with orthanc(folder, **SETTINGS):
        server = DicomWeb(SERVER, Patience(20))
        for each in (*series, folder):
            server.store(sorted(each.glob("*.dcm")))
        inputs = stored()
        told["inputs"] = len(inputs)
        with mock.patch.object(dicomweb, "_PAGE", 2):
            rows = list(rows_from_source(SERVER))
        told["rows"] = sorted(row.series for row in rows)
        told["series"] = sorted(str(dcmread(next(each.iterdir())).SeriesInstanceUID) for each in series)
        digests = {
            str(dcmread(next(each.iterdir())).SeriesInstanceUID): digest_of_series(scan_folder(each).instances)
            for each in series
        }
        rows = [CohortRow(row.id, row.location, row.series, digest=digests[row.series]) for row in rows]
        rows.append(CohortRow("none", f"{SERVER}/studies/1.2/series/1.3"))
        write_manifest(rows, folder / "m.csv")
        text = text_of_destination(SERVER, str(folder / "journal"))
        report = run_marking(folder / "m.csv", folder / "unused", destination=destination_from_text(text, "whole"))
        told["counts"] = dict(report.counts)
        told["marks"] = marks(folder / "journal")
        told["files"] = sorted({path.suffix for path in (folder / "journal" / "results").rglob("*") if path.is_file()})
        results = sorted(set(stored()) - set(inputs))
        told["modalities"] = sorted({ask(f"/series/{each}")["MainDicomTags"]["Modality"] for each in ask("/series")})
        run_marking(folder / "m.csv", folder / "expected")
        told["expected"] = marks(folder / "expected")
        found = [dcmread(path) for path in (folder / "expected").rglob("*.dcm")]
        told["same_results"] = results == sorted(str(each.SOPInstanceUID) for each in found)
        shutil.rmtree(folder / "journal")  # all rows are computed again, and store the same objects
        run_marking(folder / "m.csv", folder / "unused", destination=destination_from_text(text, "whole"))
        told["after_a_second_run"] = len(stored()) - len(inputs) - len(results)
    return told


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(Path(sys.argv[1]))) + "\n")
