"""Results to a DICOMweb server by STOW-RS (PS3.18 10.5): a request for each object, which goes byte for byte."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from uuid import uuid4

from ctflow.core.errors import DestinationDown, PeerRefused, SettingsInvalid
from ctflow.dicom.read.structure import meta_information
from ctflow.dicomweb.stored import MEDIA_TYPE, word_of_answer
from ctflow.node.access.secret import read_secret_line
from ctflow.node.deliver.deadline import ended_after
from ctflow.node.deliver.send import ANSWER_S, Channel
from ctflow.node.tls import TlsContext

_CONNECT_S = 10.0
_BLOCK = 2**18
_LARGEST_ANSWER = 2**20  # to one object: a few hundred bytes
_META_BYTES = 2**16
_INSTANCE = 0x00020003
_BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Credentials:
    """How the node shows who it is; the files are read for every connection.

    Attributes:
        user: For basic authentication.
        password_file: Its password.
        token_file: A bearer token instead.
    """

    user: str = ""
    password_file: Path | None = None
    token_file: Path | None = None

    def headers(self) -> Mapping[str, str]:
        """The header of a request; none without credentials.

        Raises:
            SettingsInvalid: A file cannot be read.
        """
        if self.token_file is not None:
            return {"Authorization": f"Bearer {read_secret_line(self.token_file, 'token_file')}"}
        if self.password_file is not None:
            password = read_secret_line(self.password_file, "password_file")
            pair = base64.b64encode(f"{self.user}:{password}".encode()).decode("ascii")
            return {"Authorization": f"Basic {pair}"}
        return {}


@dataclass(frozen=True)
class StowTarget:
    """STOW-RS to a DICOMweb server.

    Attributes:
        url: Its base address, to which `/studies` is added.
        credentials: For each request.
        tls: For `https`; None takes the system's authorities.
    """

    url: str
    credentials: Credentials = Credentials()
    tls: TlsContext | None = None

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """A connection.

        Raises:
            DestinationDown: Nothing answers, or the certificate is not accepted.
        """
        server = _Server(self)
        try:
            server.connect()
            yield server
        finally:
            server.close()

    def ask(self) -> str:
        """Ask without sending anything; return what the server answers, as a clause.

        Raises:
            DestinationDown: Nothing answers, or it denies access.
        """
        server = _Server(self)
        try:
            server.connect()
            status, _ = server.exchange("OPTIONS", None, {})
        finally:
            server.close()
        # Many servers know no OPTIONS; whoever answers with 401 or 403 would do so to a result as well.
        return f"answers OPTIONS with {status}"


@dataclass
class _Server:
    target: StowTarget
    _connection: http.client.HTTPConnection | None = None
    _headers: Mapping[str, str] = field(default_factory=dict)
    _is_used: bool = False

    def connect(self) -> None:
        """Connect anew."""
        self.close()
        parts, tls = urlsplit(self.target.url), self.target.tls
        host, port = parts.hostname or "", parts.port
        try:
            self._headers = self.target.credentials.headers()
        except SettingsInvalid as error:
            raise DestinationDown(f"{self.target.url}: {error}", reason="access-denied") from error
        if parts.scheme == "https":
            context = tls.context if tls else ssl.create_default_context()
            self._connection = http.client.HTTPSConnection(host, port, timeout=_CONNECT_S, context=context)
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
        self._is_used = False
        if tls is not None:
            tls.forget_failure()
        try:
            self._connection.connect()
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: of a name that is none
            raise self._down(error) from error
        self._connection.sock.settimeout(ANSWER_S)

    def close(self) -> None:
        """Close."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def send(self, folder: Path, file: str) -> str:
        """Store one object; return what is to be said of the answer."""
        path = folder / file
        try:
            with path.open("rb") as stream:
                meta = meta_information(stream.read(_META_BYTES))
                if isinstance(meta, str):
                    raise PeerRefused(f"{file} cannot be read ({meta})", reason="object-unreadable")
                uid = meta[0].get(_INSTANCE, b"").decode("ascii", "replace").strip(" \0")
                status, content = self._post(stream, path.stat().st_size)
        except FileNotFoundError as error:
            raise PeerRefused(f"{file} cannot be read ({error.strerror})", reason="object-unreadable") from error
        return self._judge(file, uid, status, content)

    def _post(self, stream: IO[bytes], size: int) -> tuple[int, bytes]:
        boundary = uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(len(head) + size + len(tail)),
        }

        def body() -> Iterator[bytes]:
            stream.seek(0)
            yield head
            while block := stream.read(_BLOCK):
                yield block
            yield tail

        if not self._is_used:
            return self.exchange("POST", body(), headers)
        try:
            return self.exchange("POST", body(), headers)
        except DestinationDown:  # it may have closed an idle connection; the same object again is the same
            self.connect()
            return self.exchange("POST", body(), headers)

    def exchange(self, method: str, body: Iterator[bytes] | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """A request; its status and the answer's content, which is bounded.

        Raises:
            DestinationDown: There is no answer, or not such a one.
        """
        if self._connection is None:
            raise DestinationDown(f"{self.target.url} closed the connection", reason="no-answer")
        if self._connection.sock is None:  # its last answer said that it would close
            self.connect()
        path = f"{urlsplit(self.target.url).path.rstrip('/')}/studies"
        everything = {"Accept": MEDIA_TYPE, **self._headers, **headers}
        try:
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):  # it may have answered before the end
                self._connection.request(method, path, body, everything)
            with ended_after(ANSWER_S, self._connection.sock):
                answer = self._connection.getresponse()
                content = _whole(answer)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._down(error, "no-answer") from error
        self._is_used = True
        if answer.status in (401, 403):
            raise DestinationDown(
                f"{self.target.url} denies access ({answer.status}): check its credentials", reason="access-denied"
            )
        return answer.status, content

    def _judge(self, file: str, uid: str, status: int, content: bytes) -> str:
        if status in _BUSY:
            raise DestinationDown(f"{self.target.url} answers with {status}", reason="no-answer")
        word = None
        with suppress(ValueError, RecursionError):  # no JSON, or brackets without end
            word = word_of_answer(json.loads(content), uid)
        if word is not None and word.is_stored:
            return "" if word.reason is None else f" (warning {word.reason:04X}H)"
        failed = "" if word is None or word.reason is None else f", failure reason {word.reason:04X}H"
        if 200 <= status < 300 and word is None:
            raise PeerRefused(f"{self.target.url} does not confirm {file}", reason="object-refused")
        raise PeerRefused(f"{self.target.url} refuses {file} with {status}{failed}", reason="object-refused")

    def _down(self, error: Exception, reason: str = "no-connection") -> DestinationDown:
        why = (self.target.tls.failure if self.target.tls else "") or _said(error)
        if self.target.tls and self.target.tls.failure:
            return DestinationDown(f"{self.target.url}: {why}", reason="tls")
        if reason == "no-answer":
            return DestinationDown(f"{self.target.url} does not answer ({why})", reason="no-answer")
        return DestinationDown(f"{self.target.url} cannot be reached ({why})", reason="no-connection")


def _whole(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read(_LARGEST_ANSWER + 1)
    if len(content) > _LARGEST_ANSWER:
        raise http.client.HTTPException("its answer is too long")
    if answer.length:  # bytes that were promised; a part of an answer is none
        raise http.client.HTTPException("its answer breaks off")
    return content


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({(error.reason or 'no reason given').lower().replace('_', ' ')})"
    if isinstance(error, http.client.HTTPException):
        return str(error)[:80] or type(error).__name__
    return getattr(error, "strerror", None) or type(error).__name__
