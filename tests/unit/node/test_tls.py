"""Contexts for TLS: what they accept, what they reject by name, and how they follow their files."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from dataclasses import replace

import pytest

from certificate_support import Authority
from ctflow.core.errors import SettingsInvalid
from ctflow.node.certificates import CertificateWatch
from ctflow.node.settings.tls import ClientTls, ServerTls
from ctflow.node.tls import TlsContext, tls_failure
from reasons import raises_reason


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "certificates")


def server_tls(authority: Authority, **changes) -> ServerTls:
    pair = authority.issue("server")
    return ServerTls(**{"certificate": pair.certificate, "key": pair.key, "ca": authority.ca, **changes})


def client_tls(authority: Authority, name: str = "client", **changes) -> ClientTls:
    pair = authority.issue(name, **{key: changes.pop(key) for key in ("days", "is_own") if key in changes})
    return ClientTls(**{"ca": authority.ca, "certificate": pair.certificate, "key": pair.key, **changes})


def handshake(server: ssl.SSLContext, client: TlsContext | ssl.SSLContext, host: str = "127.0.0.1") -> tuple[str, str]:
    """Why server and client each refused; the version where they did not."""
    context = client.context if isinstance(client, TlsContext) else client
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)
    said = []

    def serve() -> None:
        try:
            with server.wrap_socket(ours, server_side=True) as secured:
                secured.sendall(b"x")
                said.append(secured.version())
        except OSError as error:
            said.append(tls_failure(error))
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context.wrap_socket(theirs, server_hostname=host) as secured:
            secured.recv(1)
            seen = secured.version()
    except OSError as error:
        seen = tls_failure(error)
    finally:
        theirs.close()
    thread.join()
    return said[0], seen


def test_both_sides_agree_on_the_newest_version(authority):
    found = handshake(TlsContext("tls", server_tls(authority)).context, TlsContext("to", client_tls(authority)))
    assert found == ("TLSv1.3", "TLSv1.3")


@pytest.mark.parametrize(
    ("client", "why"),
    [
        ({"name": "late", "days": -1}, "certificate has expired"),
        ({"name": "own", "is_own": True}, "self-signed certificate"),
        ({"certificate": None, "key": None}, "the peer has no certificate"),
    ],
)
def test_a_wrong_certificate_of_a_client_is_named(authority, client, why):
    server = TlsContext("tls", server_tls(authority)).context
    said, _ = handshake(server, TlsContext("to", client_tls(authority, **client)))
    assert why in said


def test_a_client_of_another_authority_is_refused(authority, tmp_path):
    other = Authority(tmp_path / "other", "other")
    client = client_tls(other, ca=authority.ca)
    said, _ = handshake(TlsContext("tls", server_tls(authority)).context, TlsContext("to", client))
    assert "unable to get local issuer certificate" in said


def test_a_self_signed_client_is_accepted_where_it_is_among_the_authorities(authority):
    client = client_tls(authority, "own", is_own=True)
    server = server_tls(authority, ca=client.certificate)
    assert handshake(TlsContext("tls", server).context, TlsContext("to", client))[0] == "TLSv1.3"


def test_a_revoked_client_is_refused(authority):
    client, other = client_tls(authority), client_tls(authority, "other")
    pair = authority.issue("client")
    authority.revoke(pair)
    server = TlsContext("tls", server_tls(authority)).context
    assert "revoked" in handshake(server, TlsContext("to", client))[0]
    assert handshake(server, TlsContext("to", other))[0] == "TLSv1.3"


@pytest.mark.parametrize("way", ["context", "front"])
def test_a_client_that_is_revoked_later_is_refused_from_then_on(authority, way):
    client, pair = client_tls(authority), authority.issue("client")
    client = replace(client, certificate=pair.certificate, key=pair.key)
    server = TlsContext("tls", server_tls(authority))
    assert handshake(getattr(server, way), TlsContext("to", client))[0] == "TLSv1.3"
    authority.revoke(pair)
    assert server.look()
    assert "revoked" in handshake(getattr(server, way), TlsContext("to", client))[0]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_outlives_the_check_of_its_certificate(authority, version):
    server = TlsContext("tls", server_tls(authority)).front
    client = TlsContext("to", client_tls(authority)).context
    client.sslsocket_class = ssl.SSLSocket
    client.maximum_version = version
    session = None

    def serve(connection: socket.socket) -> None:
        with server.wrap_socket(connection, server_side=True) as secured:
            secured.sendall(b"x")

    for _ in range(2):
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=serve, args=(ours,))
        thread.start()
        with client.wrap_socket(theirs, server_hostname="127.0.0.1", session=session) as secured:
            secured.recv(1)
            session = secured.session
            assert not secured.session_reused
        thread.join()


def test_old_versions_and_weak_suites_are_refused(authority):
    server = TlsContext("tls", server_tls(authority, client="none")).context
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE+AESGCM")
    assert handshake(server, old)[0] == "TLSv1.2"
    old.set_ciphers("AES256-SHA:@SECLEVEL=0")
    assert "no cipher suite of BCP 195" in handshake(server, old)[0]
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert "no TLS 1.2 or newer" in handshake(server, old)[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"host": "node.example.org"}, "Hostname mismatch"),
        ({"host": "node.example.org", "verify_name": False}, ""),
        ({"other": True}, "unable to get local issuer certificate"),
        ({"ca": None}, "unable to get local issuer certificate"),
        ({"ca": None, "pinned": True, "host": "node.example.org"}, ""),
        ({"ca": None, "fingerprints": ("0" * 64,)}, "not one of `fingerprints`"),
        ({"fingerprints": ("0" * 64,)}, "not one of `fingerprints`"),
        ({"ca": None, "pinned": True, "days": -1}, "expired"),
    ],
)
def test_a_server_is_accepted_by_authority_name_and_fingerprint(authority, tmp_path, changes, why):
    changes = dict(changes)
    pair = authority.issue("server", days=changes.pop("days", 30))
    server = ServerTls(pair.certificate, pair.key, client="none")
    if changes.pop("other", False):
        changes["ca"] = Authority(tmp_path / "other", "other").ca
    if changes.pop("pinned", False):
        changes["fingerprints"] = ("1" * 64, pair.fingerprint)
    host = changes.pop("host", "127.0.0.1")
    client = TlsContext("destinations[1].tls", ClientTls(**{"ca": authority.ca, **changes}))
    client.forget_failure()
    _, seen = handshake(TlsContext("tls", server).context, client, host)
    assert seen.startswith("TLS") if not why else why in seen
    assert why in client.failure
    assert bool(why) == bool(client.failure)


def test_a_client_is_told_that_the_server_wants_a_certificate(authority):
    client = TlsContext("to", client_tls(authority, certificate=None, key=None))
    handshake(TlsContext("tls", server_tls(authority)).context, client)
    assert client.failure == "the peer wants a certificate from this node"


def test_a_key_may_have_a_password(authority, tmp_path):
    pair = authority.issue("server", password=b"secret")
    file = tmp_path / "password"
    file.write_text("secret\n")
    server = ServerTls(pair.certificate, pair.key, file, authority.ca)
    assert handshake(TlsContext("tls", server).context, TlsContext("to", client_tls(authority)))[0] == "TLSv1.3"
    for wrong, why in ((None, "it has a password: give key_password_file"), ("other", "or has another password")):
        file.write_text(wrong or "")
        changed = replace(server, key_password_file=file if wrong else None)
        with raises_reason(SettingsInvalid, "certificate", names=why):
            TlsContext("tls", changed)


@pytest.mark.parametrize(
    ("key", "content", "names"),
    [
        ("certificate", None, "tls.certificate: file.pem: it cannot be read (No such file or directory)"),
        ("certificate", b"no", "tls.certificate: file.pem: it holds no certificate in PEM form"),
        ("certificate", b"x" * (2**20 + 1), "larger than 1 MiB"),
        ("key", b"no", "tls.key: file.pem: it holds no private key in PEM form"),
        ("ca", b"no", "tls.ca: file.pem: it holds no certificate in PEM form"),
        ("ca", b"", "tls.ca: file.pem: it holds no certificate in PEM form"),
        ("key_password_file", None, "tls.key_password_file: file.pem: it cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(authority, tmp_path, key, content, names):
    file = tmp_path / "file.pem"
    if content is not None:
        file.write_bytes(content)
    with raises_reason(SettingsInvalid, "certificate", names=names):
        TlsContext("tls", server_tls(authority, **{key: file}))


def test_a_broken_list_of_revoked_certificates_is_named_and_ends_no_watch(authority):
    watched = Watched(authority)
    good = authority.ca.read_bytes()
    authority.ca.write_bytes(good + b"-----BEGIN X509 CRL-----\nbm8=\n-----END X509 CRL-----\n")
    with raises_reason(SettingsInvalid, "certificate", names="its list of revoked certificates cannot be read"):
        TlsContext("tls", server_tls(authority))
    watched.look()
    assert watched.look() == ["certificates-broken"]
    assert "its list of revoked certificates cannot be read" in watched.context.problem


def test_a_key_of_another_certificate_is_named(authority):
    with raises_reason(SettingsInvalid, "certificate", names="it does not belong to the certificate"):
        TlsContext("tls", server_tls(authority, key=authority.issue("other").key))


class Watched:
    """A server's context that is watched, and the events of the watch."""

    def __init__(self, authority: Authority) -> None:
        self.authority, self.group = authority, server_tls(authority)
        self.context = TlsContext("tls", self.group)
        self.events: list[tuple[str, str]] = []
        self.watch = CertificateWatch([self.context], lambda *event: self.events.append(event[:2]))

    def look(self) -> list[str]:
        self.watch.look_at(self.context)
        return [kind for kind, _ in self.events]


