"""Takes STOW-RS requests: each part goes the same path as an instance of C-STORE, and is answered for.

An instance is in the answer's Referenced SOP Sequence only when it is on the disk and in the journal.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ctflow.dicom.read.structure import meta_information
from ctflow.dicomweb.stored import MEDIA_TYPE
from ctflow.node.dicomweb.answer import (
    UNSUPPORTED_CLASS,
    UNSUPPORTED_SYNTAX,
    StoreOutcome,
    document_of_outcomes,
    status_of_outcomes,
)
from ctflow.node.dicomweb.multipart import BodyPart, BodyRefused, PartLimits, PartReader, boundary_of, media_type
from ctflow.node.receive.intake import CANNOT_UNDERSTAND, Caller
from ctflow.node.receive.receiver import VERIFICATION, supported_contexts
from ctflow.node.receive.shortcut import StoreAnswer, StoreRequest
from ctflow.node.receive.transport import LARGEST_MESSAGE, LARGEST_TOGETHER, Shared

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

STUDIES = "/dicom-web/studies"
_ACCEPTED = {MEDIA_TYPE, "application/json", "application/*", "*/*"}
_UID = re.compile(r"[0-9.]{1,64}")
_MOST_AT_ONCE = 32  # requests
_STORING_AT_ONCE = 16  # threads: they wait for the disk together
_META_BYTES = 2**16
_CLASS, _INSTANCE, _SYNTAX = 0x00020002, 0x00020003, 0x00020010
_PATIENCE_S, _SLOWEST = 120.0, 20_000  # a request may take two minutes, and what its bytes take at this rate a second
_DRAINED_BYTES, _DRAINED_S = 2**24, 5.0
_RETRY_AFTER = {"Retry-After": "30"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StowIntake:
    """Where instances go, and how much a request may have.

    Attributes:
        take: As `Intake.take`.
        refused: Counts a refused request; gets one word.
        shared: Bytes in reception, of C-STORE also.
        most_bytes: Of a request.
        most_parts: Of a request.
    """

    take: Callable[[StoreRequest, Caller], StoreAnswer]
    refused: Callable[[str], None]
    shared: Shared
    most_bytes: int
    most_parts: int


class Stow:
    """The store transaction.

    Args:
        intake: Where instances go.
    """

    def __init__(self, intake: StowIntake) -> None:
        import anyio  # noqa: PLC0415  # of starlette, which is optional

        self._intake = intake
        self._contexts = supported_contexts()
        self._running = 0
        self._storing = anyio.CapacityLimiter(_STORING_AT_ONCE)

    async def store(self, request: Request, caller: Caller) -> Response:
        """Answer a POST to `/studies` or `/studies/{study}`.

        Args:
            request: The request; its body has not been read.
            caller: Who sends.

        Returns:
            The answer, whatever happens.
        """
        from starlette.requests import ClientDisconnect  # noqa: PLC0415  # an optional package: the extra `serve`

        self._running += 1
        try:
            boundary = self._check(request)
            outcomes = await self._read(request, caller, boundary)
        except BodyRefused as refusal:
            return await self._refuse(request, caller, refusal)
        except ClientDisconnect:
            return await self._refuse(request, caller, BodyRefused(400, "the connection ended within the body"))
        finally:
            self._running -= 1
        return _json(status_of_outcomes(outcomes), document_of_outcomes(outcomes))

    def _check(self, request: Request) -> bytes:
        """The body's boundary, if the head of the request may be followed by its body."""
        headers = request.headers
        wanted = [each.partition(";") for each in headers.get("accept", "*/*").split(",")]
        if not any(name.strip().lower() in _ACCEPTED and q.strip() != "q=0" for name, _, q in wanted):
            raise BodyRefused(406, f"the answer is {MEDIA_TYPE} only")
        kind, parameters = media_type(headers.get("content-type", ""))
        part = parameters.get("type", "application/dicom").lower()
        if kind != "multipart/related" or part != "application/dicom":
            raise BodyRefused(415, 'the body must be multipart/related; type="application/dicom"')
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise BodyRefused(415, "the body must have no Content-Encoding")
        study = request.path_params.get("study", "1")
        if not _UID.fullmatch(study):
            raise BodyRefused(400, "the address names no valid StudyInstanceUID")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._intake.most_bytes:
            raise BodyRefused(413, f"the body has more than {self._intake.most_bytes} bytes (limits.request)")
        if self._running > _MOST_AT_ONCE:
            raise BodyRefused(503, "too many requests at once: send it again later")
        return boundary_of(parameters)

    async def _read(self, request: Request, caller: Caller, boundary: bytes) -> list[StoreOutcome]:
        limits = PartLimits(LARGEST_MESSAGE, self._intake.most_parts, self._reserve)
        reader, study = PartReader(boundary, limits), request.path_params.get("study", "")
        outcomes: list[StoreOutcome] = []
        count, started = 0, time.monotonic()
        try:
            async for chunk in request.stream():
                count += len(chunk)
                if count > self._intake.most_bytes:
                    raise BodyRefused(413, f"the body has more than {self._intake.most_bytes} bytes (limits.request)")
                if time.monotonic() - started > _PATIENCE_S + count / _SLOWEST:
                    raise BodyRefused(408, "the body comes too slowly")
                parts = reader.feed(chunk)
                try:
                    for part in parts:
                        waiting = time.monotonic()
                        outcomes.append(await self._take(part, caller, study))
                        reader.release(part)
                        started += time.monotonic() - waiting  # the disk's time is not the sender's
                finally:
                    for part in parts:
                        reader.release(part)  # what is released has nothing left
            reader.finish()
        finally:
            reader.close()
        return outcomes

    def _reserve(self, count: int) -> bool:
        return self._intake.shared.add(count) <= LARGEST_TOGETHER

    async def _take(self, part: BodyPart, caller: Caller, study: str) -> StoreOutcome:
        import anyio.to_thread  # noqa: PLC0415  # of starlette, which is optional

        kind, _ = media_type(part.headers.get("content-type", "application/dicom"))
        encoding = part.headers.get("content-transfer-encoding", "binary").lower()
        if kind != "application/dicom" or encoding not in ("binary", "8bit"):
            return self._not_taken(caller, StoreOutcome(CANNOT_UNDERSTAND), "a part is not application/dicom")
        found = meta_information(bytes(memoryview(part.content)[:_META_BYTES]))
        if isinstance(found, str):
            return self._not_taken(caller, StoreOutcome(CANNOT_UNDERSTAND), f"a part is {found}")
        meta, start = found
        sop_class, instance, syntax = (_text(meta.get(tag, b"")) for tag in (_CLASS, _INSTANCE, _SYNTAX))
        if sop_class not in self._contexts or sop_class == VERIFICATION:
            outcome = StoreOutcome(UNSUPPORTED_CLASS, sop_class, instance)
            return self._not_taken(caller, outcome, "an instance has a SOP class that this node does not accept")
        if syntax not in self._contexts[sop_class]:
            outcome = StoreOutcome(UNSUPPORTED_SYNTAX, sop_class, instance)
            return self._not_taken(caller, outcome, "an instance has a transfer syntax that this node does not accept")
        with memoryview(part.content) as whole, whole[start:].toreadonly() as data:
            sent = StoreRequest(sop_class, instance, sop_class, syntax, data, study)
            status, _ = await anyio.to_thread.run_sync(self._intake.take, sent, caller, limiter=self._storing)
        return StoreOutcome(status, sop_class, instance)

    def _not_taken(self, caller: Caller, outcome: StoreOutcome, why: str) -> StoreOutcome:
        self._intake.refused("instance")
        log.warning("STOW-RS: %s", why, extra={"facts": {"ae": caller.ae_title, "peer": caller.address}})
        return outcome

    async def _refuse(self, request: Request, caller: Caller, refusal: BodyRefused) -> Response:
        self._intake.refused("request")
        facts = {"ae": caller.ae_title, "peer": caller.address}
        log.warning("STOW-RS request refused: %s", refusal, extra={"facts": facts})
        await drain(request)
        return refused(refusal.status, str(refusal), _RETRY_AFTER if refusal.status == 503 else {})


