"""TLS on the DICOM port: who gets in and who does not, by what name, and that the limits hold behind it."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field

import pytest
from pynetdicom import AE

from certificate_support import Authority
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.receive.pending import Security
from ctflow.node.receive.receiver import VERIFICATION
from ctflow.node.settings.tls import ServerTls
from ctflow.node.tls import TlsContext
from service_support import (
    PATIENCE_S,
    RawPeer,
    RunningScp,
    association_request,
    dcmtk,
    encoded,
    fragment,
    instance,
    store_command,
    wait_until,
)


@dataclass
class Site:
    """A node with TLS, and its authority."""

    node: RunningScp
    authority: Authority
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def client(self, name: str = "client", *, authority: Authority | None = None, **kind) -> ssl.SSLContext:
        """What a peer with this certificate speaks TLS with; without a name it has none."""
        context = ssl.create_default_context(cafile=self.authority.ca)
        if name:
            pair = (authority or self.authority).issue(name, **kind)
            context.load_cert_chain(pair.certificate, pair.key)
        return context

    def connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.node.port), timeout=30)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.fixture
def site(scp, tmp_path):
    """Makes one; `changes` are those of its receiver."""

    def make(*, client: str = "required", plain: bool = False, **changes) -> Site:
        authority = Authority(tmp_path / "certificates")
        pair = authority.issue("server")
        group = ServerTls(pair.certificate, pair.key, ca=authority.ca, client=client)
        context = TlsContext("tls", group)
        rejected: list[tuple[str, str]] = []
        security = Security(lambda: context.context, lambda _host: plain, lambda *what: rejected.append(what))
        return Site(scp(security=security, **changes), authority, rejected)

    return make


class SecuredPeer(RawPeer):
    """A `RawPeer` that speaks TLS."""

    def __init__(self, secured: ssl.SSLSocket) -> None:
        self.socket = secured
        self.socket.sendall(association_request())
        assert self.read_pdu()[0] == 2


def send_with_dcmtk(site: Site, folder, *words: object) -> subprocess.CompletedProcess[str]:
    command = [
        dcmtk("storescu"),
        "-aec",
        "CTFLOW",
        "--scan-directories",
        *map(str, words),
        "127.0.0.1",
        str(site.node.port),
    ]
    environment = {**os.environ, "TCP_NODELAY": "1"}
    return subprocess.run(
        [*command, str(folder)], env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.fixture
def images(tmp_path):
    """Two images, the second of many TLS records."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, rows in ((1, 4), (2, 512)):
        dataset = instance(number, Rows=rows, Columns=512, PixelData=os.urandom(rows * 1024))
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("profile", ["--profile-bcp195-nd", "--profile-bcp195-ex"])
@pytest.mark.parametrize("rsa_bits", [0, 2048])
def test_dcmtk_stores_with_tls(site, images, profile, rsa_bits):
    found = site()
    pair = found.authority.issue("dcmtk", rsa_bits=rsa_bits)
    done = send_with_dcmtk(found, images, "+tls", pair.key, pair.certificate, "+cf", found.authority.ca, profile)
    assert done.returncode == 0, done.stderr
    assert len(found.node.files) == 2
    assert found.rejected == []


def test_dcmtk_echoes_with_tls_and_without_a_certificate_where_none_is_asked(site):
    found = site(client="none")
    words = ["+tla", "+cf", str(found.authority.ca), "-aec", "CTFLOW", "127.0.0.1", str(found.node.port)]
    assert subprocess.run([dcmtk("echoscu"), *words], check=False, timeout=PATIENCE_S).returncode == 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({"name": "late", "days": -1}, "certificate has expired"),
        ({"name": "own", "is_own": True}, "self-signed certificate"),
        ({"name": ""}, "the peer has no certificate"),
        ({"name": "foreign", "authority": "other"}, "unable to get local issuer certificate"),
    ],
)
def test_a_peer_with_a_wrong_certificate_is_rejected_with_the_reason(site, tmp_path, kind, why):
    found, kind = site(), dict(kind)
    if kind.pop("authority", None):
        kind["authority"] = Authority(tmp_path / "other", "other")
    with pytest.raises(OSError):  # noqa: PT011, SIM117  # an alert, or a reset by the end of the connection
        with found.connect(found.client(**kind)) as secured:
            secured.sendall(association_request())
            if not secured.recv(1):
                raise ConnectionResetError
    wait_until(lambda: found.rejected, "the rejection is recorded")
    ((peer, said),) = found.rejected
    assert peer == "127.0.0.1"
    assert why in said


