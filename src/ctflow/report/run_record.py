"""OUT/result.json from a run's start to its end: an earlier run's document never looks like this one's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctflow.core.atomic import make_output_folder, supersede_folder
from ctflow.core.errors import EXIT_INTERRUPTED, CtflowError, OutputError, Unexpected
from ctflow.report.result import run_result, write_result

_MOVED = "an earlier result of this series is no longer valid and was moved to .superseded"
_NOT_MOVED = "the folder of this series is from an earlier run, is no longer valid and could not be moved"

log = logging.getLogger(__name__)


class RunRecord:
    """The document of one run while it lasts.

    Args:
        output: The output folder.

    Attributes:
        describe: Set once the series are known: returns the document of a run that ends with the error in its argument
            (`error_facts`).
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._path = output / "result.json"
        self.describe: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def begin(self) -> None:
        """Record that a run has begun, in place of an earlier run's document.

        Raises:
            OutputError: The folder cannot be written. An earlier run's document is then removed, if possible.
        """
        make_output_folder(self._output)
        try:
            write_result(_document("running", None), self._path)
        except OutputError:
            with suppress(OSError):  # removal also works on a full disk
                self._path.unlink()
            raise

    def end_early(self, error: BaseException) -> None:
        """Record that an error ended the run; if that cannot be written, the document still says "running"."""
        describe = self.describe or document_of_error
        try:
            write_result(describe(error_facts(error)), self._path)
        except OutputError as failure:
            log.error("%s", failure.described)  # noqa: TRY400  # named: no traceback needed


@contextmanager
def recorded_run(output: Path, record: RunRecord | None = None) -> Iterator[RunRecord]:
    """Record a run's outcome in OUT/result.json, whatever it is.

    It says "running" until the run writes its outcome, or an error or interrupt that ends the run is written
    instead. A forced end of the process (SIGKILL, a power cut) leaves "running".

    Args:
        output: The output folder; made if absent.
        record: The record of a run that has already begun: then nothing is done here.

    Yields:
        The record.

    Raises:
        OutputError: The output folder cannot be written.
    """
    if record is not None:
        yield record
        return
    record = RunRecord(output)
    record.begin()
    try:
        yield record
    except BaseException as error:
        record.end_early(error)
        raise


def error_facts(error: BaseException) -> dict[str, Any]:
    """An error as in a document: type, exit_code, reason, message.

    The text of an error that is not ctflow's may hold patient data and is left out.
    """
    if isinstance(error, KeyboardInterrupt):
        message = "the run was interrupted: run it again"
        return {"type": "KeyboardInterrupt", "exit_code": EXIT_INTERRUPTED, "reason": "interrupted", "message": message}
    if not isinstance(error, CtflowError):
        error = Unexpected(f"unexpected {type(error).__name__}, a bug in ctflow: --debug shows where")
    kind = type(error).__name__
    return {"type": kind, "exit_code": error.exit_code, "reason": error.reason, "message": str(error)}


def supersede_result(output: Path, key: str, digest: str) -> tuple[str, bool]:
    """Move aside the earlier result of a series that this run rejected or failed, so that it does not look current.

    Args:
        output: The output folder.
        key: Name of the series' result folder.
        digest: The series' name in messages.

    Returns:
        A note for the user, empty if there was no earlier result; and whether its place is now free.
    """
    try:
        if supersede_folder(output / key) is None:
            return "", True
    except OutputError as error:
        log.error("series %s: %s: %s", digest, _NOT_MOVED, error)  # noqa: TRY400  # named: no traceback needed
        return f"{_NOT_MOVED}: {error}", False
    log.warning("series %s: %s", digest, _MOVED)
    return _MOVED, True


def document_of_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a run that an error (`error_facts`) ended before its series were known."""
    return _document("interrupted" if error["exit_code"] == EXIT_INTERRUPTED else "failed", error)


def _document(status: str, error: Mapping[str, Any] | None) -> dict[str, Any]:
    code = None if error is None else error["exit_code"]
    return run_result(status=status, exit_code=code, error=error)
