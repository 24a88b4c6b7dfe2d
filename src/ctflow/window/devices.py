"""Who computes windows, and how several devices work at the same time: a thread and a stream each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
Say = Callable[[Callable[[], None]], None]  # has a function called in the thread that waits for the devices


@dataclass(frozen=True, eq=False)
class Worker:
    """One device that computes windows.

    Attributes:
        predict: (B, C_in, *roi) -> (B, C_out, *roi), both float32 on the device; the answer is read before the next
            call, and on the stream on which the call was made.
        device: torch device, with its index where there is one ("cuda:0").
        fewest: Windows that every call computes at least; fewer at once need no less memory.
    """

    predict: Predict
    device: torch.device
    fewest: int = 1


class _Stopped(Exception):
    """Ends the job of a worker whose result nobody waits for any more."""


@dataclass(frozen=True, eq=False)
class _Ended:
    """How a worker's thread ended: with a result or with an error."""

    index: int
    result: Tensor | None = None
    error: BaseException | None = None


def run_on_devices(devices: Sequence[torch.device], job: Callable[[int, Say], Tensor]) -> list[Tensor]:
    """Run a job on every device at the same time; one device alone is served by the calling thread.

    Args:
        devices: Where; what the job reads lies on the first.
        job: Given the device's number and a `Say`, which it calls after each batch. What it says is called in the
            calling thread, in order. When another device has failed, `Say` does not return and the job ends.

    Returns:
        Each job's tensor, finished and fit for the calling thread's streams.

    Raises:
        BaseException: The first error of a job or of something said, as it is; no thread is left running then.
    """
    if len(devices) == 1:
        return [job(0, _at_once)]
    messages: SimpleQueue[Callable[[], None] | _Ended] = SimpleQueue()
    stop = threading.Event()
    ready = {device: _mark(device) for device in devices}

    def say(action: Callable[[], None]) -> None:
        if stop.is_set():
            raise _Stopped
        messages.put(action)

    def work(index: int) -> None:
        try:
            with _own_stream(devices[index], devices[0], ready):
                ended = _Ended(index, job(index, say))
        except BaseException as error:  # noqa: BLE001  # whatever it is, the calling thread raises it
            ended = _Ended(index, error=error)
        messages.put(ended)

    threads = [
        threading.Thread(target=work, args=(index,), name=f"windows on {device}")
        for index, device in enumerate(devices)
    ]
    return [_handed_over(result) for result in _results(threads, messages, stop)]


def _at_once(action: Callable[[], None]) -> None:
    action()


def _results(
    threads: Sequence[threading.Thread], messages: SimpleQueue[Callable[[], None] | _Ended], stop: threading.Event
) -> list[Tensor]:
    """Start the threads, do what they say and wait for all of them, whatever happens."""
    results: dict[int, Tensor] = {}
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        while len(results) < len(threads):
            message = messages.get()
            if not isinstance(message, _Ended):
                message()
            elif message.error is not None:
                raise message.error
            elif message.result is not None:
                results[message.index] = message.result
    finally:
        stop.set()
        for thread in started:
            thread.join()
    return [results[index] for index in range(len(threads))]


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """The end of what the calling thread has asked of a device so far; None on the CPU, which does it at once."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def _own_stream(
    device: torch.device, source: torch.device, ready: Mapping[torch.device, torch.cuda.Event | None]
) -> Iterator[None]:
    """Work on a device's own stream, after what was asked of it and of the source; all is finished at the end."""
    marks = [mark for mark in (ready[source], ready[device]) if mark is not None]
    if device.type != "cuda":
        for mark in marks:
            mark.synchronize()
        yield
        return
    stream = _stream_of(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for mark in marks:
            stream.wait_event(mark)
        first = ready[source]
        if first is not None:
            # A copy between GPUs runs on this thread's stream of the GPU it comes from.
            torch.cuda.current_stream(source).wait_event(first)
        try:
            yield
        finally:
            # Once a slab: afterwards no memory that another stream frees is still being used here.
            stream.synchronize()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Always the same, since torch keeps the memory of one stream from the others."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _handed_over(result: Tensor) -> Tensor:
    """The result of a thread's stream, whose memory the calling thread's stream may now use."""
    if result.is_cuda:
        result.record_stream(torch.cuda.current_stream(result.device))
    return result
