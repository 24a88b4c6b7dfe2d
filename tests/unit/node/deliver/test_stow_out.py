"""Results to DICOMweb servers: well-behaved ones, and others."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from certificate_support import Authority
from ctflow.core.errors import DestinationDown, PeerRefused, SettingsInvalid
from ctflow.dicomweb.stored import StoredWord, word_of_answer
from ctflow.node.deliver import stow
from ctflow.node.deliver.stow import Credentials, StowTarget
from ctflow.node.settings.groups import Destination
from ctflow.node.settings.tls import ClientTls, PageTls
from ctflow.node.tls import TlsContext
from reasons import raises_reason
from service_support import free_port, instance
from stow_support import StowNode

UID = "1.2.826.0.1.1"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    instance().save_as(folder / "segmentation.dcm", enforce_file_format=True)
    return folder


def item(uid: str = UID, **reasons: int) -> dict:
    tags = {"warning": "00081196", "failure": "00081197"}
    found = {"00081155": {"vr": "UI", "Value": [uid]}}
    return found | {tags[name]: {"vr": "US", "Value": [value]} for name, value in reasons.items()}


def answer(stored=(), failed=()) -> bytes:
    found = {"00081199": stored, "00081198": failed}
    return json.dumps({tag: {"vr": "SQ", "Value": list(items)} for tag, items in found.items() if items}).encode()


class Server:
    """An HTTP server that answers with what it is told, and keeps what it is sent."""

    def __init__(self) -> None:
        self.answers = [(200, answer([item()]))]
        self.requests: list[tuple[str, str, dict, bytes]] = []
        self.closes = False
        self.says_so = False
        self.promises = 0  # bytes more than there are
        self.pause_s = 0.0  # before each byte


@contextmanager
def serving(server: Server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.command, self.path, dict(self.headers), body))
            status, content = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            self.send_response(status)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(content) + server.promises))
            if server.says_so:
                self.send_header("Connection", "close")
            self.end_headers()
            step = 1 if server.pause_s else max(len(content), 1)
            with suppress(ConnectionError):  # who asked does not wait for ever
                for start in range(0, len(content), step):
                    time.sleep(server.pause_s)
                    self.wfile.write(content[start : start + step])
            self.close_connection = server.closes

        def do_OPTIONS(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/dicom-web"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def url(server):
    with serving(server) as found:
        yield found


def send(url: str, folder, **changes) -> str:
    with StowTarget(url, **changes).open() as channel:
        return channel.send(folder, "segmentation.dcm")


def test_an_object_goes_byte_for_byte_to_studies(server, url, folder):
    assert send(url, folder) == ""
    method, path, headers, body = server.requests[0]
    assert (method, path) == ("POST", "/dicom-web/studies")
    assert headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert headers["Accept"] == "application/dicom+json"
    assert "Authorization" not in headers
    boundary = headers["Content-Type"].rpartition("=")[2].encode()
    sent = body.split(b"\r\n\r\n", 1)[1].rpartition(b"\r\n--" + boundary + b"--")[0]
    assert sent == (folder / "segmentation.dcm").read_bytes()


def test_an_answer_of_brackets_without_end_is_no_confirmation(server, url, folder):
    server.answers = [(200, b"[" * 200_000)]
    with raises_reason(PeerRefused, "object-refused"):
        send(url, folder)


def test_a_name_that_is_none_is_a_server_that_is_down(folder):
    with raises_reason(DestinationDown, "no-connection"):
        send(f"http://{'a' * 70}.example.org/dicom-web", folder)


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, answer([item()]), ""),
        (202, answer([item(warning=0xB000)]), " (warning B000H)"),
        (409, answer(failed=[item(failure=0x0111)]), " (warning 0111H)"),
        (202, answer(failed=[item(failure=0xB006)]), " (warning B006H)"),
        (200, json.dumps([json.loads(answer([item()]))]).encode(), ""),
    ],
)
def test_what_the_server_has_counts_as_stored(server, url, folder, status, content, said):
    server.answers = [(status, content)]
    assert send(url, folder) == said


@pytest.mark.parametrize(
    ("status", "content", "error", "reason", "names"),
    [
        (409, answer(failed=[item(failure=0x0122)]), PeerRefused, "object-refused", "0122H"),
        (200, b"", PeerRefused, "object-refused", "does not confirm"),
        (200, b"<xml/>", PeerRefused, "object-refused", "does not confirm"),
        (200, answer([item("1.2.3")]), PeerRefused, "object-refused", "does not confirm"),
        (200, b'{"00081199": {"Value": [1, null, {"00081155": []}]}}', PeerRefused, "object-refused", "not confirm"),
        (415, b"", PeerRefused, "object-refused", "415"),
        (302, b"", PeerRefused, "object-refused", "302"),
        (401, b"", DestinationDown, "access-denied", "401"),
        (403, b"", DestinationDown, "access-denied", "credentials"),
        (503, b"", DestinationDown, "no-answer", "503"),
        (200, b" " * 2_000_000, DestinationDown, "no-answer", "too long"),
    ],
)
def test_what_the_server_does_not_have_is_a_named_failure(server, url, folder, status, content, error, reason, names):
    server.answers = [(status, content)]
    with raises_reason(error, reason, names=(names,)):
        send(url, folder)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_that_closed_an_idle_connection_is_asked_again(server, url, folder, says_so):
    server.closes, server.says_so = True, says_so
    with StowTarget(url).open() as channel:
        for _ in range(3):
            assert channel.send(folder, "segmentation.dcm") == ""
    assert len(server.requests) == 3


def test_a_part_of_an_answer_is_none(server, url, folder):
    server.promises, server.closes = 100, True
    with raises_reason(DestinationDown, "no-answer", names="breaks off"):
        send(url, folder)


def test_an_answer_of_a_byte_now_and_then_holds_nothing(server, url, folder, monkeypatch):
    monkeypatch.setattr(stow, "ANSWER_S", 1.0)
    server.pause_s = 0.1  # each byte is in time, the answer is not
    with raises_reason(DestinationDown, "no-answer", names="too slow"):
        send(url, folder)


def test_nobody_answers(folder):
    with free_port() as port, raises_reason(DestinationDown, "no-connection"):
        send(f"http://127.0.0.1:{port}/dicom-web", folder)


def test_a_file_that_is_gone_is_named(url, folder):
    with StowTarget(url).open() as channel, raises_reason(PeerRefused, "object-unreadable"):
        channel.send(folder, "absent.dcm")


def test_credentials_come_from_files_and_are_read_anew(server, url, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("first\n")
    secret.chmod(0o600)
    send(url, folder, credentials=Credentials("anna", secret))
    secret.write_text("second\n")
    send(url, folder, credentials=Credentials("anna", secret))
    send(url, folder, credentials=Credentials(token_file=secret))
    assert [headers["Authorization"] for _, _, headers, _ in server.requests] == [
        "Basic YW5uYTpmaXJzdA==",
        "Basic YW5uYTpzZWNvbmQ=",
        "Bearer second",
    ]
    secret.unlink()
    with raises_reason(DestinationDown, "access-denied"):
        send(url, folder, credentials=Credentials("anna", secret))


def test_a_server_is_asked_without_sending(server, url):
    assert StowTarget(url).ask() == "answers OPTIONS with 204"
    assert server.requests == []


def test_tls_with_authority_client_certificate_and_names_for_what_fails(tmp_path, folder):
    """The other node is this one: its STOW-RS refuses the SOP class by name, its TLS asks for a certificate."""
    authority, other = Authority(tmp_path / "one"), Authority(tmp_path / "two")
    pair, own = authority.issue("server"), authority.issue("client")
    group = PageTls(pair.certificate, pair.key, ca=authority.ca, client="required")
    node = StowNode(tmp_path / "node", tls=TlsContext("web.tls", group))
    with node.listening():
        url = f"https://127.0.0.1:{node.port}/dicom-web"
        good = ClientTls(authority.ca, certificate=own.certificate, key=own.key)
        assert send(url, folder, tls=TlsContext("to", good)) == ""
        assert StowTarget(url, tls=TlsContext("to", good)).ask() == "answers OPTIONS with 204"
        for wrong, names in (
            (ClientTls(other.ca, certificate=own.certificate, key=own.key), "certificate is not accepted"),
            (ClientTls(fingerprints=("0" * 64,), certificate=own.certificate, key=own.key), "fingerprints"),
        ):
            with raises_reason(DestinationDown, "tls", names=(names,)):
                send(url, folder, tls=TlsContext("to", wrong))
        with pytest.raises(DestinationDown):  # asyncio ends the connection without TLS's word for why
            send(url, folder, tls=TlsContext("to", ClientTls(authority.ca)))
        pinned = ClientTls(fingerprints=(pair.fingerprint,), certificate=own.certificate, key=own.key)
        assert send(url, folder, tls=TlsContext("to", pinned)) == ""
    assert len(node.files) == 1
    node.close()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"url": "https://pacs/dicom-web"}, None),
        ({"url": "https://pacs/dicom-web", "user": "a", "password_file": "p"}, None),
        ({"url": "http://127.0.0.1:8042/dicom-web", "token_file": "t"}, None),
        ({"ae_title": "A", "host": "h", "port": 1}, None),
        ({}, "missing-key"),
        ({"ae_title": "A", "host": "h"}, "missing-key"),
        ({"url": "https://pacs/dicom-web", "ae_title": "A"}, "conflict"),
        ({"url": "https://pacs/dicom-web", "user": "a"}, "missing-key"),
        ({"url": "https://pacs/dicom-web", "user": "a", "password_file": "p", "token_file": "t"}, "conflict"),
        ({"url": "http://pacs/dicom-web", "token_file": "t"}, "invalid-value"),
        ({"url": "http://pacs/dicom-web", "tls": ClientTls()}, "conflict"),
        ({"ae_title": "A", "host": "h", "port": 1, "token_file": "t"}, "invalid-value"),
    ],
)
def test_a_destination_is_an_ae_or_a_server(keys, reason):
    if reason is None:
        Destination("pacs", **keys)
        return
    with raises_reason(SettingsInvalid, reason):
        Destination("pacs", **keys)


@pytest.mark.parametrize("document", [None, 1, [], {}, {"00081199": 1}, {"00081199": {"Value": None}}, [1]])
def test_an_answer_of_any_shape_says_nothing_rather_than_fail(document):
    assert word_of_answer(document, UID) is None


def test_a_failure_without_a_uid_is_the_only_objects():
    for tag in ("0008119A", "00081198"):
        document = {tag: {"Value": [{"00081197": {"Value": [0xC000]}}]}}
        assert word_of_answer(document, UID) == StoredWord(is_stored=False, reason=0xC000)
