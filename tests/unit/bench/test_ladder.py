from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bundle_support import small_unet_bundle
from ctflow.bench import ladder
from ctflow.bench.ladder import Plan, rows_for, run_ladder
from ctflow.bench.row import Request, request_from_document, run_row
from ctflow.errors import BackendUnavailable, BundleInvalid, SettingsInvalid

SHAPE = (120, 64, 64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture(scope="module")
def measured(bundle) -> dict:
    """Real processes: stock, the article's loop, ctflow, and a row that this machine cannot run."""
    plan = Plan(bundle, ("cpu",), SHAPE, repeats=2, only=("0a", "1", "4", "5x2", "eager-fp32"), overlaps=(0.0, 0.25))
    return run_ladder(plan)


def row(document: dict, name: str) -> dict:
    (found,) = [entry for entry in document["rows"] if entry["id"] == name]
    return found


def test_rows_are_measured_in_order_or_say_why_not(measured):
    assert [entry["id"] for entry in measured["rows"]] == ["0a", "1", "4", "5x2", "eager-fp32"]
    assert [bool(entry["reason"]) for entry in measured["rows"]] == [False, False, True, True, False]
    assert "tensorrt" in row(measured, "4")["reason"]
    assert row(measured, "5x2")["reason"] == "needs 2 GPUs; 1 given"
    json.dumps(measured, allow_nan=False)


def test_results_tell_seconds_windows_factors_and_exactness(measured):
    for entry in measured["rows"]:
        if entry["reason"]:
            assert "results" not in entry
            continue
        assert [result["overlap"] for result in entry["results"]] == [0.0, 0.25]
        assert [result["windows"] for result in entry["results"]] == [8, 18]
        for number, result in enumerate(entry["results"]):
            assert len(result["seconds"]) == 2
            assert min(result["seconds"]) <= result["median_s"] <= max(result["seconds"])
            assert result["dice_to_article"] >= 0.99
            assert result["factor_to_stock_half"] is None  # a CPU has no such row
            article = row(measured, "1")["results"][number]["median_s"]
            assert result["factor_to_article"] == pytest.approx(article / result["median_s"], rel=0.02)
    assert row(measured, "1")["results"][0]["dice_to_article"] == 1.0
    assert row(measured, "eager-fp32")["engine"]["backend"] == "eager"
    assert row(measured, "0a")["engine"] is None


def test_the_document_says_on_what(measured):
    assert measured["case"]["shape"] == list(SHAPE)
    assert measured["model"]["network"] == "UNet"
    assert measured["machine"]["gpus"] == []
    assert measured["repeats"] == 2


def test_a_machine_with_four_gpus_has_rows_for_them():
    names = [entry.id for entry in rows_for(("cuda:0", "cuda:1", "cuda:2", "cuda:3"))]
    assert {"5x2", "5x4", "tensorrt-fp16", "tensorrt-fp16x2", "tensorrt-fp16x4", "eager-fp16", "compile-fp16"} <= {
        *names
    }
    assert len(names) == len({*names})
    assert not [name for name in names if "openvino" in name]


@pytest.mark.parametrize("options", [{"only": ("0z",)}, {"pythons": {"9": "/bin/true"}}])
def test_an_unknown_row_is_refused_before_any_work(bundle, options, monkeypatch):
    monkeypatch.setattr(ladder, "phantom_from_seed", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(SettingsInvalid, match="is none of 0a, 0b"):
        run_ladder(Plan(bundle, ("cpu",), SHAPE, **options))


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "/nowhere/python does not start: No such file or directory"),
        ("/bin/false", "its process ended with 1: it said nothing"),
    ],
)
def test_an_interpreter_that_cannot_run_a_row_is_its_reason(bundle, python, reason, monkeypatch):
    draw = ladder.phantom_from_seed
    monkeypatch.setattr(ladder, "phantom_from_seed", lambda seed, _, tumours: draw(seed, (16, 32, 32), tumours=tumours))
    document = run_ladder(Plan(bundle, ("cpu",), SHAPE, only=("0a",), pythons={"0a": python}))
    assert row(document, "0a")["reason"] == reason


def request_of(bundle: Path, folder: Path, **changes) -> Request:
    given = {"way": "ctflow", "engine": "eager", "precision": "fp32", "stitch": "device", "devices": ["cpu"]}
    given |= {"model": str(bundle), "case": str(folder / "case.npz"), "overlaps": [0.0], "batch_size": 4, "repeats": 1}
    return request_from_document({**given, "cache": None, "result": str(folder), **changes})


def test_a_volume_below_the_window_is_refused(bundle, tmp_path):
    affine = np.diag([6.0, 6.0, 6.0, 1.0])[[2, 1, 0, 3]]
    np.savez(tmp_path / "case.npz", hu=np.zeros((20, 40, 40), np.int16), affine_mm=affine)
    with pytest.raises(BundleInvalid, match="smaller than the window"):
        run_row(request_of(bundle, tmp_path))


def test_what_a_row_cannot_do_has_a_reason(bundle, tmp_path):
    with pytest.raises(BackendUnavailable, match="on a GPU only"):
        run_row(request_of(bundle, tmp_path, engine="torch", precision="fp16", way="stock"))
    with pytest.raises(BackendUnavailable, match="the CPU computes"):
        run_row(request_of(bundle, tmp_path, precision="fp16"))
