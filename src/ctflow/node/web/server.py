"""The page's server, in a thread of the node's process."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ctflow.core.errors import SettingsInvalid
from ctflow.node.web.app import make_app
from ctflow.node.web.pages import NodeView
from ctflow.node.web.views import address

# A person and a few machines ask; more at once is a mistake, and gets 503.
_MOST_AT_ONCE = 100
_KEEP_ALIVE_S = 5
_GRACEFUL_S = 3  # a report of 24 MB takes less, and the node's own work must not wait for a browser

log = logging.getLogger(__name__)


@contextmanager
def serving(node: NodeView) -> Iterator[int]:
    """Serve the page of a node while the context lasts.

    Args:
        node: What it shows; `settings.web` says where. Port 0 takes any that is free.

    Yields:
        The port.

    Raises:
        SettingsInvalid: The address cannot be listened on.
    """
    # Late: the library does not need it, only the node.
    import uvicorn  # noqa: PLC0415

    listener = _listen(node.settings.web.bind, node.settings.web.port)
    config = uvicorn.Config(
        make_app(node),
        log_config=None,
        access_log=False,  # it would write addresses with keys of series for every picture
        server_header=False,
        lifespan="off",
        http="h11",
        ws="none",
        limit_concurrency=_MOST_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_S,
        h11_max_incomplete_event_size=16_384,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="page", daemon=True)
    thread.start()
    port = int(listener.getsockname()[1])
    log.info("the page is on http://%s/", address(node.settings.web.bind, port))
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _listen(bind: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        return socket.create_server((bind, port), family=family, backlog=128)
    except OSError as error:
        raise SettingsInvalid(
            f"web: cannot listen on {address(bind, port)} ({error.strerror}): give another web.port or web.bind",
            reason="cannot-listen",
        ) from error
