"""Warnings of viewers that misread the form of a SEG: which form of which series has one."""

from __future__ import annotations

import json
from dataclasses import replace

import pydicom
import pytest

import marking_support
from ctflow.engines.contract import COSTS
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


def test_a_mask_of_eight_bits_says_in_the_seg_and_the_result_what_that_costs(tmp_path, monkeypatch):
    ct = write_series("plain", tmp_path / "ct")
    plain = objects_of(ct, tmp_path / "fp32")
    monkeypatch.setattr(marking_support, "INFO", replace(marking_support.INFO, backend="fused", precision="fp8"))
    folder = objects_of(ct, tmp_path / "fp8")
    assert json.loads((folder / "result.json").read_text())["engine"]["precision"] == "fp8"
    told = []
    for each in (plain, folder):
        seg = pydicom.dcmread(each / "segmentation.dcm")
        algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
        told.append(str(algorithm.AlgorithmParameters))
    assert "precision_cost" not in told[0]
    assert f"precision_cost={COSTS['fp8']}" in told[1]