def test_dcmtk_without_a_certificate_is_rejected(site, images):
    found = site()
    assert send_with_dcmtk(found, images, "+tla", "+cf", found.authority.ca).returncode != 0
    wait_until(lambda: found.rejected, "the rejection is recorded")
    assert found.rejected == [("127.0.0.1", "the peer has no certificate")]
    assert found.node.files == []


def test_a_peer_without_tls_is_rejected_in_its_own_words(site, images):
    found = site()
    done = send_with_dcmtk(found, images)
    assert "Association Rejected" in done.stdout + done.stderr
    wait_until(lambda: found.rejected, "the rejection is recorded")
    assert found.rejected == [("127.0.0.1", "it came without TLS")]
    assert found.node.files == []


def test_a_peer_may_come_without_tls_where_the_site_says_so(site, images):
    found = site(plain=True)
    assert send_with_dcmtk(found, images).returncode == 0
    pair = found.authority.issue("dcmtk")
    assert send_with_dcmtk(found, images, "+tls", pair.key, pair.certificate, "+cf", found.authority.ca).returncode == 0


def test_tls_to_a_port_without_tls_ends_by_name(scp, tmp_path):
    rejected = []
    node = scp(security=Security(rejected=lambda *what: rejected.append(what)))
    with (
        socket.create_connection(("127.0.0.1", node.port), timeout=30) as plain,
        pytest.raises(ssl.SSLError, match="(?i)handshake.failure"),
    ):
        ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")
    wait_until(lambda: rejected, "the rejection is recorded")
    assert rejected == [("127.0.0.1", "it speaks TLS, and this port has none (the group tls of the settings)")]


def test_a_peer_must_have_its_own_certificate(site):
    mine: dict[str, str] = {}

    def refusal(_title: str, _host: str, certificate: str | None) -> str:
        return "" if certificate == mine["fingerprint"] else "another certificate"

    found = site(certificate_refusal=refusal)
    mine["fingerprint"] = found.authority.issue("mine").fingerprint
    for name, expected in (("mine", True), ("other", False)):
        ae = AE("ROUTER")
        ae.add_requested_context(VERIFICATION)
        context = found.client() if not expected else ssl.create_default_context(cafile=found.authority.ca)
        if expected:
            context.load_cert_chain(*(found.authority._folder / f"{name}.{end}" for end in ("crt", "key")))
        association = ae.associate("127.0.0.1", found.node.port, ae_title="CTFLOW", tls_args=(context, "127.0.0.1"))
        assert association.is_established is expected
        assert expected or association.is_rejected
        if expected:
            association.release()
    wait_until(lambda: found.rejected, "the rejection is recorded")
    assert found.rejected == [("127.0.0.1", "another certificate")]


def test_requests_that_share_a_record_are_all_answered(site):
    """What OpenSSL holds decrypted is not in the kernel: nobody may wait for the kernel then."""
    found = site()
    peer = SecuredPeer(found.connect(found.client()))
    parts = b""
    for number in (1, 2, 3):
        dataset = instance(number)
        content = fragment(RawPeer.CT, 3, store_command(dataset)) + fragment(RawPeer.CT, 2, encoded(dataset))
        parts += b"\x04\0" + len(content).to_bytes(4, "big") + content
    release = bytes([5, 0, 0, 0, 0, 4, 0, 0, 0, 0])
    peer.socket.sendall(parts + release)
    assert [peer.read_response().Status for _ in range(3)] == [0, 0, 0]
    assert peer.read_pdu()[0] == 6
    peer.close()
    assert len(found.node.files) == 3


