"""The parts of a multipart body as it arrives (RFC 2046 5.1, RFC 2387): one in memory at a time, within limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

_MOST_HEADERS, _HEADER_BYTES = 16, 4096  # of a part, which has two or three
# RFC 2046 5.1.1, which allows 70 letters; Orthanc takes 73.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,199}[0-9A-Za-z'()+_,\-./:=?]")


class BodyRefused(Exception):
    """A body that is not taken; `status` is HTTP's, the text says why and quotes nothing of it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class BodyPart:
    """A part: its headers, with names in lower case, and its content."""

    headers: dict[str, str] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class PartLimits:
    """Limits of a body.

    Attributes:
        part: Most bytes of a part.
        parts: Most parts.
        reserve: Is told of every change of the bytes in memory; False if there is no room for more.
    """

    part: int
    parts: int
    reserve: Callable[[int], bool]


def media_type(value: str) -> tuple[str, Mapping[str, str]]:
    """A Content-Type's media type and parameters (RFC 2045 5.1), names in lower case; empty if it cannot be read."""
    message = Message()
    message["Content-Type"] = value
    try:
        found = message.get_params(failobj=[]) or []
    except (TypeError, ValueError, LookupError, AttributeError):  # parameters in wrong pieces (RFC 2231)
        return "", {}
    # One that names its character set comes as a tuple, and is none that is asked for here.
    given = {name.lower(): text for name, text in found[1:] if isinstance(text, str)}
    return message.get_content_type() if value else "", given


def boundary_of(parameters: Mapping[str, str]) -> bytes:
    """The boundary among a Content-Type's parameters.

    Raises:
        BodyRefused: There is none, or it is invalid.
    """
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise BodyRefused(400, "the Content-Type has no valid boundary")
    return boundary.encode("ascii")


class PartReader:
    """Splits a body into its parts.

    Args:
        boundary: Of the body.
        limits: Checked before anything beyond them is kept.
    """

    def __init__(self, boundary: bytes, limits: PartLimits) -> None:
        # Late: an optional package, the extra `serve`.
        from python_multipart.multipart import MultipartParser  # noqa: PLC0415

        self._limits = limits
        self._part: BodyPart | None = None
        self._done: list[BodyPart] = []
        self._name, self._value = b"", b""
        self._count, self._ended = 0, False
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }
        self._parser = MultipartParser(
            boundary, callbacks, max_header_count=_MOST_HEADERS, max_header_size=_HEADER_BYTES
        )

    def feed(self, data: bytes) -> list[BodyPart]:
        """Take the next bytes of the body.

        Returns:
            The parts that end in them; whoever takes one calls `release` with it.

        Raises:
            BodyRefused: It is not multipart, or exceeds a limit.
        """
        from python_multipart.exceptions import FormParserError  # noqa: PLC0415  # as above

        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BodyRefused(400, "the body is not multipart with this boundary") from error
        found, self._done = self._done, []
        return found

    def finish(self) -> None:
        """The body has ended.

        Raises:
            BodyRefused: It was cut short, or has no part.
        """
        if not self._ended:
            raise BodyRefused(400, "the body ends before its last boundary")
        if not self._count:
            raise BodyRefused(400, "the body has no part")

    def release(self, part: BodyPart) -> None:
        """A part is no longer needed."""
        self._limits.reserve(-len(part.content))
        part.content = bytearray()

    def close(self) -> None:
        """Release all that is still here."""
        for part in (*self._done, *([self._part] if self._part else [])):
            self.release(part)
        self._done, self._part = [], None

    # -- the parser's callbacks ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._count += 1
        if self._count > self._limits.parts:
            raise BodyRefused(413, f"the body has more than {self._limits.parts} parts")
        self._part = BodyPart()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._part is not None:
            name = self._name.decode("latin-1").strip().lower()
            self._part.headers[name] = self._value.decode("latin-1").strip()
        self._name, self._value = b"", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part is None:
            return
        if len(self._part.content) + end - start > self._limits.part:
            raise BodyRefused(413, f"a part has more than {self._limits.part >> 20} MiB")
        if not self._limits.reserve(end - start):
            self._limits.reserve(start - end)
            raise BodyRefused(503, "too much is being received at once: send it again later")
        self._part.content += memoryview(data)[start:end]

    def _end(self) -> None:
        if self._part is not None:
            self._done.append(self._part)
        self._part = None

    def _all(self) -> None:
        self._ended = True