def served(context: ssl.SSLContext, authority: Authority, expected: str) -> bool:
    """Whether a client gets the certificate with this fingerprint."""
    client = TlsContext("to", client_tls(authority, fingerprints=(expected,)))
    return handshake(context, client)[1].startswith("TLS")


def test_changed_files_are_taken_and_connections_get_the_new_ones(authority):
    watched = Watched(authority)
    front = watched.context.front
    assert watched.look() == []
    newer = authority.issue("server", days=60)
    assert not served(front, authority, newer.fingerprint)
    assert watched.look() == ["certificates"]
    assert served(watched.context.context, authority, newer.fingerprint)
    assert served(front, authority, newer.fingerprint)
    assert watched.look() == ["certificates"]


def test_broken_files_leave_the_earlier_ones_in_use_and_are_told_once(authority):
    watched = Watched(authority)
    before = watched.context.context
    watched.group.certificate.write_bytes(b"half a certif")
    assert watched.look() == [], "another file may follow"
    assert watched.look() == ["certificates-broken"]
    assert watched.look() == ["certificates-broken"]
    assert watched.context.context is before
    assert watched.watch.remarks()[0].startswith("tls.certificate: server.crt: it holds no certificate in PEM form")
    authority.issue("server", days=90)
    assert watched.look() == ["certificates-broken", "certificates"]
    assert watched.watch.remarks() == []


