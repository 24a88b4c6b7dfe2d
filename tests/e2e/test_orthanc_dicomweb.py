"""Orthanc's DICOMweb plugin as sender and as destination, in a network namespace (see `test_orthanc.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthanc_support import DICOMWEB, ran_alone

pytestmark = pytest.mark.e2e
PROGRAM = Path(__file__).with_name("orthanc_dicomweb.py")


def test_orthanc_sends_and_receives_by_stow(tmp_path):
    found = ran_alone(PROGRAM, tmp_path, plugins=(DICOMWEB,), timeout_s=200)
    assert found["received"] == [5, "orthanc"]
    assert found["said"] == ["", ""], "the same object twice is the same"
    assert found["in_orthanc"] == 6
    assert found["denied"] == "access-denied"
