"""Warnings of viewers that misread the form of a SEG: which form of which series has one."""

from __future__ import annotations

import json

import pytest

from viewer_support import objects_of, write_series

COLUMNS = "Orthanc serves no frames of a binary SEG whose Columns, here "


@pytest.mark.parametrize(
    ("series", "chosen", "expected"),
    [
        ("plain", {}, []),
        ("odd-sized", {}, [f"{COLUMNS}41, are not a multiple of 8, and OHIF 3.13 shifts or rejects frames"]),
        ("anisotropic", {}, []),
        ("odd-sized", {"viewer": "ohif"}, []),
        ("uneven", {}, ["the SEG lies on unevenly spaced slices"]),
        ("uneven", {"viewer": "slicer"}, ["the SEG lies on a grid of its own"]),
        ("plain", {"viewer": "slicer"}, []),
    ],
)
def test_a_form_that_some_viewer_misreads_is_told_in_the_result_and_the_log(series, chosen, expected, tmp_path, caplog):
    folder = objects_of(write_series(series, tmp_path / "ct"), tmp_path / "out", **chosen)
    warnings = json.loads((folder / "result.json").read_text())["warnings"]
    found = [each for each in warnings if each.startswith(("Orthanc", "the SEG lies on"))]
    assert len(found) == len(expected)
    for warning, start in zip(found, expected, strict=True):
        assert warning.startswith(start)
        assert warning in caplog.text
        assert "--seg labelmap" in warning or "--seg-grid" in warning
