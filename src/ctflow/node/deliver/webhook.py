"""Tells another program of a result by HTTP: a signed request with the measurements, sent again until it is taken."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pydicom

from ctflow import __version__
from ctflow.core.errors import DestinationDown, PeerRefused, SettingsInvalid
from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.node.access.secret import read_secret_file
from ctflow.node.deliver.deadline import ended_after
from ctflow.node.deliver.send import ANSWER_S, Channel
from ctflow.node.settings.webhooks import Webhook
from ctflow.node.tls import tls_failure

DOCUMENT = "result.json"  # the file of a delivery to a webhook
LARGEST_BODY = 1_000_000
_LARGEST_ANSWER = 65_536  # read and dropped, so that the connection ends in order
_LEAST_SECRET, _MOST_SECRET = 16, 4096
_CONNECT_S = 10.0
_PATIENT = ("PatientName", "PatientID", "AccessionNumber", "StudyInstanceUID")


@dataclass(frozen=True)
class WebhookTarget:
    """A program that is told of results."""

    webhook: Webhook

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """A connection, with the secret and the certificates as the files have them now.

        Raises:
            DestinationDown: Nothing answers, its certificate is not accepted, or a file cannot be read.
        """
        secret = read_secret(self.webhook.secret_file)
        channel = _Posting(self.webhook, secret)
        channel.connect()
        try:
            yield channel
        finally:
            channel.close()


def read_secret(file: Path) -> bytes:
    """The secret in a file, without line breaks around it.

    Raises:
        DestinationDown: It cannot be read, others may read it, or it is too short or long; the message does not have
            it.
    """
    try:
        secret = read_secret_file(file, "secret_file", "make it, with the secret in it").strip(b"\r\n")
    except SettingsInvalid as error:
        raise DestinationDown(str(error), reason="webhook-secret") from error
    if not _LEAST_SECRET <= len(secret) <= _MOST_SECRET:
        raise DestinationDown(f"secret_file must have {_LEAST_SECRET} to {_MOST_SECRET} bytes", reason="webhook-secret")
    return secret


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """What the header `X-Ctflow-Signature` has: HMAC-SHA256 (RFC 2104) of the time, a dot and the body."""
    return "sha256=" + hmac.new(secret, timestamp.encode("ascii") + b"." + body, hashlib.sha256).hexdigest()


@dataclass
class _Posting:
    webhook: Webhook
    secret: bytes
    _connection: http.client.HTTPConnection | None = None

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection, for one request."""
        parts = urlsplit(self.webhook.url)
        connection: http.client.HTTPConnection
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=self.webhook.ca)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                connection = http.client.HTTPSConnection(
                    parts.hostname or "", parts.port, timeout=_CONNECT_S, context=context
                )
            else:
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_CONNECT_S)
            connection.connect()
        except ssl.SSLError as error:
            raise DestinationDown(f"{self.webhook.name}: {tls_failure(error)}", reason="tls") from error
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise DestinationDown(f"{self.webhook.name} does not answer ({why})", reason="no-connection") from error
        self._connection = connection
        return connection

    def close(self) -> None:
        """Close what is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def send(self, folder: Path, _file: str) -> str:
        """Post the measurements of a result."""
        body = body_of_result(folder, patient_data=self.webhook.patient_data)
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"ctflow/{__version__}",
            "Idempotency-Key": idempotency_key(folder),
            "X-Ctflow-Timestamp": timestamp,
            "X-Ctflow-Signature": signature(self.secret, timestamp, body),
            "Connection": "close",
        }
        status = self._post(headers, body)
        if 200 <= status < 300:
            return f" ({status})"
        hint = ": redirects are not followed, give the final address" if 300 <= status < 400 else ""
        raise PeerRefused(f"{self.webhook.name} refuses the result with {status}{hint}", reason="webhook-refused")

    def _post(self, headers: Mapping[str, str], body: bytes) -> int:
        parts = urlsplit(self.webhook.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = self._connection or self.connect()
        connection.sock.settimeout(ANSWER_S)
        try:
            with ended_after(ANSWER_S, connection.sock):
                connection.request("POST", path, body, dict(headers))
                response = connection.getresponse()
                response.read(_LARGEST_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            what = type(error).__name__
            raise DestinationDown(f"{self.webhook.name} did not answer ({what})", reason="no-answer") from error
        finally:
            self.close()
        return response.status


def idempotency_key(folder: Path) -> str:
    """Names a result, the same at every attempt; a receiver that has it needs no second one."""
    return hashlib.sha256(f"{folder.parent.name}/{folder.name}".encode()).hexdigest()[:32]


def body_of_result(folder: Path, *, patient_data: bool) -> bytes:
    """The JSON document that a webhook gets.

    Args:
        folder: Of the result.
        patient_data: Whether it has UIDs, and the patient's name, ID and accession number.

    Raises:
        PeerRefused: The result cannot be read.
    """
    try:
        document = json.loads((folder / DOCUMENT).read_bytes())
        volumes = document["series"] if isinstance(document["series"], list) else [document]
        found = _document(folder, volumes, patient_data=patient_data)
        body = json.dumps(found, allow_nan=False).encode()
        if len(body) > LARGEST_BODY:
            for volume in found["volumes"]:
                for segment in volume["segments"]:
                    segment["findings"] = []
            body = json.dumps(found | {"shortened": True}, allow_nan=False).encode()
    except (OSError, ValueError, KeyError, TypeError, *PARSE_ERRORS) as error:
        raise PeerRefused(f"{DOCUMENT} cannot be read ({type(error).__name__})", reason="object-unreadable") from error
    return body


def _document(folder: Path, volumes: list[Mapping[str, Any]], *, patient_data: bool) -> dict[str, Any]:
    first = volumes[0]
    files = sorted(path for path in folder.rglob("*.dcm") if path.is_file())
    found: dict[str, Any] = {
        "event": "result",
        "ctflow_version": first["ctflow_version"],
        "series": first["series"]["digest"],
        "result": f"{folder.parent.name}/{folder.name}",
        "model": {name: first["model"][name] for name in ("name", "version")},
        "research_only": first["research_only"],
        "volumes": [
            {
                "volume": each["series"].get("volume", {}).get("label"),
                "statement": each["statement"],
                "segments": [dict(segment) for segment in each["segments"]],
                "warnings": list(each["warnings"]),
            }
            for each in volumes
        ],
        "objects": [path.relative_to(folder).as_posix() for path in files],
        "shortened": False,
    }
    if patient_data:
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
        found["series_instance_uid"] = first["series"]["series_instance_uid"]
        found["object_uids"] = [text(header, "SOPInstanceUID") for header in headers]
        found["patient"] = {name: text(headers[0], name) for name in _PATIENT} if headers else None
    return found
