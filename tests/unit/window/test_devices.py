"""Several devices give what one gives; the devices are all the CPU here (GPUs: test_gpu_pipeline.py)."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference

from ctflow.core.errors import DeviceOutOfMemory
from ctflow.window.devices import Worker, run_on_devices
from ctflow.window.predict import predict_volume

CPU = torch.device("cpu")


def network(windows):
    """Depends on the place inside the window; two channels."""
    place = torch.linspace(-1, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
    return torch.cat([windows[:, :1] * (1 + place) + place, windows.sum(dim=1, keepdim=True) - place], dim=1)


def workers(count: int, predict=network) -> list[Worker]:
    return [Worker(predict, CPU) for _ in range(count)]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 23)] * 3),
    roi=st.tuples(*[st.integers(1, 12)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    blend=st.sampled_from(["constant", "gaussian"]),
    channels=st.integers(1, 2),
    batch_size=st.integers(1, 5),
    count=st.sampled_from([1, 2, 3, 5, 40]),
)
def test_any_number_of_devices_equals_one_and_monai(size, roi, overlap, blend, channels, batch_size, count):
    volume = torch.from_numpy(np.random.default_rng(0).standard_normal((1, channels, *size), dtype=np.float32))
    arguments = {"roi": roi, "overlap": overlap, "blend": blend, "batch_size": batch_size}
    found = predict_volume(volume, workers(count), **arguments)
    one = predict_volume(volume, network, **arguments)
    theirs = sliding_window_inference(volume, roi, batch_size, network, overlap=overlap, mode=blend)
    assert found.shape == theirs.shape == (1, 2, *size)
    assert torch.allclose(found, one, atol=1e-5, rtol=1e-5)  # slabs are added in another order
    assert torch.allclose(found, theirs, atol=1e-5, rtol=1e-5)


def test_each_device_gets_a_contiguous_share_of_equal_size():
    seen: dict[str, list[float]] = {}

    def remember(windows):
        seen.setdefault(threading.current_thread().name, []).extend(float(w[0, 0, 0, 0]) for w in windows)
        return windows

    volume = torch.arange(10.0)[None, None, :, None, None].expand(1, 1, 10, 4, 4)
    named = [
        Worker(lambda w, n=n: (threading.current_thread().__setattr__("name", n), remember(w))[1], CPU) for n in "abc"
    ]
    predict_volume(volume, named, roi=(2, 2, 2), overlap=0.0, batch_size=2)
    assert {name: len(values) for name, values in seen.items()} == {"a": 6, "b": 7, "c": 7}
    assert [value for name in "abc" for value in seen[name]] == [n for n in (0, 2, 4, 6, 8) for _ in range(4)]


def test_progress_is_told_in_the_calling_thread_in_order():
    steps, threads = [], set()

    def progress(*step):
        steps.append(step)
        threads.add(threading.current_thread())

    predict_volume(torch.rand(1, 1, 8, 8, 8), workers(3), roi=(4, 4, 4), overlap=0, batch_size=1, progress=progress)
    assert steps == [("segment", n, 8) for n in range(9)]
    assert threads == {threading.current_thread()}


def test_the_first_error_stops_the_others_at_their_next_batch_and_is_raised_as_it_is():
    error, failed, calls = RuntimeError("the first"), threading.Event(), []

    def fails(_windows):
        failed.set()
        raise error

    def waits(windows):
        calls.append(len(windows))
        assert failed.wait(10)
        time.sleep(0.001)  # lets the failing thread say so, on however busy a machine
        return windows

    with pytest.raises(RuntimeError) as caught:
        predict_volume(
            torch.zeros(1, 1, 40_000, 1, 1),
            [Worker(waits, CPU), Worker(fails, CPU), Worker(waits, CPU)],
            roi=(1, 1, 1),
            overlap=0,
            blend="constant",
            batch_size=1,
        )
    assert caught.value is error
    assert len(calls) < 13_000, "the others did not go through all their windows"


def test_an_interrupt_in_progress_stops_the_workers():
    calls = []

    def predict(windows):
        calls.append(len(windows))
        return windows

    def progress(_stage, done, _total):
        if done:
            raise KeyboardInterrupt

    volume = torch.zeros(1, 1, 40_000, 1, 1)
    with pytest.raises(KeyboardInterrupt):
        predict_volume(
            volume, workers(2, predict), roi=(1, 1, 1), overlap=0, blend="constant", batch_size=1, progress=progress
        )
    assert 1 <= len(calls) < 20_000


def test_each_device_halves_its_own_batch_and_says_so_in_the_calling_thread():
    told, threads = [], set()

    def small(windows):
        if len(windows) > 2:
            raise DeviceOutOfMemory("too little memory")
        return windows

    def on_halved(device, tried, left):
        told.append((str(device), tried, left))
        threads.add(threading.current_thread())

    volume = torch.rand(1, 1, 64, 4, 4)
    both = [Worker(lambda windows: windows, CPU), Worker(small, CPU)]
    found = predict_volume(volume, both, roi=(4, 4, 4), overlap=0, batch_size=8, on_halved=on_halved)
    assert told == [("cpu", 8, 4), ("cpu", 4, 2)]
    assert threads == {threading.current_thread()}
    assert torch.allclose(found, volume)


def test_no_worker_is_a_programming_mistake():
    with pytest.raises(ValueError, match="first worker"):
        predict_volume(torch.zeros(1, 1, 8, 8, 8), [], roi=(4, 4, 4))
    with pytest.raises(ValueError, match="first worker"):
        predict_volume(torch.zeros(1, 1, 8, 8, 8, device="meta"), [Worker(network, CPU)], roi=(4, 4, 4))


def test_a_thread_that_cannot_start_leaves_none_behind(monkeypatch):
    start, started = threading.Thread.start, []

    def refuse(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        run_on_devices([CPU, CPU], lambda index, say: torch.zeros(1))
