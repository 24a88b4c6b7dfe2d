"""Requests over a network: repeated for a while, with longer and longer pauses, and then given up by name."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Literal, TypeVar

Result = TypeVar("Result")
FaultKind = Literal["absent", "denied", "refused", "no-answer", "no-credentials"]

_ABSENT_ERRNO = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_DENIED_ERRNO = {errno.EACCES, errno.EPERM}
_REFUSED_ERRNO = {errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG}
_LOCAL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}  # of this machine's disk
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}  # of botocore, which is not imported for that
_REFUSED = {"ParamValidationError", "ProfileNotFound", "InvalidRegionError", "UnsupportedSignatureVersionError"}
_PASSING_STATUS = {408, 425, 429}
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 20.0
_SLICE_S = 0.5
_LAST_S = 3.0  # what is left once the run ends

log = logging.getLogger(__name__)


class StoreFault(Exception):
    """A store could not be used; no address and no name in its text.

    Attributes:
        kind: "absent", "denied", "refused" (it does not take such a request), "no-answer" (also after all
            repetitions), or "no-credentials".
    """

    def __init__(self, kind: FaultKind, what: str) -> None:
        super().__init__(what)
        self.kind: FaultKind = kind


class TooMuchFault(StoreFault):
    """A store gives more than is taken from any."""

    def __init__(self, what: str) -> None:
        super().__init__("refused", what)


class Patience:
    """How long requests are repeated; `hurry` shortens it when the run ends.

    Args:
        seconds: From the first attempt to the beginning of the last one.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = float("inf")

    def hurry(self) -> None:
        """Give up within seconds from now on."""
        self._end = min(self._end, time.monotonic() + _LAST_S)

    async def repeat(self, request: Callable[[], Awaitable[Result]], timeout_s: float) -> Result:
        """The result of a request, repeated while its fault may pass.

        Args:
            request: Makes a new attempt.
            timeout_s: Of each attempt.

        Raises:
            StoreFault: It failed for good.
            OSError: This machine's disk failed.
        """
        pauses = self._pauses()
        while True:
            try:
                return await self._answer(request(), timeout_s)
            except Exception as error:  # noqa: BLE001  # each client has classes of its own
                until = pauses.send(error)
            while (left := min(until, self._end) - time.monotonic()) > 0:
                await asyncio.sleep(min(left, _SLICE_S))

    async def _answer(self, request: Awaitable[Result], timeout_s: float) -> Result:
        """The result of one request; after `hurry` it gets seconds."""
        task = asyncio.ensure_future(request)
        # Python would print the error of a request that was given up, and with it names of objects.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        started = time.monotonic()
        try:
            while True:
                limit = min(started + timeout_s, max(self._end, started + _LAST_S))
                await asyncio.wait({task}, timeout=min(max(limit - time.monotonic(), 0), _SLICE_S))
                if task.done():
                    return task.result()
                if time.monotonic() >= limit:
                    raise TimeoutError
        finally:
            task.cancel()

    def repeat_call(self, request: Callable[[], Result]) -> Result:
        """As `repeat`, for a client that blocks and has timeouts of its own."""
        pauses = self._pauses()
        while True:
            try:
                return request()
            except Exception as error:  # noqa: BLE001  # each client has classes of its own
                until = pauses.send(error)
            while (left := min(until, self._end) - time.monotonic()) > 0:
                time.sleep(min(left, _SLICE_S))

    def _pauses(self) -> Generator[float, Exception, None]:
        """Gets errors, and gives back until when to wait; raises what may not pass, or has not."""
        pauses = self._endless_pauses()
        next(pauses)
        return pauses

    def _endless_pauses(self) -> Generator[float, Exception, None]:
        deadline, pause, until = time.monotonic() + self.seconds, _FIRST_PAUSE_S, 0.0
        while True:
            error = yield until
            fault = fault_of(error)
            if fault.kind != "no-answer" or time.monotonic() + pause > min(deadline, self._end):
                raise fault from error
            log.info("a store failed (%s): trying again in %.1f s", fault, pause)
            until = time.monotonic() + pause * random.uniform(0.5, 1.0)  # noqa: S311  # machines must not ask at once
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def fault_of(error: Exception) -> StoreFault:
    """What a client's error says.

    Raises:
        OSError: It is of this machine's disk.
        Exception: It is no client's, but a bug.
    """
    if isinstance(error, StoreFault):
        return error
    name, number, status = type(error).__name__, getattr(error, "errno", None), _status(error)
    if name in _NO_CREDENTIALS:
        return StoreFault("no-credentials", name)
    if number in _LOCAL_ERRNO:
        raise error
    if isinstance(error, FileNotFoundError) or number in _ABSENT_ERRNO or status == 404:
        return StoreFault("absent", name)
    if isinstance(error, PermissionError) or number in _DENIED_ERRNO or status in (401, 403):
        return StoreFault("denied", name)
    if name in _REFUSED or _is_refusal(error, status) or (number in _REFUSED_ERRNO and isinstance(error, OSError)):
        return StoreFault("refused", name)
    if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.split(".")[0] in _CLIENTS:
        return StoreFault("no-answer", name)
    raise error


def _is_refusal(error: Exception, status: int | None) -> bool:
    """Whether a DICOMweb server refuses a request; object stores answer 400 and 409 to what may pass, too."""
    is_of_requests = type(error).__module__.split(".")[0] == "requests"
    return is_of_requests and status is not None and 400 <= status < 500 and status not in _PASSING_STATUS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of a client or in its cause, whatever the text of the answer."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if response is not None:
            return int(getattr(response, "status_code", 0))
        error = error.__cause__
    return None