def test_a_request_may_come_byte_by_byte(site):
    found = site()
    secured = found.connect(found.client())
    for byte in association_request():
        secured.sendall(bytes([byte]))
    assert secured.recv(1) == b"\x02"
    secured.close()


@pytest.mark.parametrize("head", [b"\x04\0\x7f\xff\xff\xff", b"GET / ", b"\x01\0\x7f\xff\xff\xff"])
def test_what_is_no_request_is_aborted_behind_tls(site, head):
    found = site()
    secured = found.connect(found.client())
    secured.sendall(head)
    assert secured.recv(1) == b"\x07"
    secured.close()


def test_a_longer_pdu_than_allowed_is_aborted_before_it_is_read(site):
    found = site(most_pdu=16384)
    peer = SecuredPeer(found.connect(found.client()))
    peer.socket.sendall(b"\x04\0\x10\0\0\0" + bytes(1000))
    assert peer.read_pdu()[0] == 7
    peer.close()


def test_a_pdu_that_never_ends_is_ended(site):
    found = site(idle_s=1.0)
    peer = SecuredPeer(found.connect(found.client()))
    peer.socket.sendall(b"\x04\0\0\0\1\0" + bytes(10))
    assert peer.read_pdu()[0] == 7
    peer.close()


def test_half_done_handshakes_take_no_thread_and_keep_nobody_waiting(site):
    found = site(idle_s=30.0)
    context = found.client()
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1").do_handshake()
    first = hello.read()
    before = threading.active_count()
    idle = []
    try:
        for number in range(200):
            idle.append(socket.create_connection(("127.0.0.1", found.node.port), timeout=30))
            # Nothing; a part of a record; a whole one, after which the node waits for the peer's answer.
            idle[-1].sendall((b"", first[: len(first) // 2], first)[number % 3])
        began = time.monotonic()
        peer = SecuredPeer(found.connect(context))
        assert threading.active_count() <= before + 2
        peer.close()
        assert time.monotonic() - began < PATIENCE_S
    finally:
        for each in idle:
            each.close()


def test_a_connection_that_does_not_finish_its_handshake_is_ended(site):
    found = site(idle_s=1.0)
    with socket.create_connection(("127.0.0.1", found.node.port), timeout=30) as plain:
        plain.sendall(b"\x16\x03\x01\x02\x00")
        assert plain.recv(1) == b""


@pytest.mark.parametrize("seed", range(8))
def test_rubbish_ends_the_handshake_and_nothing_else(site, seed):
    found = site()
    noise = bytes([0x16, 3, 1]) + bytes((seed * 37 + place * 101) % 256 for place in range(200))
    with socket.create_connection(("127.0.0.1", found.node.port), timeout=30) as plain:
        plain.sendall(noise)
        plain.shutdown(socket.SHUT_WR)
        while plain.recv(100):
            pass
    SecuredPeer(found.connect(found.client())).close()


def test_images_come_whole_through_tls(site):
    found = site()
    ae = AE("ROUTER")
    ae.add_requested_context(CT_IMAGE_STORAGE)
    association = ae.associate("127.0.0.1", found.node.port, ae_title="CTFLOW", tls_args=(found.client(), "127.0.0.1"))
    sent = [instance(number, Rows=512, Columns=512, PixelData=os.urandom(2**19)) for number in range(1, 6)]
    assert [association.send_c_store(each).Status for each in sent] == [0] * 5
    association.release()
    kept = b"".join(path.read_bytes() for path in found.node.files)
    assert all(each.PixelData in kept for each in sent)
