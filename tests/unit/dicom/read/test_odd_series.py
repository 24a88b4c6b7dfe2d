"""Every odd series gives the correct volume or a specific error, and docs/dicom.md says which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dicom_support import assert_same_world
from odd_series import ODD, Odd, outcome_of

DOCS = Path(__file__).parents[4] / "docs" / "dicom.md"


@pytest.mark.filterwarnings("ignore:Failed to decode:UserWarning", "ignore:Unknown encoding:UserWarning")
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_an_odd_series_has_its_outcome(tmp_path, odd: Odd):
    truth = odd.write(tmp_path)
    outcome = outcome_of(tmp_path)
    assert outcome.text == odd.outcome, outcome.said
    assert odd.says in outcome.said
    assert bool(outcome.volumes) == (truth is not None)
    for volume in outcome.volumes:
        assert_same_world(volume, truth, within=0.1 if "puts slices" in outcome.said else 1e-3)


def test_the_documentation_lists_exactly_these_series():
    section = DOCS.read_text(encoding="utf-8").split("## Odd series\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert rows[0] == ("series", "outcome")
    assert rows[1:] == [(odd.name, odd.outcome) for odd in ODD]
