from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from ctflow.bench.loops import Windows, article_volume, resident_volume, stock_volume, two_channels
from ctflow.core.errors import DeviceOutOfMemory
from ctflow.core.model import ModelSpec, NetworkSpec
from ctflow.window.devices import Worker
from reasons import raises_reason

ROI = (16, 16, 16)
CPU = torch.device("cpu")


def spec_of(classes: int = 2, blend: str = "gaussian") -> ModelSpec:
    network = NetworkSpec("UNet", {})
    return ModelSpec("m", "1", network, 1, classes, (), ROI, 0.25, blend, 4, "softmax", None, (), "", False)


def network_of(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, classes, 3, padding=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def volume() -> torch.Tensor:
    return torch.randn(1, 1, 40, 24, 33, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def threads():
    with ExitStack() as stack:
        yield [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]


def workers_of(network: nn.Module, count: int = 1) -> list[Worker]:
    return [Worker(network, CPU) for _ in range(count)]


@pytest.mark.parametrize("overlap", [0.0, 0.25])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_articles_loop_marks_what_stock_marks_where_windows_do_not_meet(volume, threads, overlap, count):
    """It blends probabilities and MONAI logits: voxels may differ where windows overlap, and nowhere else."""
    network, windows = network_of(), Windows(overlap, 3)
    stock = stock_volume(Worker(network, CPU), volume, spec_of(), windows, half=False, stitch="cpu")
    article = article_volume(workers_of(network, count), volume, spec_of(), windows, threads, one_channel=False)
    assert article.dtype == np.uint8
    assert article.shape == (40, 24, 33)
    alone = np.s_[: 16 if overlap == 0 else 12, :8, : 16 if overlap == 0 else 12]  # in the first window only
    assert np.array_equal(article[alone], stock[alone])
    assert (article != stock).mean() < 0.02
    assert 0.1 < article.mean() < 0.9


def reusing(network: nn.Module, device: torch.device) -> Worker:
    """An engine whose answer is valid until its next call only."""
    buffer = torch.empty(0, device=device)

    def predict(windows: torch.Tensor) -> torch.Tensor:
        logits = network(windows)
        if buffer.numel() < logits.numel():
            buffer.resize_(logits.numel())
        return buffer[: logits.numel()].view(logits.shape).copy_(logits)

    return Worker(predict, device)


@pytest.mark.parametrize("one_channel", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_answers_are_taken_before_the_engine_overwrites_them(volume, threads, device, count, one_channel):
    windows, spec, place = Windows(0.25, 2), spec_of(), torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    networks = [network_of().to(place) for _ in range(count)]
    given = volume if place.type == "cpu" else volume.pin_memory()
    fresh = [Worker(network, place) for network in networks]
    kept = [reusing(network, place) for network in networks]
    expected = article_volume(fresh[:1], given, spec, windows, threads, one_channel=one_channel)
    found = article_volume(kept, given, spec, windows, threads, one_channel=one_channel)
    assert (found != expected).mean() < 1e-4  # threads change the order of sums


@pytest.mark.parametrize("blend", ["constant", "gaussian"])
def test_one_channel_says_what_both_say(volume, threads, blend):
    windows, workers = Windows(0.25, 4), workers_of(network_of())
    both = article_volume(workers, volume, spec_of(blend=blend), windows, threads, one_channel=False)
    one = article_volume(workers, volume, spec_of(blend=blend), windows, threads, one_channel=True)
    assert (both != one).mean() < 1e-4  # a probability of one half may fall either way


def test_threads_change_nothing_but_the_order_of_sums(volume, threads):
    windows, network = Windows(0.25, 2), network_of(3)
    single, several = (
        article_volume(workers_of(network, count), volume, spec_of(3), windows, threads, one_channel=False)
        for count in (1, 4)
    )
    assert set(np.unique(single)) == {0, 1, 2}
    assert (single != several).mean() < 1e-4


def test_ctflows_loop_marks_what_stock_marks(volume):
    windows, network = Windows(0.25, 4), network_of()
    stock = stock_volume(Worker(network, CPU), volume, spec_of(), windows, half=False, stitch="cpu")
    assert (resident_volume(workers_of(network, 2), volume, spec_of(), windows) != stock).mean() < 1e-4


def test_smaller_batches_than_asked_for_are_refused(volume):
    def scarce(windows: torch.Tensor) -> torch.Tensor:
        if len(windows) > 1:
            raise DeviceOutOfMemory("no memory")
        return network_of()(windows)

    with raises_reason(DeviceOutOfMemory, "out-of-memory", names="4 windows"):
        resident_volume([Worker(scarce, CPU)], volume, spec_of(), Windows(0.0, 4))


def test_a_folded_head_gives_both_channels_again():
    windows, network = torch.randn(2, 1, *ROI), network_of()
    logits = network(windows)
    folded = two_channels(lambda x: network(x)[:, 1:2] - network(x)[:, 0:1])
    assert torch.allclose(torch.softmax(folded(windows), 1), torch.softmax(logits, 1), atol=1e-6)
    assert torch.equal(two_channels(network)(windows), logits)


def test_an_error_in_a_thread_is_raised(volume, threads):
    def fail(windows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    broken = [*workers_of(network_of()), Worker(fail, CPU)]
    with pytest.raises(RuntimeError, match="no memory"):
        article_volume(broken, volume, spec_of(), Windows(0.0, 2), threads, one_channel=False)
