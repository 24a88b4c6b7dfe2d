"""On GPUs: the same numbers as on the CPU, from upload to mask, and no wait inside the loops."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
import torch

from ctflow.core.errors import DeviceOutOfMemory
from ctflow.core.model import ModelSpec, NetworkSpec
from ctflow.core.shared_memory import SharedMemory
from ctflow.core.steps import Orient, Resample, ScaleRange
from ctflow.phantom import phantom_from_seed
from ctflow.transforms.postprocess import bytes_on_host, labels_from_probabilities, probabilities_from_logits
from ctflow.transforms.prepare import prepare_volume
from ctflow.transforms.restore import restore_slabs
from ctflow.transforms.upload import pin_for_gpus, uploaded
from ctflow.window.devices import Worker
from ctflow.window.predict import predict_volume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
STEPS = (Orient("RAS"), Resample((2.0, 2.0, 2.0)), ScaleRange(-1000, 400, 0.0, 1.0, True))


@contextmanager
def no_wait():
    """Fails where the host waits for a GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def spec_of(channels: int) -> ModelSpec:
    return ModelSpec(
        "m", "1", NetworkSpec("UNet", {}), 1, channels, STEPS, (32, 32, 32), 0.25, "gaussian", 1, "softmax", None, (),
        "", False,
    )  # fmt: skip


def network(windows):
    """Two channels that depend on the place inside the window."""
    place = torch.arange(windows[0, 0].numel(), device=windows.device).reshape(windows.shape[2:]) / 1000 % 1
    return torch.cat([windows * (1 + place) + place, windows - place], dim=1)


def devices() -> list[list[str]]:
    every = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [["cuda:0"], ["cuda:0", "cuda:0"], ["cuda:0", "cuda:0", "cuda:0"], every, [*every, "cpu"]]


def test_a_gpu_reads_shared_memory_that_it_has_pinned():
    torch.zeros(1, device="cuda")
    with closing(SharedMemory()) as memory:
        array = memory.allocate((64, 128, 128), np.int16)
        array[:] = np.random.default_rng(0).integers(-1000, 3000, array.shape)
        memory.pin(pin_for_gpus)
        assert torch.from_numpy(array).is_pinned()
        with no_wait():
            there = uploaded(array, torch.device("cuda"))
        assert (there.cpu().numpy() == array).all()
        assert pin_for_gpus(array.ctypes.data, array.nbytes) is None  # twice is refused, and harms nothing
        assert int((torch.ones(3, device="cuda") + 1).sum()) == 6
    assert not torch.from_numpy(array).is_pinned()


@pytest.mark.parametrize("blend", ["constant", "gaussian"])
def test_any_devices_equal_the_cpu(blend):
    volume = torch.rand(1, 1, 70, 61, 83)
    arguments = {"roi": (32, 24, 16), "overlap": 0.5, "blend": blend, "batch_size": 3}
    expected = predict_volume(volume, network, **arguments)
    for names in devices():
        workers = [Worker(network, torch.device(name)) for name in names]
        sources = [volume.to(names[0])] * 5 + [volume, volume.pin_memory()]  # streams and memory are taken again
        for source in sources:
            found = predict_volume(source, workers, **arguments)
            assert str(found.device) == names[0]
            assert float((found.cpu() - expected).abs().max()) < 1e-5, names


def test_nothing_waits_for_the_gpu_between_windows():
    """Before the first, the host asks once which of them hold a single value."""
    volume = torch.rand(1, 1, 70, 61, 83, device="cuda:0")
    with ExitStack() as stack:

        def predict(windows):
            stack.enter_context(no_wait())
            return network(windows)

        predict_volume(volume, predict, roi=(32, 24, 16), overlap=0.5, batch_size=3)


def test_padding_is_found_on_the_gpu_as_on_the_cpu():
    volume = torch.rand(1, 1, 70, 61, 83)
    volume[..., 40:] = -1.0
    volume[..., :20, :] = 0.5
    computed = {"cpu": 0, "cuda": 0}

    def predict(windows):
        computed[windows.device.type] += len(windows)
        return network(windows)

    arguments = {"roi": (16, 8, 8), "overlap": 0.5, "batch_size": 3}
    expected = predict_volume(volume, predict, **arguments)
    found = predict_volume(volume.to("cuda:0"), predict, **arguments)
    assert computed["cuda"] == computed["cpu"]
    assert float((found.cpu() - expected).abs().max()) < 1e-5


def test_memory_that_is_too_small_for_a_batch_halves_it():
    volume, told = torch.rand(1, 1, 64, 64, 64, device="cuda:0"), []

    def predict(windows):
        if len(windows) > 2:
            raise DeviceOutOfMemory("too little memory")
        return network(windows)

    arguments = {"roi": (32, 32, 32), "batch_size": 8}
    found = predict_volume(volume, predict, **arguments, on_halved=lambda *step: told.append(step))
    assert told == [(torch.device("cuda:0"), 8, 4), (torch.device("cuda:0"), 4, 2)]
    assert torch.allclose(found, predict_volume(volume, network, **arguments), atol=1e-5)


@pytest.mark.parametrize("channels", [2, 5])
def test_the_way_there_and_back_equals_the_cpus(channels):
    volume, spec, labels = phantom_from_seed(3, (40, 128, 128)).volume, spec_of(channels), []
    for device in ("cpu", "cuda:0"):
        prepared = prepare_volume(volume, STEPS, device)
        rng = np.random.default_rng(0)
        coarse = torch.from_numpy(rng.standard_normal((1, channels, 5, 6, 7), np.float32))
        logits = torch.nn.functional.interpolate(coarse, tuple(prepared.tensor.shape[2:]), mode="trilinear")
        probabilities = probabilities_from_logits(logits.to(device), spec)
        marked = torch.empty(volume.array.shape, dtype=torch.uint8, device=device)
        slabs = restore_slabs(prepared, probabilities)
        if device == "cpu":
            expected = prepared.tensor
        else:
            assert torch.allclose(prepared.tensor.cpu(), expected, atol=1e-5)
            with no_wait():
                slabs = [(rows, labels_from_probabilities(slab, spec)) for rows, slab in slabs]
        for rows, slab in slabs:
            marked[rows] = labels_from_probabilities(slab, spec) if device == "cpu" else slab
        labels.append(bytes_on_host(marked))
    assert labels[0].any()
    assert (labels[0] != labels[1]).mean() < 1e-5  # sums of floats in another order, at the threshold
