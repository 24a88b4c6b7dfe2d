"""A cohort from and to a real DICOMweb server, Debian's Orthanc.

Orthanc binds all addresses, so all of it runs in a network namespace that has a loopback and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cohort_dicomweb import PLUGIN
from needs import skip_without

pytestmark = pytest.mark.e2e
PROGRAM = Path(__file__).parents[1] / "cohort_dicomweb.py"


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    if any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None for name in ("Orthanc", "ip")):
        skip_without("Orthanc")
    if not PLUGIN.is_file():
        skip_without("Orthanc's DICOMweb")
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        skip_without("namespaces of its own")
    folder = tmp_path_factory.mktemp("dicomweb")
    done = subprocess.run(
        ["unshare", "-n", sys.executable, PROGRAM, folder],
        capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(folder.glob("ctflow-*/fetched/*/*")), "what was fetched is removed"
    return json.loads(done.stdout.splitlines()[-1])


def test_the_manifest_has_the_ct_series_of_the_server_page_by_page(told):
    assert told["inputs"] == 25
    assert len(told["rows"]) == 3
    assert told["rows"] == told["series"]


def test_rows_are_retrieved_byte_for_byte_and_their_results_stored(told):
    assert told["counts"] == {"done": 3, "failed": 1}
    assert told["marks"] == told["expected"]
    assert told["marks"]["none"] == {"status": "failed", "reason": "location-absent", "digest": "", "attempt": 3}
    assert told["same_results"], "the server has the objects that a folder has"
    assert told["modalities"] == ["CT", "MR", "SEG", "SR"]
    assert ".dcm" not in told["files"]
    assert ".json" in told["files"]


def test_a_second_computation_stores_the_same_objects(told):
    assert told["after_a_second_run"] == 0
