"""torch's switches of arithmetic, which belong to the whole process, for calls of several threads at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ctflow.engines.contract import Precision

_SwitchValues = tuple[bool, bool, bool]  # tf32 of products, tf32 of cuDNN, determinism of cuDNN


class _Switches:
    """Who computes with which switches: the first call sets them, the last one puts them back."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._calls = 0
        self._wanted = self._before = (False, False, False)

    def enter(self, wanted: _SwitchValues) -> None:
        # Who waits here holds the turn, so that calls with the other setting cannot overtake it for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._calls or self._wanted == wanted)
            if not self._calls:
                self._before, self._wanted = _values(), wanted
                _set(wanted)
            self._calls += 1

    def leave(self) -> None:
        with self._changed:
            self._calls -= 1
            if not self._calls:
                _set(self._before)
                self._changed.notify_all()


@contextmanager
def switches(precision: Precision) -> Iterator[None]:
    """tf32 only for the calls inside that ask for it, and the same result each time; afterwards all is as before.

    Calls of several threads overlap where they want the same; else the later one waits. Not to be nested.

    Args:
        precision: Number format of the heavy arithmetic.
    """
    tf32 = precision == "tf32"
    # cuDNN's transposed convolutions in fp32 sum in another order each time, and the SEG must be the same file.
    _SHARED.enter((tf32, tf32, True))
    try:
        yield
    finally:
        _SHARED.leave()


def _values() -> _SwitchValues:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic


def _set(values: _SwitchValues) -> None:
    cudnn = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = values


_SHARED = _Switches()
