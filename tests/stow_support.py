"""A node's page with STOW-RS on a free port, and what a sender puts on the wire."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset

from ctflow.node.dicomweb.stow import StowIntake
from ctflow.node.receive.inbox import Inbox
from ctflow.node.receive.intake import Intake, IntakeLimits
from ctflow.node.receive.transport import Shared
from ctflow.node.web.server import serving
from node_support import Ward

PATH = "/dicom-web/studies"


class StowNode(Ward):
    """A node that receives by STOW-RS; `port` while `listening`."""

    def __init__(
        self, folder: Path, *, most_bytes=10**9, most_parts=1000, least_free=0, most_instances=1000, tls=None, **web
    ) -> None:
        super().__init__(folder, stow=True, **web)
        self.inbox = Inbox(folder / "inbox", least_free)
        self.shared = Shared()
        self.refused: list[str] = []
        self.intake = Intake(IntakeLimits(most_instances, 10**9), self.inbox, self.journal, self.metrics)
        self.port = 0
        stow = StowIntake(self.intake.take, self.refused.append, self.shared, most_bytes, most_parts)
        self.node = type(self.node)(**{**vars(self.node), "stow": stow, "tls": tls})

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.inbox.folder.rglob("*") if path.is_file())

    @contextmanager
    def listening(self) -> Iterator[StowNode]:
        with serving(self.node) as self.port:
            yield self


def file_of(dataset: Dataset) -> bytes:
    """A DICOM file."""
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def multipart(*parts: bytes, boundary: str = "BOUNDARY", headers: str = "Content-Type: application/dicom\r\n") -> bytes:
    """A body with these parts."""
    framed = b"".join(f"--{boundary}\r\n{headers}\r\n".encode() + part + b"\r\n" for part in parts)
    return framed + f"--{boundary}--\r\n".encode()


CONTENT_TYPE = 'multipart/related; type="application/dicom"; boundary=BOUNDARY'


def post(port: int, body, path: str = PATH, **headers) -> tuple[int, dict, http.client.HTTPMessage]:
    """A STOW-RS request; status, the answer's data set if there is one, and its headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    try:
        connection.request("POST", path, body, {"Content-Type": CONTENT_TYPE, **names})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    is_json = answer.headers.get_content_type() == "application/dicom+json"
    return answer.status, json.loads(content) if is_json else {"text": content.decode()}, answer.headers


def raw(port: int, data: bytes) -> bytes:
    """Bytes to the port; all that comes until the node closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


def stored(document: dict) -> list[str]:
    """SOPInstanceUIDs of an answer's Referenced SOP Sequence."""
    return [item["00081155"]["Value"][0] for item in document.get("00081199", {}).get("Value", [])]


def failed(document: dict) -> dict[str, int]:
    """Failure reasons by SOPInstanceUID; of unnamed ones under ""."""
    found = {}
    for tag in ("00081198", "0008119A"):
        for item in document.get(tag, {}).get("Value", []):
            found[item.get("00081155", {"Value": [""]})["Value"][0]] = item["00081197"]["Value"][0]
    return found
