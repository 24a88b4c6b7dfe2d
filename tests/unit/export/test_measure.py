from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from ctflow.bundle import read_bundle
from ctflow.core.errors import (
    BackendUnavailable,
    BundleInvalid,
    DeviceOutOfMemory,
    EngineMismatch,
    ExportFailed,
    NetworkNotTaken,
    ParityFailed,
    StorageFull,
)
from ctflow.engines import registry
from ctflow.engines.contract import EngineInfo
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest, info_of
from ctflow.export import measure, record, selection
from ctflow.export.figures import Measured, ParityResult
from ctflow.export.measure import measure_engine
from ctflow.export.record import Agreements
from ctflow.export.selection import choose_fastest, engines_not_made
from reasons import raises_reason

ROI = (64, 64, 64)
GOOD = ParityResult(1e-5, 1.0, 4, "labels")


def wanted(cache, backend="auto", **changes) -> EngineRequest:
    return replace(EngineRequest(backend, "cpu", "fp32", ROI, (1, 1), cache), **changes)


@pytest.fixture(scope="module")
def model(coarse_bundle):
    return read_bundle(coarse_bundle)


@pytest.fixture
def pretend(monkeypatch):
    """Pretends that engines take so many seconds; an exception is raised in their place."""

    def answer(seconds, parity=GOOD):
        calls = []

        def time_one(request, *_):
            name = request.backend
            calls.append(name)
            if isinstance(seconds[name], Exception):
                raise seconds[name]
            return seconds[name]

        def compare(_, request):
            found = parity[request.backend] if isinstance(parity, dict) else parity
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(selection, "prepare_to_open", lambda *_, **__: None)  # minutes, if each test made its own
        monkeypatch.setattr(measure, "_seconds_a_window", time_one)
        monkeypatch.setattr(measure.ParityGate, "_parity", compare)
        return calls

    return answer


def test_an_engine_is_made_timed_and_compared(model, tmp_path):
    request = wanted(tmp_path, "onnxruntime", roi=(64, 32, 32))
    found = measure_engine(request, model)
    assert found.backend == "onnxruntime"
    assert 0 < found.window_seconds < 60
    assert found.parity.windows == 4
    assert found.parity.dice is None or found.parity.dice >= 0.999
    assert found.parity.relative_error < 1e-3
    # The file is there now: nothing is made again.
    engine = open_engine(request, model)
    assert engine.info.out_channels == 2  # a head of 3x3x3 is not folded
    engine.close()


def test_the_fastest_is_chosen_once_and_remembered(model, tmp_path, pretend):
    calls = pretend({"openvino": 0.5, "onnxruntime": 0.3, "eager": 4.0})
    choice = choose_fastest(wanted(tmp_path), model)
    assert choice.backend == "onnxruntime"
    assert calls == ["openvino", "onnxruntime", "eager"]
    assert choose_fastest(wanted(tmp_path), model) == choice
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("seconds", "batch"),
    [
        ({1: 0.30, 8: 0.20, 16: 0.19}, 16),
        ({1: 0.30, 8: 0.20, 16: 0.199}, 8),  # not worth twice the memory
        ({1: 0.30, 8: 0.31, 16: 0.32}, 1),
        ({1: 0.30, 8: DeviceOutOfMemory("small"), 16: 0.1}, 1),
        ({1: 0.30, 8: 0.2, 16: BackendUnavailable("no kernel for it", reason="device-failed")}, 8),
    ],
)
def test_the_batch_that_suits_the_machine_is_kept(model, tmp_path, pretend, monkeypatch, seconds, batch):
    def time_one(request, *_):
        found = seconds[request.batch_range[1]] if request.backend == "onnxruntime" else 9.0
        if isinstance(found, Exception):
            raise found
        return found

    pretend({})
    monkeypatch.setattr(measure, "_seconds_a_window", time_one)
    monkeypatch.setattr(registry, "_TIMED_BATCHES", {"onnxruntime": (8, 16)})
    choice = choose_fastest(wanted(tmp_path), model)
    assert (choice.backend, choice.batch) == ("onnxruntime", batch)
    assert choose_fastest(wanted(tmp_path), model) == choice


