"""CUDA graphs: a function's GPU launches are recorded, so that a later call launches all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
BatchFunction = Callable[[Tensor], Tensor]
# torch allows one capture at a time in a process, and its allocator must not be emptied meanwhile.
_CAPTURING = threading.Lock()


def free_cached_memory() -> None:
    """Release GPU memory that torch caches but does not use to others, such as TensorRT."""
    with _CAPTURING:
        torch.cuda.empty_cache()


def capture(run: Callable[[], _T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _T]:
    """Capture a function's launches on the current GPU; other threads' captures wait until this one ends.

    Args:
        run: Launches on the current stream, and reads and writes tensors that stay where they are. Called twice: the
            first call chooses kernels and allocates lasting memory, which a capture must not do.
        pool: Memory of an earlier graph (`graph.pool()`) that never runs at the same time as this one, to be shared.

    Returns:
        The graph, not yet replayed, and what `run` returned in it: tensors that each replay fills.
    """
    with _CAPTURING:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        aside.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            result = run()
    return graph, result


class CapturedFunction:
    """A function of one tensor, captured at the first call with each shape. One thread at a time may call it.

    Args:
        function: Computes a tensor from a tensor on the current GPU, with the same launches each time.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graphs: dict[tuple[int, ...], tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, given: Tensor) -> Tensor:
        """The function's result, on the current stream; the buffer is valid until the next call."""
        shape = tuple(given.shape)
        if shape not in self._graphs:
            self._graphs[shape] = self._captured(given)
        kept, graph, answer = self._graphs[shape]
        kept.copy_(given, non_blocking=True)
        graph.replay()
        return answer

    def _captured(self, given: Tensor) -> tuple[Tensor, torch.cuda.CUDAGraph, Tensor]:
        """The fixed input, the graph, and the output that it fills; all graphs share one memory pool."""
        pool = next((graph.pool() for _, graph, _ in self._graphs.values()), None)
        with torch.cuda.device(given.device):
            kept = torch.empty(given.shape, dtype=given.dtype, device=given.device)
            kept.copy_(given)
            return kept, *capture(lambda: self._function(kept), pool)
