"""Engines that are compared with PyTorch on the first CT; here windows are the reference's logits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, ParityFailed
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.core.steps import ScaleRange
from ctflow.core.volume import Geometry, Volume
from ctflow.engines.contract import COSTS
from ctflow.engines.request import EngineRequest, info_of
from ctflow.export import measure, selection
from ctflow.export.figures import ParityResult
from ctflow.pipeline import opened
from ctflow.pipeline.opened import _text_of_devices
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from reasons import raises_reason

ROI = (16, 16, 16)
NAMED = Settings(device="cpu", cache=None, engine="openvino")


@pytest.fixture(scope="module")
def model() -> Model:
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
    scale = ScaleRange(-1000.0, 1000.0, -1.0, 1.0, clip=True)
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", arguments), 1, 2, (scale,), ROI, 0.25, "gaussian", 2, "softmax", None, (), "",
        False,
    )  # fmt: skip
    return Model(spec, {}, "d" * 64)


@pytest.fixture(scope="module")
def ct() -> Volume:
    values = np.random.default_rng(0).integers(-1000, -200, (32, 32, 32), dtype=np.int16)
    values[4:20, 4:20, 4:20] += 1100
    return Volume(values, Geometry(values.shape, np.diag([2.0, 2.0, 2.0, 1.0])))


@pytest.fixture
def machine(monkeypatch):
    """A machine on which each backend computes what is said here, and PyTorch in fp32 gives windows as they are."""

    class Machine:
        def __init__(self):
            self.computes, self.opened, self.closed, self.references = {}, [], [], []
            self.out_of_memory = False
            self.fitting = None  # how many engines fit into the device

        def open_engine(self, request, model, *, without=()):
            name, device = request.backend, request.device
            names = [name] if name != "auto" else [each for each in self.computes if each not in without]
            if not names:
                raise BackendUnavailable("no engine is left", reason="device-failed")
            if self.fitting is not None and len(self.opened) - len(self.closed) >= self.fitting:
                raise DeviceOutOfMemory(f"{device} has too little memory for the network")
            taken = replace(request, backend=names[0], precision=request.precision or "fp32")
            info = info_of(taken, model, 1, {})
            self.opened.append((info.backend, device))
            return Engine(self.computes[names[0]], info, self.closed)

        def reference_logits(self, model, windows, device):
            self.references.append(len(windows))
            if self.out_of_memory:
                raise DeviceOutOfMemory("cpu has too little memory for 1 window")
            return [window.clone() for window in windows]

    found = Machine()
    monkeypatch.setattr(opened, "open_engine", found.open_engine)
    monkeypatch.setattr(opened, "prepare_to_open", lambda *_, **__: None)
    monkeypatch.setattr(opened, "check_engine", lambda *_: None)
    monkeypatch.setattr(opened, "reference_logits", found.reference_logits)
    return found


class Engine:
    def __init__(self, function, info, closed) -> None:
        self._function, self.info, self._closed = function, info, closed

    def predict(self, windows):
        return self._function(windows)

    def close(self) -> None:
        self._closed.append(self.info.backend)


def right(windows):
    return windows * 1.001


def wrong(windows):
    return windows.flip(2)


def test_the_first_ct_is_compared_and_later_ones_carry_its_figures(model, ct, machine, tmp_path):
    machine.computes = {"openvino": right}
    settings = replace(NAMED, cache=tmp_path)
    with Segmenter(model, settings) as segmenter:
        (first, seconds), (second, later) = segmenter.segment(ct), segmenter.segment(ct)
    assert machine.references == [4]
    assert (first.agreement.windows, first.agreement.of) == (4, 27)
    assert 0.99 < first.agreement.dice <= 1
    assert 0 < first.agreement.relative_error < 2e-3
    assert (first.agreement.series, first.agreement.judged, first.agreement.kept) == ("this series", "labels", True)
    assert second.agreement == replace(first.agreement, series="an earlier series")
    assert "compare" in seconds
    assert "compare" not in later
    assert np.array_equal(first.labels, second.labels)
    assert first.labels.any()
    with Segmenter(model, settings) as another_process:
        third, _ = another_process.segment(ct)
    assert third.agreement == second.agreement
    assert machine.references == [4]
    assert np.array_equal(first.labels, third.labels)


@pytest.mark.parametrize("cache", [None, "file/cache"])
def test_where_nothing_can_be_kept_each_process_compares_and_says_so(model, ct, machine, tmp_path, cache):
    (tmp_path / "file").touch()
    machine.computes = {"openvino": right}
    for _ in range(2):
        with Segmenter(model, replace(NAMED, cache=cache and tmp_path / cache)) as segmenter:
            first, second = segmenter.segment(ct)[0], segmenter.segment(ct)[0]
        assert (first.agreement.kept, first.agreement.series) == (False, "this series")
        assert (second.agreement.kept, second.agreement.series) == (False, "an earlier series")
    assert machine.references == [4, 4]


def test_pytorch_in_fp32_is_not_compared_with_itself(model, ct, machine):
    machine.computes = {"eager": right}
    with Segmenter(model, replace(NAMED, engine="eager")) as segmenter:
        found, _ = segmenter.segment(ct)
    assert (found.agreement, machine.references) == (None, [])
    with Segmenter(model, replace(NAMED, engine="eager", precision="bf16")) as segmenter:
        assert segmenter.segment(ct)[0].agreement.engine == "eager bf16"


def test_what_fp8_costs_is_in_every_result_and_in_no_others(model, ct, machine):
    machine.computes = {"fused": right}
    settings = Settings(device="cpu", cache=None, engine="fused", precision="fp8")
    with Segmenter(model, settings) as segmenter:
        assert segmenter.warnings == (f"fp8: {COSTS['fp8']}",)
        assert segmenter.segment(ct)[0].agreement.engine == "fused fp8"
    with Segmenter(model, replace(settings, precision="fp16")) as segmenter:
        assert segmenter.warnings == ()


def test_a_named_engine_that_differs_fails_the_case_and_is_compared_on_every_ct(model, ct, machine, tmp_path):
    machine.computes = {"openvino": wrong}
    with Segmenter(model, replace(NAMED, cache=tmp_path)) as segmenter:
        for _ in range(2):
            with raises_reason(ParityFailed, "differs", names=("openvino fp32", "4 windows")):
                segmenter.segment(ct)
        machine.computes["openvino"] = right  # on another CT, say
        segmenter._engines[0]._function = right
        for _ in range(2):
            assert segmenter.segment(ct)[0].agreement.kept is False
    assert machine.references == [4] * 4


def test_without_a_cache_auto_goes_on_with_the_next_engine(model, ct, machine, caplog):
    machine.computes = {"fused": wrong, "eager": right}
    told = []
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        found, _ = segmenter.segment(ct, meanwhile=lambda: told.append("meanwhile"))
        again, _ = segmenter.segment(ct)
    assert (found.engine.backend, found.agreement) == ("eager", None)
    (warning,) = found.warnings
    assert "fused fp32 did not agree with PyTorch on this CT; it was computed again with eager fp32" in warning
    assert warning in caplog.text
    assert again.warnings == ()
    assert np.array_equal(found.labels, again.labels)
    assert found.labels[10, 10, 10] == 1, "the next engine's mask"
    assert told == ["meanwhile"]
    assert machine.closed == ["fused", "eager"]
    assert len(machine.references) == 1


def test_where_no_engine_is_left_the_case_fails_and_the_engine_stays_open(model, ct, machine):
    machine.computes = {"fused": wrong}
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        for _ in range(2):
            with raises_reason(ParityFailed, "differs", names="fused fp32"):
                segmenter.segment(ct)
        assert len(segmenter._engines) == 1


def test_the_next_engine_is_opened_once_the_device_holds_nothing_of_the_one_that_failed(model, ct, machine):
    machine.computes, machine.fitting = {"fused": wrong, "compile": wrong, "eager": right}, 1
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        found, _ = segmenter.segment(ct)
    assert found.engine.backend == "eager"
    assert machine.closed == ["fused", "compile", "eager"]


def test_what_torch_caches_is_freed_before_the_next_engine_is_opened(model, machine, monkeypatch):
    order = []
    machine.computes = {"fused": wrong, "eager": right}
    monkeypatch.setattr(opened, "devices_from_setting", lambda _: ("cuda:0", "cuda:1"))
    monkeypatch.setattr(opened, "free_cached_memory", lambda: order.append((list(machine.closed), len(machine.opened))))
    engines = opened.OpenEngines(model, Settings(cache=None))
    engines.open()
    engines.take_next(ParityFailed("differs", reason="differs"), lambda *_: None)
    assert order == [(["fused", "fused"], 2)], "after both were closed, before another is opened"
    assert [engine.info.device for engine in engines.engines] == ["cuda:0", "cuda:1"]


def test_too_little_memory_for_the_next_engine_is_said_as_such_and_the_series_may_be_tried_again(model, ct, machine):
    machine.computes = {"fused": wrong, "eager": right}
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        machine.fitting = 0  # another program took it
        for _ in range(2):
            with raises_reason(DeviceOutOfMemory, "out-of-memory"):
                segmenter.segment(ct)
        machine.fitting = 1
        found, _ = segmenter.segment(ct)
        assert (found.engine.backend, found.warnings) == ("eager", ())
        segmenter.segment(ct)
    assert machine.opened == [("fused", "cpu"), ("eager", "cpu")]
    with pytest.raises(ValueError, match="open the segmenter"):
        segmenter.segment(ct)


def test_who_failed_is_opened_again_where_memory_was_short_and_no_engine_is_left(model, ct, machine):
    machine.computes = {"fused": wrong, "eager": right}
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        machine.fitting = 0
        with raises_reason(DeviceOutOfMemory, "out-of-memory"):
            segmenter.segment(ct)
        machine.fitting = 1
        del machine.computes["eager"]
        with raises_reason(ParityFailed, "differs", names="fused fp32"):
            segmenter.segment(ct)
        machine.computes["fused"] = right
        segmenter._engines[0]._function = right
        assert segmenter.segment(ct)[0].engine.backend == "fused"


def test_a_choice_that_fails_on_a_ct_is_withdrawn_for_good(model, ct, machine, tmp_path, monkeypatch):
    machine.computes = {"openvino": wrong, "onnxruntime": right, "eager": right}
    seconds = {"openvino": 0.3, "onnxruntime": 0.5, "eager": 4.0}
    timed = []

    def timing(request, *_):
        timed.append(request.backend)
        return seconds[request.backend]

    monkeypatch.setattr(selection, "prepare_to_open", lambda *_, **__: None)
    monkeypatch.setattr(measure, "_seconds_a_window", timing)
    monkeypatch.setattr(measure, "example_windows", lambda *_: [torch.zeros(1)])
    monkeypatch.setattr(measure.ParityGate, "_parity", lambda *_: ParityResult(1e-5, 1.0, 4, "labels"))
    settings = Settings(device="cpu", cache=tmp_path)
    with Segmenter(model, settings) as segmenter:
        assert segmenter._engines[0].info.backend == "openvino"
        found, _ = segmenter.segment(ct)
    assert (found.engine.backend, found.agreement.engine) == ("onnxruntime", "onnxruntime fp32")
    assert found.agreement.series == "this series"
    assert "openvino fp32" in found.warnings[0]
    assert sorted(timed) == sorted(seconds), "nothing is timed twice"
    (path,) = tmp_path.glob("choice-*.json")
    kept = json.loads(path.read_text())
    assert kept["backend"] == "onnxruntime"
    (entry,) = [entry for entry in kept["measured"] if entry["backend"] == "openvino"]
    assert "differs from PyTorch in fp32 on 4 windows" in entry["reason"]
    machine.references.clear()
    with Segmenter(model, settings) as another_process:
        again, _ = another_process.segment(ct)
    assert (again.engine.backend, again.warnings, machine.references) == ("onnxruntime", (), [])
    assert np.array_equal(found.labels, again.labels), "the same SEG, whoever came first"


def test_an_engine_that_failed_on_a_ct_is_not_chosen_where_engines_are_measured_anew(model, machine, tmp_path):
    machine.computes = {"openvino": right}
    info = machine.open_engine(EngineRequest("openvino", "cpu", "fp32", ROI, (1, 2)), model).info
    agreements = opened.Agreements(model, tmp_path)
    agreements.refuse([info])
    gate = measure.ParityGate.__new__(measure.ParityGate)
    gate.model, gate._agreements, gate._logits_only, gate.windows, gate._expected = model, agreements, False, [], None
    with raises_reason(ParityFailed, "differed-on-ct"):
        gate.check(Engine(right, info, []))


def test_every_device_is_compared(model, ct, machine, monkeypatch):
    monkeypatch.setattr(opened, "devices_from_setting", lambda _: ("cpu", "cpu"))
    turns = iter([right, wrong])
    machine.computes = {"openvino": None}
    with Segmenter(model, NAMED) as segmenter:
        for engine in segmenter._engines:
            engine._function = next(turns)
        with raises_reason(ParityFailed, "differs"):
            segmenter.segment(ct)
        segmenter._engines[1]._function = lambda windows: windows + 4e-3
        found, _ = segmenter.segment(ct)
    assert found.agreement.relative_error > 3e-3, "the worst of both"


def test_too_little_memory_for_pytorch_is_told_and_costs_no_case(model, ct, machine):
    machine.computes, machine.out_of_memory = {"openvino": right}, True
    with Segmenter(model, NAMED) as segmenter:
        found, _ = segmenter.segment(ct)
    assert found.agreement is None
    assert found.warnings[0].startswith(
        "the engine was not compared with PyTorch on this CT: cpu has too little memory"
    )


def test_logits_that_are_not_finite_are_the_engines_fault_first(model, ct, machine):
    """An overflow in half precision: the next engine computes the case."""
    machine.computes = {"fused": lambda windows: windows * torch.nan, "eager": right}
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        assert segmenter.segment(ct)[0].engine.backend == "eager"


def test_random_weights_are_judged_by_their_logits(model, ct, machine):
    def undecided(windows):
        return windows - 1e-3 * torch.sign(windows) * (windows.abs() < 2e-3)

    machine.computes = {"openvino": undecided}
    with Segmenter(model, NAMED, logits_only=True) as segmenter:
        assert segmenter.segment(ct)[0].agreement.judged == "logits"


def test_a_ct_where_nothing_is_segmented_has_no_dice(model, ct, machine):
    machine.computes = {"openvino": right}
    air = replace(ct, array=np.minimum(ct.array, -200))
    with Segmenter(model, NAMED) as segmenter:
        found, _ = segmenter.segment(air)
    assert not found.labels.any()
    assert (found.agreement.dice, found.agreement.judged, found.agreement.windows) == (None, "logits", 4)


def test_a_ct_of_one_window_compares_that(model, machine):
    machine.computes = {"openvino": right}
    small = np.full((8, 12, 12), -500, np.int16)
    with Segmenter(model, NAMED) as segmenter:
        found, _ = segmenter.segment(Volume(small, Geometry(small.shape, np.eye(4))))
    assert (found.agreement.windows, found.agreement.of) == (1, 1)


def test_devices_are_named_as_on_the_command_line():
    assert _text_of_devices(["cuda:1"]) == "cuda:1"
    assert _text_of_devices(["cuda:0", "cuda:2", "cuda:3"]) == "cuda:0,2,3"