def test_a_new_authority_takes_effect_and_the_old_one_loses_it(authority, tmp_path):
    watched, other = Watched(authority), Authority(tmp_path / "other", "other")
    theirs = client_tls(other, ca=authority.ca)
    front = watched.context.front
    assert "unable to get" in handshake(front, TlsContext("to", theirs))[0]
    ours = TlsContext("to", client_tls(authority))
    known = authority.ca.read_bytes()
    keep = tmp_path / "keep.pem"
    keep.write_bytes(known)
    watched.group.ca.write_bytes(other.ca.read_bytes())
    watched.look()
    for context in (watched.context.context, front):
        assert handshake(context, TlsContext("to", replace(theirs, ca=keep)))[0] == "TLSv1.3"
        assert "not accepted" in handshake(context, ours)[0]


def test_the_last_days_of_a_certificate_are_told_once_a_day(authority, caplog):
    pair = authority.issue("server", days=20.5)
    context = TlsContext("tls", ServerTls(pair.certificate, pair.key, client="none"))
    watch = CertificateWatch([context], lambda *_: None)
    with caplog.at_level(logging.WARNING):
        watch.look_at(context)
        watch.look_at(context)
    assert len(caplog.records) == 1
    assert "in 20 days" in caplog.text
    assert "in 20 days" in watch.remarks()[0]
    authority.issue("server", days=40)
    watch.look_at(context)
    assert watch.remarks() == []


def test_rejected_peers_are_recorded_once_a_minute(authority):
    events = []
    watch = CertificateWatch([], lambda *event: events.append(event))
    for _ in range(5):
        watch.rejected("10.1.2.3", "the peer has no certificate")
    watch.rejected("10.1.2.4", "the peer has no certificate")
    watch.start()
    watch.stop()
    assert events == [("tls-rejected", "the peer has no certificate", peer) for peer in ("10.1.2.3", "10.1.2.4")]