def test_a_damaged_record_is_measured_again(model, tmp_path, pretend):
    calls = pretend({"openvino": 0.5, "onnxruntime": 0.3, "eager": 4.0})
    choose_fastest(wanted(tmp_path), model)
    (path,) = tmp_path.glob("choice-*.json")
    record = json.loads(path.read_text())
    damaged = ["{", "[]", json.dumps({"format": 1, "backend": "other", "measured": []})]
    # A batch that is none would end the first case with an error without a name.
    damaged += [json.dumps({**record, "batch": batch}) for batch in (0, -1, "8", 2.5)]
    for text in damaged:
        path.write_text(text)
        assert choose_fastest(wanted(tmp_path), model).backend == "onnxruntime"
    assert len(calls) == 3 * (1 + len(damaged))


def test_a_choice_is_kept_in_a_folder_that_is_not_there_yet(model, tmp_path, pretend):
    calls = pretend({"openvino": 0.5, "onnxruntime": 5.0, "eager": 0.3})
    for _ in range(2):
        assert choose_fastest(wanted(tmp_path / "new" / "cache"), model).backend == "eager"
    assert len(calls) == 3


@pytest.fixture
def opens(monkeypatch):
    """Engines that are nothing but their info, and agree on a phantom; which were opened."""

    class Engine:
        def __init__(self, info):
            self.info = info

        def close(self):
            pass

    def open_one(request, model):
        opened.append(request.backend)
        return Engine(info_of(request, model, 1, {}))

    opened = []
    monkeypatch.setattr(measure, "open_engine", open_one)
    monkeypatch.setattr(selection, "prepare_to_open", lambda *_, **__: None)
    monkeypatch.setattr(measure, "reference_logits", lambda *_: [])
    monkeypatch.setattr(measure, "check_parity", lambda *_, **__: GOOD)
    return opened


def test_a_kept_choice_of_an_engine_that_failed_on_a_ct_is_discarded(model, tmp_path, monkeypatch, opens):
    """Of another GPU like the first, say: each device and batch range has its own file, and another batch."""
    seconds, timed = {"openvino": 0.3, "onnxruntime": 0.5, "eager": 4.0}, []

    def timing(request, *_):
        timed.append(request.backend)
        return seconds[request.backend]

    monkeypatch.setattr(measure, "_seconds_a_window", timing)
    first, second = wanted(tmp_path), wanted(tmp_path, batch_range=(1, 2))
    for request in (first, second):
        assert choose_fastest(request, model).backend == "openvino"
    timed.clear()
    info = EngineInfo("openvino", "fp32", "cpu", ROI, (1, 1), model.weights_digest, 1)
    Agreements(model, tmp_path).refuse([info])
    with monkeypatch.context() as patch:  # in a cache that can only be read it is discarded each time
        patch.setattr(selection, "store_record", lambda *_: None)
        assert choose_fastest(second, model).backend == "onnxruntime"
    found = choose_fastest(second, model)
    assert (found.backend, timed) == ("onnxruntime", []), "nothing is timed twice"
    assert "differed from PyTorch in fp32 on a CT" in found.measured[0].reason
    opens.clear()
    assert choose_fastest(second, model) == found
    assert opens == [], "the new choice is kept"
    assert choose_fastest(wanted(tmp_path), model).backend == "onnxruntime"


def test_where_memory_is_short_for_who_is_left_the_error_says_so(model, tmp_path, pretend):
    short = DeviceOutOfMemory("cpu has too little memory")
    pretend({}, {"onnxruntime": short})
    measured = [Measured("openvino", "fp32", 0.3, None, "differs"), Measured("onnxruntime", "fp32", 0.5, GOOD, None, 1)]
    with raises_reason(DeviceOutOfMemory, "out-of-memory", names=("openvino: differs", "onnxruntime: cpu")):
        choose_fastest(wanted(tmp_path), model, measured=measured)


def test_another_setting_has_another_record(model, tmp_path, pretend):
    calls = pretend({"openvino": 0.5, "onnxruntime": 0.3, "eager": 4.0})
    choose_fastest(wanted(tmp_path), model)
    choose_fastest(wanted(tmp_path, roi=(64, 64, 96)), model)
    assert len(calls) == 6


