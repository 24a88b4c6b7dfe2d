from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from ctflow.core.errors import BundleInvalid
from ctflow.engines import eager
from ctflow.engines.contract import EngineInfo
from ctflow.engines.eager import EagerEngine
from ctflow.engines.hardware import switches

ROI = (2, 2, 2)
WINDOW = torch.zeros(1, 1, *ROI)


def current() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic


@pytest.fixture(autouse=True)
def as_before():
    before = current()
    yield
    assert current() == before


class Watched(nn.Module):
    """Records the switches when it is entered and when it goes on, which it does when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.seen = []
        self.error = error

    def forward(self, windows):
        self.seen.append(current())
        self.entered.set()
        assert self.go_on.wait(10)
        self.seen.append(current())
        if self.error is not None:
            raise self.error
        return windows


class Running:
    """An engine that computes in a thread of its own."""

    def __init__(self, precision: str, error: Exception | None = None) -> None:
        self.network = Watched(error)
        engine = EagerEngine(self.network, EngineInfo("eager", precision, "cpu", ROI, (1, 1), "d" * 64, 1))
        self.failure = None
        self.thread = threading.Thread(target=self.run, args=(engine,), daemon=True)
        self.thread.start()

    def run(self, engine):
        try:
            engine.predict(WINDOW)
        except Exception as error:
            self.failure = error

    def entered(self, seconds=10.0) -> bool:
        return self.network.entered.wait(seconds)

    def finish(self):
        self.network.go_on.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_calls_of_one_setting_overlap_and_the_last_one_puts_it_back():
    first, second = Running("fp32"), Running("bf16")
    assert first.entered()
    assert second.entered()
    first.finish()
    assert current() == (False, False, True)  # the second still computes
    second.finish()
    assert first.network.seen == second.network.seen == [(False, False, True)] * 2


@pytest.mark.parametrize(("early", "late"), [("fp32", "tf32"), ("tf32", "fp32")])
def test_calls_of_another_setting_wait(early, late):
    first = Running(early)
    assert first.entered()
    second = Running(late)
    assert not second.entered(0.2)
    first.finish()
    assert second.entered()
    second.finish()
    for running, precision in ((first, early), (second, late)):
        assert running.network.seen == [(precision == "tf32", precision == "tf32", True)] * 2


def test_who_waits_is_not_overtaken():
    first = Running("fp32")
    assert first.entered()
    second = Running("tf32")
    assert not second.entered(0.2)
    third = Running("fp32")
    assert not third.entered(0.2)
    first.finish()
    assert second.entered()
    assert not third.entered(0.2)
    second.finish()
    assert third.entered()
    third.finish()
    assert third.network.seen == [(False, False, True)] * 2


def test_a_call_that_fails_puts_the_switches_back_and_lets_others_go_on():
    first = Running("fp32", ValueError("no such window"))
    assert first.entered()
    second = Running("tf32")
    first.finish()
    assert isinstance(first.failure, BundleInvalid)
    assert second.entered()
    second.finish()
    assert second.failure is None


def test_an_error_inside_puts_the_switches_back():
    before = current()
    with pytest.raises(KeyboardInterrupt), switches("tf32"):
        assert current() == (True, True, True)
        raise KeyboardInterrupt
    assert current() == before


def test_what_the_caller_had_set_is_put_back():
    torch.backends.cudnn.deterministic = True
    try:
        with switches("fp32"):
            pass
        assert torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.deterministic = False


def test_many_threads_see_only_their_own_setting():
    wrong = []

    def work(precision):
        for _ in range(200):
            with switches(precision):
                if current() != (precision == "tf32", precision == "tf32", True):
                    wrong.append(precision)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("fp32", "tf32", "fp16", "tf32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong


def test_what_auto_tries():
    assert eager.precisions("cpu") == ("fp32",)
    assert eager.precisions("cuda:1") == ("fp16", "fp32")
    assert eager.FILE is None
