"""A TensorRT build seen from outside: its steps, and Ctrl-C, which ends it at the next step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class BuildWatch:
    """Reports the steps of builds and stops them.

    Args:
        runtime: The module of TensorRT or TensorRT-RTX.
        report: Receives the outermost phase as steps done of steps to do; what it raises stops the build.
    """

    def __init__(self, runtime: Any, report: Callable[[int, int], None]) -> None:
        self._runtime, self._report = runtime, report
        self._stopped: BaseException | None = None
        self._building = False

    def monitor(self) -> Any:
        """A progress monitor for the configuration of one build, which begins now.

        Raises:
            KeyboardInterrupt: A signal came since the build before.
        """
        if self._stopped is not None:
            raise self._stopped
        self._building = True
        runtime: Any = self._runtime
        watch = self

        class Steps(runtime.IProgressMonitor):  # type: ignore[misc]  # the class is known at run time only
            """The builder's outermost phase."""

            def __init__(self) -> None:
                runtime.IProgressMonitor.__init__(self)
                self.phase, self.total = "", 1

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                if parent is None:
                    self.phase, self.total = phase, max(steps, 1)

            def step_complete(self, phase: str, step: int) -> bool:
                if phase == self.phase:
                    watch._step(min(step, self.total), self.total)
                return watch._stopped is None

            def phase_finish(self, phase: str) -> None:
                """Do nothing: the next phase or the end reports progress."""

        return Steps()

    def _step(self, done: int, total: int) -> None:
        if self._stopped is None:
            try:
                self._report(done, total)
            except BaseException as error:  # noqa: BLE001  # kept, and raised when the builder has stopped
                self._stopped = error

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run builds in this block; afterwards raise what stopped them.

        TensorRT's C++ code discards exceptions of its callbacks, the logger's too, and Python handles a signal as soon
        as any of them begins, before a `try` in it. So from the first build on, what a signal's handler raises is kept
        until the next step. Before, it is raised at once.

        Raises:
            KeyboardInterrupt: A signal stopped the build, or `report`.
        """
        undo = self._wrap_handlers() if threading.current_thread() is threading.main_thread() else {}
        try:
            yield
        except Exception as error:
            if self._stopped is not None:
                raise self._stopped from error
            raise
        finally:
            for number, before in undo.items():
                signal.signal(number, before)
        if self._stopped is not None:
            raise self._stopped

    def _wrap_handlers(self) -> dict[signal.Signals, Callable[[int, FrameType | None], Any]]:
        """Keep what handlers raise; returns the handlers before."""
        undo = {}
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, self._kept(before))
                undo[number] = before
        return undo

    def _kept(self, handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                if not self._building:
                    raise
                self._stopped = self._stopped or error

        return handle
