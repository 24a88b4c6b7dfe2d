"""Malformed values of any attribute: conforming objects, or a named rejection."""

from __future__ import annotations

import fuzz_values


def test_malformed_values_end_in_objects_that_conform_or_in_a_named_rejection(tmp_path):
    """A share of what `python tests/fuzz_values.py` tries."""
    result = fuzz_values.fuzz(30, 7, tmp_path)
    assert result["bad_ones"] == []
    assert min(result["written"], result["rejected"], result["warned"]) >= 3
