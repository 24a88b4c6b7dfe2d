"""A cohort from and to a real DICOMweb server, Debian's Orthanc.

Orthanc binds all addresses, so all of it runs in a network namespace that has a loopback and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from orthanc_support import DICOMWEB, ran_alone

pytestmark = pytest.mark.e2e
PROGRAM = Path(__file__).parents[1] / "cohort_dicomweb.py"


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("dicomweb")
    found = ran_alone(PROGRAM, folder, plugins=(DICOMWEB,), timeout_s=200, TMPDIR=str(folder))
    assert not list(folder.glob("ctflow-*/fetched/*/*")), "what was fetched is removed"
    return found


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
