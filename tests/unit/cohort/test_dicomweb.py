"""A DICOMweb server that answers in ways that Orthanc does not (tests/e2e/test_cohort_dicomweb.py has a real one)."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from pydicom import dcmwrite

from ctflow.cohort.stores import dicomweb
from ctflow.cohort.stores.dicomweb import DicomWeb
from ctflow.cohort.stores.patience import Patience, StoreFault
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume

STUDY, SERIES = "1.2.3", "1.2.4"
PARTS = [b"first" * 100, b"second\r\n--not-the-end" * 50, b"third" * 10]
Answer = tuple[int, str, bytes]


class Server:
    """Answers of `respond`, by method and path with query; `cut` bytes are held back, with the connection closed."""

    def __init__(self) -> None:
        self.respond: Callable[[str, str], Answer] = lambda _method, _path: (404, "text/plain", b"")
        self.length_is_told, self.pause_s = False, 0.0
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        self.rfile.read(size + 2)
                    self.rfile.readline()
                else:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                status, kind, body = outer.respond(self.command, self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                if outer.length_is_told:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                time.sleep(outer.pause_s)
                self.wfile.write(body[len(body) // 2 :])

            do_GET = do_POST = answer  # noqa: N815  # as http.server calls them

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"dicomweb+http://127.0.0.1:{self.server.server_port}/dicom-web"


@pytest.fixture
def server():
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def found(*uids: str) -> bytes:
    return json.dumps([{"00080018": {"vr": "UI", "Value": [uid]}} for uid in uids]).encode()


def multipart(parts=PARTS, end: bytes = b"\r\n--x y--") -> bytes:
    heads = b"--x y\r\nContent-Type: application/dicom\r\n\r\n"
    return b"\r\n".join(heads + part for part in parts) + end


def serving(body: bytes, kind: str = 'multipart/related; type="application/dicom"; boundary="x y"', listed: int = 3):
    def respond(_method: str, path: str) -> Answer:
        if "/instances" in path:
            page = found(*(f"1.{number}" for number in range(listed))) if "offset=0" in path else b"[]"
            return 200, "application/dicom+json", page
        return 200, kind, body

    return respond


def storing(status: int, document: dict, listing: bytes, listing_status: int = 200):
    """Answers to a request to store, and to the search after it."""
    kind = "application/dicom+json"
    answers = {"POST": (status, kind, json.dumps(document).encode()), "GET": (listing_status, kind, listing)}
    return lambda method, _path: answers[method]


def fault_of(server: Server, folder, most_bytes: int = 1 << 20) -> StoreFault:
    with pytest.raises(StoreFault) as raised, DicomWeb(server.url, Patience(0.3)) as client:
        client.retrieve(STUDY, SERIES, folder, most_bytes)
    return raised.value


def test_instances_are_written_as_they_come(server, tmp_path):
    server.respond = serving(multipart())
    with DicomWeb(server.url, Patience(1)) as client:
        client.retrieve(STUDY, SERIES, tmp_path, 1 << 20)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == PARTS


@pytest.mark.parametrize(
    ("body", "listed"),
    [
        (multipart(end=b""), 3),
        (multipart()[:-300], 3),
        (multipart(PARTS[:2]), 3),
        (b"", 3),
        (b"no part at all", 3),
    ],
    ids=["no end", "cut short", "fewer than listed", "empty", "other"],
)
def test_an_answer_that_is_not_whole_is_asked_for_again_and_then_refused(server, tmp_path, body, listed):
    server.respond = serving(body, listed=listed)
    assert fault_of(server, tmp_path).kind == "no-answer"
    assert sum("/instances" not in each for each in server.requests) == 2


def test_another_kind_of_answer_is_named(server, tmp_path):
    server.respond = serving(b"<html>", kind="text/html")
    assert fault_of(server, tmp_path).kind == "no-answer"
    server.respond = serving(multipart(), kind="multipart/related")
    assert "not multipart" in str(fault_of(server, tmp_path))


@pytest.mark.parametrize("limit", ["_MOST_INSTANCES", "_MOST_INSTANCE_BYTES"])
def test_no_answer_fills_disk_or_memory(server, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(dicomweb, limit, 2)
    server.respond = serving(multipart(), listed=2)
    with pytest.raises(ValueError, match="too"), DicomWeb(server.url, Patience(1)) as client:
        client.retrieve(STUDY, SERIES, tmp_path, 1 << 20)


def test_a_series_of_too_many_instances_is_not_asked_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "_MOST_INSTANCES", 2)
    server.respond = serving(multipart())
    assert "more than 2" in str(fault_of(server, tmp_path))
    assert len(server.requests) == 1


def test_too_many_bytes_are_not_taken(server, tmp_path):
    server.respond = serving(multipart())
    with pytest.raises(ValueError, match="too large"), DicomWeb(server.url, Patience(1)) as client:
        client.retrieve(STUDY, SERIES, tmp_path, 1000)


def test_a_slow_answer_is_cut_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "_SMALL_S", 0.2)
    monkeypatch.setattr(dicomweb, "_SLOWEST", 1 << 40)
    server.respond, server.pause_s = serving(multipart()), 0.5
    assert "slow" in str(fault_of(server, tmp_path))


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "denied"), (403, "denied"), (404, "absent"), (406, "refused"), (503, "no-answer")]
)
def test_a_status_says_what_to_do(server, tmp_path, status, kind):
    server.respond = lambda _method, _path: (status, "text/plain", b"")
    assert fault_of(server, tmp_path).kind == kind


def test_a_server_without_offsets_ends_a_search(server):
    series = {"0020000D": {"Value": ["1.1"]}, "0020000E": {"Value": ["1.2"]}, "00080060": {"Value": ["CT"]}}
    other = {**series, "0020000E": {"Value": ["1.3"]}, "00080060": {"Value": ["MR"]}}
    server.respond = lambda _method, _path: (200, "application/dicom+json", json.dumps([series, other]).encode())
    with DicomWeb(server.url, Patience(1)) as client:
        assert list(client.ct_series()) == [("1.1", "1.2")]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("limit", "most", "kind"),
    [("_MOST_RESULTS", 3, "refused"), ("_MOST_ANSWER_BYTES", 300, "refused"), ("_SMALL_S", -1.0, "no-answer")],
)
def test_a_search_without_end_is_ended(server, monkeypatch, limit, most, kind):
    count = itertools.count()

    def respond(_method: str, _path: str) -> Answer:
        pair = [{"0020000D": {"Value": ["1.1"]}, "0020000E": {"Value": [f"1.{next(count)}"]}} for _ in range(2)]
        return 200, "application/dicom+json", json.dumps(pair).encode() + b" " * 100 * next(count)

    monkeypatch.setattr(dicomweb, limit, most)
    server.respond = respond
    with pytest.raises(StoreFault) as raised, DicomWeb(server.url, Patience(0.1)) as client:
        list(client.ct_series())
    assert raised.value.kind == kind
    assert len(server.requests) <= 3


@pytest.mark.parametrize(
    "element", [{"Value": "1.2"}, {"Value": {"a": 1}}, {"Value": [{"Alphabetic": "a"}]}, {"Value": [3]}, "1.2", ["1"]]
)
def test_what_is_not_dicoms_json_is_named(server, element):
    for document in ([{"0020000D": element}], ["1.2"], [[1]], [None], 5):
        body = json.dumps(document).encode()
        server.respond = lambda _method, _path, body=body: (200, "application/dicom+json", body)
        with pytest.raises(StoreFault, match="JSON"), DicomWeb(server.url, Patience(0.1)) as client:
            list(client.ct_series())


def test_an_object_counts_once_the_server_has_confirmed_it(server, tmp_path):
    write_ct_series(small_volume(seed=1, shape=(1, 8, 8)), tmp_path / "in", seed=1)
    path = next((tmp_path / "in").iterdir())
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [272]}}]}}
    for status, document, text in ((200, {}, "not confirmed"), (202, failed, "272"), (409, failed, "HTTPError")):
        server.respond = storing(status, document, b"[]")
        with pytest.raises(StoreFault, match=text) as raised, DicomWeb(server.url, Patience(0.3)) as client:
            client.store([path])
        assert raised.value.kind == "refused"


@pytest.mark.parametrize(
    ("listing", "kind"),
    [((200, "own"), None), ((200, "other"), "refused"), ((404, ""), "refused"), ((503, ""), "no-answer")],
    ids=["there", "another", "none", "down"],
)
def test_a_refused_object_that_the_server_has_is_stored(server, tmp_path, listing, kind):
    write_ct_series(small_volume(seed=1, shape=(1, 8, 8)), tmp_path / "in", seed=1)
    path = next((tmp_path / "in").iterdir())
    status, which = listing
    uids = {"own": [str(dicomweb.dcmread(path).SOPInstanceUID)], "other": ["1.9"], "": []}[which]
    server.respond = storing(409, {}, found(*uids), status)
    with DicomWeb(server.url, Patience(0.3)) as client:
        if kind is None:
            client.store([path])
            return
        with pytest.raises(StoreFault) as raised:
            client.store([path])
    assert raised.value.kind == kind


def test_what_is_stored_is_the_file_itself(tmp_path):
    write_ct_series(small_volume(seed=1, shape=(1, 8, 8)), tmp_path, seed=1)
    path = next(tmp_path.iterdir())
    stream = BytesIO()
    dcmwrite(stream, dicomweb.dcmread(path))  # as dicomweb-client does
    assert stream.getvalue() == path.read_bytes()