def test_one_that_computes_something_else_is_never_chosen(model, tmp_path, pretend, caplog):
    pretend(
        {"openvino": 0.3, "onnxruntime": 0.5, "eager": 4.0},
        {"openvino": ParityFailed("too far", reason="differs"), "onnxruntime": GOOD},
    )
    with caplog.at_level(logging.WARNING):
        choice = choose_fastest(wanted(tmp_path), model)
    assert choice.backend == "onnxruntime"
    assert Measured("openvino", "fp32", 0.3, None, "too far", 1) in choice.measured
    assert "openvino fp32 is set aside: too far" in caplog.text


def test_one_that_cannot_be_made_leaves_the_others(model, tmp_path, pretend, caplog):
    failure = ExportFailed("an operation is unknown", reason="not-exportable")
    pretend({"openvino": failure, "onnxruntime": failure, "eager": 4.0})
    choice = choose_fastest(wanted(tmp_path), model)
    assert choice.backend == "eager"
    assert [entry.reason for entry in choice.measured] == ["an operation is unknown"] * 2 + [None]


@pytest.mark.parametrize(
    "failure",
    [
        BackendUnavailable("no onnx", reason="device-failed"),
        EngineMismatch("damaged", reason="stored-engine"),
        RuntimeError("no memory"),
    ],
)
def test_a_failure_that_may_pass_is_not_kept(model, tmp_path, pretend, failure):
    calls = pretend({"openvino": failure, "onnxruntime": failure, "eager": 4.0})
    assert choose_fastest(wanted(tmp_path), model).backend == "eager"
    assert not list(tmp_path.glob("choice-*"))
    choose_fastest(wanted(tmp_path), model)
    assert len(calls) == 6


def test_an_engine_of_other_networks_is_no_failure(model, tmp_path, pretend, caplog):
    calls = pretend({"openvino": NetworkNotTaken("SwinUNETR only"), "onnxruntime": 5.0, "eager": 4.0})
    for _ in range(2):
        choice = choose_fastest(wanted(tmp_path), model)
        assert choice.backend == "eager"
        assert choice.measured[0].reason == "SwinUNETR only"
    assert len(calls) == 3  # the choice is kept
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_where_every_engine_says_so_the_model_is_at_fault(model, tmp_path, pretend):
    failure = BundleInvalid("windows of 30", reason="weights")
    pretend({"openvino": failure, "onnxruntime": failure, "eager": failure})
    with raises_reason(BundleInvalid, "weights", names="windows of 30"):
        choose_fastest(wanted(tmp_path), model)


def test_a_choice_that_cannot_be_kept_is_still_a_choice(model, tmp_path, pretend, monkeypatch, caplog):
    def full(*_):
        raise StorageFull("the disk is full")

    pretend({"openvino": 0.5, "onnxruntime": 0.3, "eager": 4.0})
    monkeypatch.setattr(record, "write_atomically", full)
    assert choose_fastest(wanted(tmp_path), model).backend == "onnxruntime"
    assert "cannot store" in caplog.text


def test_nothing_to_compare_takes_no_time(model, tmp_path, monkeypatch, pretend):
    calls = pretend({})
    monkeypatch.setattr(selection, "backend_names", lambda *_: ("eager",))
    assert choose_fastest(wanted(tmp_path), model).backend == "eager"
    assert calls == []
    assert not list(tmp_path.iterdir())


def test_a_device_that_no_backend_has_is_named(model, tmp_path):
    with raises_reason(BackendUnavailable, "no-engine", names="fp16"):
        choose_fastest(wanted(tmp_path, precision="fp16"), model)


def test_an_engine_that_nobody_made_is_named_and_one_that_is_made_is_not(model, tmp_path, monkeypatch):
    names = [("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"), ("eager", "fp16"), ("eager", "fp32")]
    fitting = [wanted(tmp_path, name, precision=precision) for name, precision in names]
    monkeypatch.setattr(selection, "_fitting", lambda _: fitting)
    monkeypatch.setattr(selection, "is_prepared", lambda request, _: request.backend != "tensorrt-rtx")
    assert engines_not_made(wanted(tmp_path), model) == ("tensorrt-rtx",)


def test_on_a_cpu_no_engine_waits_to_be_made(model, tmp_path):
    assert engines_not_made(wanted(tmp_path), model) == ()
    assert engines_not_made(wanted(None), model) == ()
