"""Engines that take long to make: TensorRT-RTX's are real here, made without a GPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from ctflow.bundle import demonstration_bundle, read_bundle
from ctflow.core.errors import BackendUnavailable, ParityFailed
from ctflow.engines.registry import batch_range_for, open_engine
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineStore
from ctflow.engines.tensorrt.engine import plan_key
from ctflow.export import measure, prepare, record
from ctflow.export.figures import ParityResult
from ctflow.export.measure import measure_engine
from ctflow.export.prepare import is_made_anywhere, is_prepared, prepare_engine
from ctflow.export.selection import choose_fastest
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from reasons import raises_reason

RTX = "tensorrt-rtx"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def demonstration():
    return read_bundle(demonstration_bundle())


@pytest.fixture(scope="module")
def coarse(coarse_bundle):
    return read_bundle(coarse_bundle)


def wanted(model, cache, device: str = "cpu", precision=None, backend: str = RTX) -> EngineRequest:
    return EngineRequest(backend, device, precision, model.spec.roi, (1, 1), cache)


@pytest.mark.exhaustive  # test_plan.py builds smaller ones
@no_gpu
def test_a_real_engine_of_the_demonstration_bundle_is_made_and_kept(demonstration, tmp_path, caplog):
    told = []
    with caplog.at_level(logging.WARNING):
        request = wanted(demonstration, tmp_path)
        found = measure_engine(request, demonstration, progress=lambda *a: told.append(a))
    # It says that it takes minutes, and that nothing was run.
    assert "this takes minutes" in caplog.text
    assert (found.backend, found.precision, found.window_seconds, found.parity) == (RTX, "fp16", None, None)
    text = "made for any GPU that the engine takes, not run here: copy the folder into the cache there"
    assert found.reason == f"{text}, or name it with --cache"
    assert {stage for stage, _, _ in told} == {"prepare engine", "build engine"}
    key = plan_key(replace(request, precision="fp16"), demonstration)
    path = EngineStore(tmp_path).find(key)
    assert path.stat().st_size > 5_000_000
    assert key.device == "any"
    # Another call makes nothing.
    told.clear()
    prepare_engine(request, demonstration, progress=lambda *a: told.append(a))
    assert not told
    with raises_reason(BackendUnavailable, "wrong-device"):
        open_engine(request, demonstration)


@no_gpu
def test_a_run_refuses_before_it_makes_what_cannot_run(coarse, tmp_path):
    segmenter = Segmenter(coarse, Settings(engine=RTX, device="cpu", cache=tmp_path))
    with raises_reason(BackendUnavailable, "wrong-device", names="cpu"):
        segmenter.open()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Pretends that a GPU is there that every backend computes on, and that an engine takes so many seconds."""
    seconds = {(RTX, "fp16"): 0.01, ("eager", "fp16"): 0.1, ("eager", "fp32"): 0.3}
    calls = []

    def time_one(request, *_):
        calls.append((request.backend, request.precision))
        return seconds[calls[-1]]

    monkeypatch.setattr(measure, "_seconds_a_window", time_one)
    monkeypatch.setattr(measure.ParityGate, "_parity", lambda *_: ParityResult(1e-3, 1.0, 4, "labels"))
    monkeypatch.setattr(record, "gpu_identity", lambda _: "a GPU")
    monkeypatch.setattr(prepare, "_make_plan", lambda _, __, path, ___: path.write_bytes(b"a plan"))
    monkeypatch.setattr(prepare, "_check_plan", lambda *_, **__: None)
    return calls


def test_auto_makes_nothing_for_minutes_and_takes_what_is_made(coarse, tmp_path, pretend_gpu):
    request = wanted(coarse, tmp_path, "cuda:0", backend="auto")
    first = choose_fastest(request, coarse)
    assert (first.backend, first.precision) == ("eager", "fp16")
    assert pretend_gpu == [("eager", "fp16"), ("eager", "fp32")]
    # `ctflow export` makes it; from then on a run takes it, although the earlier choice is on record.
    made = choose_fastest(request, coarse, make=True)
    assert (made.backend, made.precision) == (RTX, "fp16")
    assert is_prepared(replace(request, backend=RTX, precision="fp16"), coarse)
    again = choose_fastest(request, coarse)
    assert (again.backend, again.precision) == (RTX, "fp16")
    assert pretend_gpu.count((RTX, "fp16")) == 1


def test_a_plan_that_computes_something_else_is_not_kept(coarse, tmp_path, pretend_gpu, monkeypatch):
    def differs(*_, **__):
        raise ParityFailed("too far", reason="differs")

    monkeypatch.setattr(prepare, "_check_plan", differs)
    request = wanted(coarse, tmp_path, "cuda:0", "fp16")
    with raises_reason(ParityFailed, "differs"):
        prepare_engine(request, coarse)
    assert not is_prepared(request, coarse)
    assert not is_prepared(replace(request, cache=None), coarse)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_named_precision_leaves_the_others_out(coarse, tmp_path, pretend_gpu):
    choice = choose_fastest(wanted(coarse, tmp_path, "cuda:0", "fp32", "auto"), coarse)
    assert (choice.backend, choice.precision) == ("eager", "fp32")


def test_only_rtx_is_made_on_machines_that_cannot_run_it():
    assert is_made_anywhere(RTX)
    assert not is_made_anywhere("eager")


def test_a_gpu_gets_larger_batches_than_the_bundle_asks_for(coarse):
    assert batch_range_for(coarse.spec, "cpu") == (1, coarse.spec.batch_size)
    assert batch_range_for(coarse.spec, "cuda:1") == (1, max(4, coarse.spec.batch_size))
