"""Devices that compute windows, several at the same time: each has a thread and a stream."""

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
Say = Callable[[Callable[[], None]], None]  # runs a function in the thread that waits for the devices


@dataclass(frozen=True, eq=False)
class Worker:
    """One device that computes windows.

    Attributes:
        predict: (B, C_in, *roi) -> (B, C_out, *roi), both float32 on the device; the result is read before the next
            call, on the stream of the call.
        device: torch device, with its index where there is one ("cuda:0").
        fewest: Windows that every call computes at least; smaller batches need no less memory.
    """

    predict: Predict
    device: torch.device
    fewest: int = 1


class _Stopped(Exception):
    """Ends the job of a worker whose result is no longer needed."""


@dataclass(frozen=True, eq=False)
class _Ended:
    """How a worker's thread ended: with a result or with an error."""

    index: int
    result: Tensor | None = None
    error: BaseException | None = None


def run_on_devices(devices: Sequence[torch.device], job: Callable[[int, Say], Tensor]) -> list[Tensor]:
    """Run a job on every device at the same time; a single device runs in the calling thread.

    Args:
        devices: The devices; the job's input lies on the first.
        job: Receives the device's number and a `Say`, which it calls after each batch. The calling thread runs the
            functions passed to `Say`, in order. If another device has failed, `Say` does not return and the job ends.

    Returns:
        Each job's tensor, finished and usable on the calling thread's streams.

    Raises:
        BaseException: The first error of a job or a function passed to `Say`, unchanged; no thread is left running.
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
        except BaseException as error:  # noqa: BLE001  # the calling thread raises it, whatever it is
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
    """Start the threads, run what they pass to `Say` and wait for all of them, whatever happens."""
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
    """The end of the work that the calling thread has queued on a device; None on the CPU, which is synchronous."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def _own_stream(
    device: torch.device, source: torch.device, ready: Mapping[torch.device, torch.cuda.Event | None]
) -> Iterator[None]:
    """Work on a device's own stream, after work queued on it and on the source; all is finished at the end."""
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
            # A copy between GPUs runs on this thread's stream of the source GPU.
            torch.cuda.current_stream(source).wait_event(first)
        try:
            yield
        finally:
            # Once per slab: afterwards nothing here still uses memory that another stream frees.
            stream.synchronize()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The device's stream, always the same, since torch does not share one stream's memory with others."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _handed_over(result: Tensor) -> Tensor:
    """The result of a thread's stream; the calling thread's stream may now use its memory."""
    if result.is_cuda:
        result.record_stream(torch.cuda.current_stream(result.device))
    return result
