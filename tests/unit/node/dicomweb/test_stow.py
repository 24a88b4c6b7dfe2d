"""STOW-RS as senders speak it, and as they should not."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import logging
import socket
import threading
from dataclasses import replace
from io import BytesIO

import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom.uid import JPEGBaseline8Bit, RLELossless

from ctflow.node.settings.groups import Peer
from ctflow.node.settings.tls import ServerTls
from service_support import encoded, instance, read_header, wait_until
from stow_support import CONTENT_TYPE, PATH, StowNode, failed, file_of, multipart, post, raw, stored

ONE = "1.2.826.0.1.1"


@pytest.fixture
def stow(tmp_path):
    """Makes nodes that listen, and closes them."""
    opened = []

    def make(**changes) -> StowNode:
        node = StowNode(tmp_path / f"node{len(opened)}", **changes)
        context = node.listening()
        context.__enter__()
        opened.append((node, context))
        return node

    yield make
    for node, context in opened:
        context.__exit__(None, None, None)
        node.close()
        assert node.shared.add(0) == 0, "bytes are still counted"


def test_instances_are_on_the_disk_and_in_the_journal_when_they_are_in_the_answer(stow):
    node = stow()
    status, document, headers = post(node.port, multipart(*(file_of(instance(number)) for number in range(1, 4))))
    assert (status, headers["Content-Type"]) == (200, "application/dicom+json")
    assert stored(document) == [f"1.2.826.0.1.{number}" for number in range(1, 4)]
    assert failed(document) == {}
    assert document["00081190"] == {"vr": "UR"}
    assert [read_header(path).SOPInstanceUID for path in node.files] != []
    (series,) = node.journal.series()
    assert (series.instances, series.calling_ae, series.peer) == (3, "STOW", "127.0.0.1")


def test_the_file_is_the_one_that_c_store_would_have_made(stow):
    """So that the same instance by both ways is one."""
    node = stow()
    sent = instance()
    sent.file_meta.ImplementationVersionName = "OTHER"
    post(node.port, multipart(file_of(sent)))
    (path,) = node.files
    assert path.read_bytes().endswith(encoded(instance()))
    assert read_header(path).file_meta.ImplementationVersionName.startswith("CTFLOW")
    status, document, _ = post(node.port, multipart(file_of(instance())))
    assert (status, stored(document)) == (200, [ONE])
    assert len(node.files) == 1
    assert node.journal.series()[0].duplicates == 1


def test_a_mixed_request_is_answered_for_each_instance(stow):
    node = stow()
    parts = [
        file_of(instance(1)),
        file_of(instance(2, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")),
        b"no DICOM at all",
        file_of(instance(3))[:400],
    ]
    status, document, _ = post(node.port, multipart(*parts))
    assert status == 202
    assert stored(document) == [ONE]
    assert failed(document) == {"1.2.826.0.1.2": 0x0122, "": 0xC000, "1.2.826.0.1.3": 0xC000}
    assert len(node.files) == 1


def test_other_content_under_a_known_uid_is_a_conflict(stow):
    node = stow()
    post(node.port, multipart(file_of(instance(1))))
    status, document, _ = post(node.port, multipart(file_of(instance(1, PixelData=b"\1" * 32))))
    assert (status, failed(document)) == (409, {ONE: 0xC001})


@pytest.mark.parametrize(("study", "status", "reason"), [("1.2.826.0.2", 200, None), ("1.2.826.0.9", 409, 0xA901)])
def test_the_study_of_the_address_must_be_that_of_the_instance(stow, study, status, reason):
    node = stow()
    found, document, _ = post(node.port, multipart(file_of(instance())), f"{PATH}/{study}")
    assert found == status
    assert failed(document).get(ONE) == reason
    assert len(node.files) == (status == 200)


@pytest.mark.parametrize(
    ("syntax", "reason"), [(RLELossless, None), (JPEGBaseline8Bit, 0xC122), ("1.2.3.4", 0xC122), ("", 0xC122)]
)
def test_only_syntaxes_that_can_be_read_exactly_are_taken(stow, syntax, reason):
    node = stow()
    content = file_of(instance())
    syntax = str(syntax).encode()
    value = (b"1.2.840.10008.1.2.1\0", syntax + b"\0" * (len(syntax) % 2))
    content = content.replace(b"UI\x14\0" + value[0], b"UI" + len(value[1]).to_bytes(2, "little") + value[1])
    headers = "Content-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2.5\r\n"
    _, document, _ = post(node.port, multipart(content, headers=headers))
    assert failed(document).get(ONE) == reason


def test_a_full_disk_is_temporary(stow):
    node = stow(least_free=10**18)
    status, document, headers = post(node.port, multipart(file_of(instance())))
    assert (status, failed(document), headers["Retry-After"]) == (503, {ONE: 0xA700}, "30")
    assert node.files == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "application/dicom"}, 415),
        ({"Content_Type": "multipart/form-data; boundary=BOUNDARY"}, 415),
        ({"Content_Type": CONTENT_TYPE.replace("application/dicom", "application/dicom+json")}, 415),
        ({"Content_Type": 'multipart/related; type="application/dicom"'}, 400),
        ({"Content_Type": CONTENT_TYPE, "Content_Encoding": "gzip"}, 415),
        ({"Accept": "application/dicom+xml"}, 406),
        ({"Accept": "text/html, application/xml;q=0.9"}, 406),
        ({"Accept": "application/dicom+xml, application/dicom+json;q=0.5"}, 200),
        ({"Accept": "*/*"}, 200),
        ({"Host": "elsewhere.example.org"}, 421),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_its_head(stow, headers, status):
    node = stow()
    assert post(node.port, multipart(file_of(instance())), **headers)[0] == status
    assert len(node.files) == (status == 200)


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ("Content-Type: application/dicom+json\r\n", None),
        ("Content-Type: multipart/mixed; boundary=INNER\r\n", None),
        ("Content-Type: application/dicom\r\nContent-Transfer-Encoding: base64\r\n", None),
        ("Content-Type: application/dicom\r\n", b""),
        ("Content-Type: application/dicom\r\n", bytes(128) + b"DICM"),
        ("Content-Type: application/dicom\r\n", bytes(128) + b"DICM" + b"\xff" * 100),
    ],
)
def test_a_part_that_is_no_instance_fails_alone(stow, headers, content):
    node = stow()
    body = multipart(file_of(instance()) if content is None else content, headers=headers)
    status, document, _ = post(node.port, body)
    assert status == 409
    assert len(failed(document)) == 1
    assert node.files == []


def test_a_part_whose_type_cannot_be_read_fails_alone(stow):
    node = stow()
    broken = "Content-Type: application/dicom; x*0*='; x*=1\r\n"
    status, document, _ = post(node.port, multipart(file_of(instance()), headers=broken))
    assert (status, list(failed(document))) == (409, [""])


def test_a_server_that_fails_within_a_part_keeps_no_bytes_counted(stow, monkeypatch):
    node = stow()
    monkeypatch.setattr("ctflow.node.dicomweb.stow.meta_information", lambda _content: 1 / 0)
    assert post(node.port, multipart(*[file_of(instance())] * 3))[0] == 500
    assert node.shared.add(0) == 0


def test_nobody_is_led_to_another_address(stow):
    node = stow()
    for path in (f"{PATH}/", "/events/", "/series/x/"):
        status, _, headers = post(node.port, b"", path, Host="evil.example.org")
        assert (status, headers["Location"]) in ((404, None), (421, None))


def test_a_verification_is_no_instance(stow):
    status, document, _ = post(stow().port, multipart(file_of(instance(SOPClassUID="1.2.840.10008.1.1"))))
    assert (status, failed(document)) == (409, {ONE: 0x0122})


def head(length: str, more: str = "") -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\n{length}\r\n{more}\r\n".encode()


def test_a_length_beyond_the_limit_is_refused_before_a_byte_of_the_body(stow):
    node = stow()
    said = raw(node.port, head("Content-Length: 300000000000", "Expect: 100-continue\r\n"))
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in said
    assert raw(node.port, head("Content-Length: 300000000000")).startswith(b"HTTP/1.1 413 ")


def test_chunks_without_a_length_are_refused_where_they_exceed_the_limit(stow):
    node = stow(most_bytes=100_000)
    body = multipart(bytes(200_000))
    chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    assert post(node.port, iter(chunks))[0] == 413
    small = multipart(file_of(instance()))
    found = [small[start : start + 100] for start in range(0, len(small), 100)]
    assert post(node.port, iter(found))[0] == 200


def test_more_parts_than_the_limit_are_refused(stow):
    node = stow(most_parts=3)
    assert post(node.port, multipart(*(file_of(instance(number)) for number in range(1, 6))))[0] == 413


def test_whoever_expects_a_continue_gets_it_before_the_body(stow):
    node = stow()
    body = multipart(file_of(instance()))
    said = raw(node.port, head(f"Content-Length: {len(body)}", "Expect: 100-continue\r\nConnection: close\r\n") + body)
    assert said.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200 OK" in said


def test_a_body_that_is_cut_short_is_no_success_and_what_came_whole_is_kept(stow):
    node = stow()
    body = multipart(file_of(instance(1)), file_of(instance(2)))[:-40]
    status, document, _ = post(node.port, body)
    assert (status, "text" in document) == (400, True)
    assert len(node.files) == 1


def test_a_sender_that_goes_away_leaves_nothing_behind(stow, caplog):
    node = stow()
    body = multipart(file_of(instance(1)))[:-40]
    raw_head = head(f"Content-Length: {len(body) + 100}")
    with caplog.at_level(logging.WARNING), socket.create_connection(("127.0.0.1", node.port), timeout=60) as gone:
        gone.sendall(raw_head + body)
    wait_until(lambda: node.refused == ["request"], "the node notices")
    assert node.files == []


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: local",
        head("Content-Length: 100000") + multipart(b"x" * 100)[:50],
        head("Transfer-Encoding: chunked") + b"10\r\n--BOU",
    ],
)
def test_a_connection_that_falls_silent_is_ended(stow, monkeypatch, begun):
    for name, seconds in (("_HEAD_S", 0.3), ("_SILENCE_S", 0.3), ("_CHECKED_S", 0.1)):
        monkeypatch.setattr(f"ctflow.node.web.server.{name}", seconds)
    node = stow()
    with socket.create_connection(("127.0.0.1", node.port), timeout=60) as connection:
        connection.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
    assert post(node.port, multipart(file_of(instance())))[0] == 200


def test_senders_beside_each_other_all_get_their_answers(stow):
    node = stow()
    statuses = []

    def send(first: int) -> None:
        for number in range(first, first + 5):
            statuses.append(post(node.port, multipart(file_of(instance(number))))[0])

    threads = [threading.Thread(target=send, args=(1 + 5 * index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 30
    assert node.journal.series()[0].instances == 30


def test_an_address_that_is_no_peer_is_refused_and_one_with_the_right_title_is_not(stow, tmp_path):
    node = StowNode(tmp_path / "other")
    loopback = ipaddress.ip_network("127.0.0.1/32")
    tls = ServerTls(tmp_path / "certificate", ca=tmp_path / "ca")  # of the DICOM port, which is not here
    for peers, status in (
        ((Peer(ipaddress.ip_network("10.0.0.1/32")),), 403),
        ((Peer(loopback, "ROUTER"),), 403),
        ((Peer(loopback, "STOW"),), 200),
        ((Peer(loopback),), 200),
        ((Peer(loopback, fingerprints=("AB" * 32,)),), 403),
        ((Peer(loopback, fingerprints=("AB" * 32,)), Peer(loopback, "STOW")), 200),
    ):
        node.node = replace(node.node, settings=replace(node.settings, peers=peers, tls=tls))
        with node.listening():
            assert post(node.port, multipart(file_of(instance())))[0] == status
    node.close()


def test_a_proxy_that_the_settings_do_not_name_lends_nobody_its_address(stow):
    node = stow()
    assert post(node.port, multipart(file_of(instance())), X_Forwarded_For="10.9.9.9")[0] == 403
    assert node.refused == ["peer"]


def test_the_server_says_what_it_can(stow):
    node = stow()
    for path in ("/dicom-web", PATH):
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
        connection.request("OPTIONS", path)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (204, "OPTIONS, POST")
        connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
    connection.request("GET", PATH)
    assert connection.getresponse().status == 405
    connection.close()


def test_dicomweb_client_stores(stow):
    node = stow()
    client = DICOMwebClient(f"http://127.0.0.1:{node.port}/dicom-web", chunk_size=1000)
    sent = [pydicom.dcmread(BytesIO(file_of(instance(number)))) for number in range(1, 5)]
    answer = client.store_instances(sent[:3])
    assert len(answer.ReferencedSOPSequence) == 3
    assert client.store_instances(sent[3:], "1.2.826.0.2").ReferencedSOPSequence[0].ReferencedSOPClassUID
    assert node.journal.series()[0].instances == 4


def test_nothing_of_an_instance_is_logged(stow, caplog):
    with caplog.at_level(logging.DEBUG):
        node = stow()
        post(node.port, multipart(file_of(instance(1)), file_of(instance(2, SOPClassUID="1.2.3")), b"SECRET"))
    own = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("ctflow"))
    assert "SECRET" not in own
    assert "1.2.826" not in own
