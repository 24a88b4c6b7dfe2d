"""The page's server against those who keep it busy."""

from __future__ import annotations

import http.client
import socket

import pytest

from ctflow.node.settings.values import read_network
from ctflow.node.settings.web import Proxy
from ctflow.node.settings.webhooks import Webhook
from ctflow.node.web import app
from node_support import Ward
from stow_support import StowNode


def health(port: int, source: str = "127.0.0.1") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
    connection.close()
    return status


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("is_proxy", [False, True])
def test_one_address_keeps_neither_others_out_nor_all_descriptors(tmp_path, is_proxy):
    proxy = Proxy(addresses=(read_network("127.0.0.1"),)) if is_proxy else Proxy()
    node = StowNode(tmp_path / "node", proxy=proxy)
    with node.listening():
        idle = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(90)]
        try:
            assert health(node.port, "127.0.0.2") == 200
            assert sum(map(is_closed, idle[60:])) == (0 if is_proxy else 26)
            idle.pop(0).close()
            assert health(node.port, "127.0.0.2") == 200
        finally:
            for each in idle:
                each.close()
        assert health(node.port) == 200
    node.close()


def test_a_form_that_comes_byte_by_byte_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "_FORM_S", 0.2)
    node = StowNode(tmp_path / "node")
    with node.listening(), socket.create_connection(("127.0.0.1", node.port), timeout=60) as connection:
        kind = b"Content-Type: application/x-www-form-urlencoded"
        connection.sendall(
            b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n" + kind + b"\r\n\r\na"
        )
        assert b" 403 " in connection.recv(65536)
    node.close()


def test_a_webhook_is_among_the_destinations_without_what_may_be_its_secret(tmp_path):
    ward = Ward(tmp_path / "node", destinations=())
    file = tmp_path / "secret"
    hook = Webhook("chat", "https://hooks.example.org/services/T0/SECRET", file)
    object.__setattr__(ward.settings, "webhooks", (hook,))
    node = StowNode(tmp_path / "other")
    object.__setattr__(node.node, "settings", ward.settings)
    with node.listening():
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
        connection.request("GET", "/")
        page = connection.getresponse().read().decode()
        connection.close()
    assert "webhook at hooks.example.org" in page
    assert "SECRET" not in page
    node.close()
    ward.close()
