"""The page with TLS: new certificates without a restart, and what speaks no TLS."""

from __future__ import annotations

import http.client
import logging
import shutil
import socket
import ssl

import pytest

from certificate_support import Authority
from ctflow.node.settings.tls import PageTls
from ctflow.node.tls import TlsContext
from service_support import wait_until
from stow_support import StowNode


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "certificates")


@pytest.fixture
def node(tmp_path, authority):
    pair = authority.issue("server")
    context = TlsContext("web.tls", PageTls(pair.certificate, pair.key))
    node = StowNode(tmp_path / "node", tls=context)
    with node.listening():
        yield node
    node.close()


def get(node: StowNode, authority: Authority, path: str = "/") -> tuple[http.client.HTTPResponse, str, dict]:
    context = ssl.create_default_context(cafile=authority.ca)
    connection = http.client.HTTPSConnection("localhost", node.port, timeout=60, context=context)
    connection.request("GET", path)
    peer = connection.sock.getpeercert()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text, peer


def test_the_page_is_reached_with_tls_and_only_so_from_then_on(node, authority):
    answer, text, _ = get(node, authority)
    assert answer.status == 200
    assert "Ready" in text
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert answer.headers["Set-Cookie"].startswith("__Host-ctflow=")
    assert "Secure" in answer.headers["Set-Cookie"]


def test_a_new_certificate_is_used_without_a_restart(node, authority, tmp_path):
    _, _, before = get(node, authority)
    new = authority.issue("another")
    shutil.copy(new.certificate, tmp_path / "certificates" / "server.crt")
    shutil.copy(new.key, tmp_path / "certificates" / "server.key")
    assert node.node.tls.look() is True
    _, _, after = get(node, authority)
    assert before["serialNumber"] != after["serialNumber"]


def test_a_browser_without_tls_is_named_in_the_log(node, caplog):
    with caplog.at_level(logging.WARNING):
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
        connection.request("GET", "/")
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()
        connection.close()
        wait_until(lambda: "speaks HTTP, not TLS" in caplog.text, "the log names it")


def test_old_versions_of_tls_are_refused(node):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA256:AES256-GCM-SHA384")
    connection = http.client.HTTPSConnection("127.0.0.1", node.port, timeout=60, context=context)
    with pytest.raises(OSError, match="HANDSHAKE_FAILURE|alert|EOF"):
        connection.connect()


def test_connections_that_never_begin_tls_count_too(node, authority):
    context = ssl.create_default_context(cafile=authority.ca)
    silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(90)]
    try:
        with socket.create_connection(("127.0.0.1", node.port), 60, ("127.0.0.2", 0)) as other:
            context.wrap_socket(other, server_hostname="localhost").close()
        closed = 0
        for each in silent[64:]:
            each.settimeout(60)
            try:
                closed += each.recv(1) == b""
            except ConnectionError:
                closed += 1
        assert closed == 26
    finally:
        for each in silent:
            each.close()
