"""What a machine lacks is told once, at the end of a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from needs import HOW, skip_without, summary_of_skips
from random_search import REPOSITORY

NEEDS_A_CT = "tests/unit/dicom/test_world_coordinates.py::test_lidc_agrees_with_simpleitk"


def reason_of(what: str) -> str:
    with pytest.raises(pytest.skip.Exception) as caught:
        skip_without(what)
    return f"Skipped: {caught.value}"


def test_one_line_says_what_is_not_here_and_how_to_get_it():
    reasons = [reason_of("DCMTK"), *[reason_of("Chromium")] * 2, "Skipped: this machine has a GPU"]
    assert summary_of_skips(reasons) == (
        "4 skipped: 2 without Chromium (apt-get install chromium); 1 without DCMTK (apt-get install dcmtk); "
        "1 for other reasons (listed above)"
    )
    assert summary_of_skips([]) is None


@pytest.mark.parametrize("what", HOW)
def test_every_lack_is_told_with_its_remedy(what):
    assert summary_of_skips([reason_of(what)]) == f"1 skipped: 1 without {what} ({HOW[what]})"


def test_a_run_ends_with_the_line(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", NEEDS_A_CT],
        cwd=REPOSITORY, env={**environment, "CTFLOW_DATA": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n1 skipped: 1 without real CT ({HOW['real CT']})\n" in done.stdout
    document = (REPOSITORY / "docs" / "testing.md").read_text()
    assert "LIDC-IDRI-0314" in document
    assert "CTFLOW_DATA" in document
