"""A small share of `python tests/fuzz_bundles.py`."""

from __future__ import annotations

import fuzz_hostile
from fuzz_bundles import FINE, case_of, fuzz


def test_random_bundles_give_what_monai_gives_or_are_rejected_for_the_reason(tmp_path):
    result = fuzz(120, 11, tmp_path)
    assert result["bad"] == []
    assert sum(result.get(verdict, 0) for verdict in FINE) == 120
    assert result["equal"] >= 40
    assert result["rejected"] >= 40


def test_the_same_seed_gives_the_same_bundles():
    assert case_of(5, 3) == case_of(5, 3) != case_of(5, 4)


def test_hostile_bundles_end_in_named_errors(tmp_path):
    found = fuzz_hostile.fuzz(60, 11, tmp_path)
    assert found["bad"] == []
    assert len(found["reasons"]) > 4
