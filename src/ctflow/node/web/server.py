"""The server of the page and of DICOMweb: uvicorn in a thread, with time limits on every connection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from ctflow.core.errors import SettingsInvalid
from ctflow.node.access.attempts import network_of
from ctflow.node.access.sign_on import is_proxy
from ctflow.node.settings.values import address_text
from ctflow.node.settings.web import Web
from ctflow.node.tls import tls_failure
from ctflow.node.web.app import make_app
from ctflow.node.web.pages import NodeView

# A person and a few machines send requests; more at once is a mistake, and gets 503.
_MOST_AT_ONCE = 100
_MOST_CONNECTIONS = 200  # each has a descriptor, of which receiving needs some
_MOST_OF_ADDRESS = 64  # so that one machine alone does not keep the others out; not of a proxy
_KEEP_ALIVE_S = 5
_GRACEFUL_S = 3  # a report of 24 MB takes less, and the node's own work must not wait for a browser
_HEAD_S = 20.0  # for a request's head
_SILENCE_S = 60.0  # within a body, or while the other side does not read an answer
_CHECKED_S = 5.0

log = logging.getLogger(__name__)


@contextmanager
def serving(node: NodeView) -> Iterator[int]:
    """Serve the page of a node while the context lasts.

    Args:
        node: The node to show; `settings.web` says where. Port 0 takes any free one.

    Yields:
        The port.

    Raises:
        SettingsInvalid: The address cannot be listened on, or a file that the settings name is wrong.
    """
    # Late: only the node needs it, not the library.
    import uvicorn  # noqa: PLC0415

    web = node.settings.web
    app: Any = make_app(node)
    config = uvicorn.Config(
        app,
        log_config=None,
        loop="asyncio",  # another one would not accept by `_PageListener`
        access_log=False,  # it would write addresses with keys of series for every picture
        server_header=False,
        proxy_headers=False,  # it would believe any process of this machine; `SignOn.address` reads them
        lifespan="off",
        http=_limited_protocol(),
        ws="none",
        limit_concurrency=_MOST_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_S,
        h11_max_incomplete_event_size=16_384,
    )
    if node.tls is not None:
        config.load()
        config.ssl = node.tls.front
        config.ssl.sslobject_class = _telling_object()
    listener = _listen(web)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="page", daemon=True)
    thread.start()
    port = int(listener.getsockname()[1])
    log.info("the page is on %s://%s/", "http" if node.tls is None else "https", address_text(web.bind, port))
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@cache
def _limited_protocol() -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which alone waits forever for a request, the rest of a body, or a reader of its answer."""
    from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: PLC0415  # an optional package: the extra `serve`

    class LimitedProtocol(H11Protocol):
        """Ends a connection that is silent for too long."""

        _heard = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._heard = self.loop.time()
            self._check_later()

        def data_received(self, data: bytes) -> None:
            if not self._awaits_head():  # a head that comes in single bytes is not longer waited for
                self._heard = self.loop.time()
            super().data_received(data)

        def on_response_complete(self) -> None:
            self._heard = self.loop.time()
            super().on_response_complete()

        def resume_writing(self) -> None:
            self._heard = self.loop.time()  # the other side reads, however slowly
            super().resume_writing()

        def _awaits_head(self) -> bool:
            return self.cycle is None or bool(self.cycle.response_complete)

        def _check_later(self) -> None:
            self.loop.call_later(_CHECKED_S, self._check)

        def _check(self) -> None:
            if self.transport.is_closing():
                return
            now = self.loop.time()
            awaits_head = self._awaits_head()
            awaits_body = not awaits_head and self.cycle.more_body and not self.flow.read_paused
            if not (awaits_head or awaits_body or self.flow.write_paused):
                self._heard = now  # the node itself is at work
            if now - self._heard > (_HEAD_S if awaits_head else _SILENCE_S):
                self.transport.abort()
                return
            self._check_later()

    return LimitedProtocol


@cache
def _telling_object() -> type[ssl.SSLObject]:
    """A connection's TLS that names why its handshake failed; asyncio says it to nobody."""

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except OSError as error:
                log.warning("connection to the page ended: %s", tls_failure(error))
                raise

    return Telling


class _PageListener(socket.socket):
    """A listening socket with few connections, also of those that never begin TLS or a request."""

    is_proxy: Callable[[str], bool] = staticmethod(lambda _address: False)

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._open: list[tuple[str, socket.socket]] = []
        self._said = 0.0

    def accept(self) -> tuple[socket.socket, Any]:
        """A connection; one too many is closed at once."""
        connection, address = super().accept()
        of = network_of(address[0])
        self._open = [each for each in self._open if each[1].fileno() >= 0]
        same = sum(other == of for other, _ in self._open)
        if len(self._open) < _MOST_CONNECTIONS and (same < _MOST_OF_ADDRESS or self.is_proxy(address[0])):
            self._open.append((of, connection))
            return connection, address
        connection.close()
        if time.monotonic() - self._said > _SILENCE_S:
            self._said = time.monotonic()
            log.warning("the page has too many connections, %d of them from %s: it closes further ones", same, of)
        raise ConnectionAbortedError  # asyncio goes on with the next one


def _listen(web: Web) -> _PageListener:
    family = socket.AF_INET6 if ":" in web.bind else socket.AF_INET
    try:
        listener = _PageListener(socket.create_server((web.bind, web.port), family=family, backlog=128))
    except OSError as error:
        raise SettingsInvalid(
            f"web: cannot listen on {address_text(web.bind, web.port)} ({error.strerror}): give another web.port or "
            "web.bind",
            reason="cannot-listen",
        ) from error
    listener.is_proxy = partial(is_proxy, web)
    return listener