async def drain(request: Request) -> None:
    """Read what is left of a small body: a client that still writes would not see the answer."""
    from starlette.requests import ClientDisconnect  # noqa: PLC0415  # an optional package: the extra `serve`

    length = request.headers.get("content-length", "0")
    if request.headers.get("expect") or not length.isdigit() or int(length) > _DRAINED_BYTES:
        return  # it waits for an answer, or would write for long
    import anyio  # noqa: PLC0415  # of starlette, which is optional

    count = 0
    try:
        with anyio.move_on_after(_DRAINED_S):
            async for chunk in request.stream():
                count += len(chunk)
                if count > _DRAINED_BYTES:
                    return
    except (ClientDisconnect, RuntimeError):  # gone; or the stream has been read
        return


def refused(status: int, text: str, headers: Mapping[str, str]) -> Response:
    """An answer without a data set, after which the connection ends: the body may not have been read."""
    from starlette.responses import PlainTextResponse  # noqa: PLC0415  # an optional package: the extra `serve`

    return PlainTextResponse(f"{text}\n", status, {**headers, "Connection": "close"})


def _json(status: int, document: object) -> Response:
    from starlette.responses import Response  # noqa: PLC0415  # an optional package: the extra `serve`

    headers = _RETRY_AFTER if status == 503 else None
    return Response(json.dumps(document).encode(), status, headers, media_type=MEDIA_TYPE)


def _text(uid: bytes) -> str:
    return uid.decode("ascii", "replace").strip(" \0")
