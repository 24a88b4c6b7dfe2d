"""The page as an ASGI application: access, routes, the headers of every answer; and its server."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from ctflow.core.errors import SettingsInvalid
from ctflow.node.settings.values import address_text
from ctflow.node.web.guard import COOKIE, Hosts, Tokens, headers, is_own_form
from ctflow.node.web.pages import NodeView, Pages

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

# A person and a few machines send requests; more at once is a mistake, and gets 503.
_MOST_AT_ONCE = 100
_KEEP_ALIVE_S = 5
_GRACEFUL_S = 3  # a report of 24 MB takes less, and the node's own work must not wait for a browser
_LARGEST_FORM = 4096  # bytes; a token has 64
_RESULT = "/series/{key:str}/results/{number:str}"

Endpoint = Callable[["Request"], "Response"]
Forward = Callable[["Request"], Awaitable["Response"]]

log = logging.getLogger(__name__)


def make_app(node: NodeView) -> Starlette:
    """The page of a node.

    Args:
        node: The node to show.

    Returns:
        An ASGI application, which `serving` serves.
    """
    # Late: only the node needs it, not the library.
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.exceptions import HTTPException  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415
    from starlette.middleware.base import BaseHTTPMiddleware  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    tokens = Tokens()
    pages = Pages(node, tokens)
    shown: dict[str, Endpoint] = {
        "/": pages.overview,
        "/events": pages.events,
        "/series/{key:str}": pages.series,
        f"{_RESULT}/preview.png": pages.preview,
        f"{_RESULT}/report.html": pages.report,
        f"{_RESULT}/{{volume:str}}/preview.png": pages.preview,
        f"{_RESULT}/{{volume:str}}/report.html": pages.report,
        "/style.css": pages.style,
        "/icon.svg": pages.icon,
        "/healthz": pages.health,
        "/readyz": pages.ready,
        "/metrics": pages.metrics,
    }
    forms: dict[str, Endpoint] = {
        "/series/{key:str}/retry": pages.retry,
        "/series/{key:str}/discard": pages.discard,
    }

    def refused(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        heading = "There is no such page" if status == 404 else "This action is not possible here"
        return pages.message(status, heading, "The address may have changed.")

    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in shown.items()),
            *(Route(path, _own_form(endpoint, pages, tokens), methods=["POST"]) for path, endpoint in forms.items()),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_gate(Hosts(node.settings.web.hosts), tokens))],
        exception_handlers={HTTPException: refused},
    )


def _gate(hosts: Hosts, tokens: Tokens) -> Callable[[Request, Forward], Awaitable[Response]]:
    """Admits requests by their Host, sets a cookie in browsers, and headers in every answer."""
    from starlette.responses import PlainTextResponse  # noqa: PLC0415

    async def dispatch(request: Request, forward: Forward) -> Response:
        cookie = request.cookies.get(COOKIE)
        session = cookie if cookie is not None and tokens.is_session(cookie) else tokens.new_session()
        request.state.session = session
        if hosts.accepts(request.headers.get("host", "")):
            try:
                response = await forward(request)
            except Exception as error:
                log.exception("a page could not be rendered")
                response = PlainTextResponse(f"unexpected {type(error).__name__}; the log says where\n", 500)
        else:
            response = PlainTextResponse("This name is not in the node's settings (web.hosts).\n", 421)
        is_report = "Content-Security-Policy" in response.headers  # it has its own
        for name, value in headers().items():
            response.headers.setdefault(name, value)
        if session != cookie and response.headers.get("Content-Type", "").startswith("text/html") and not is_report:
            response.set_cookie(COOKIE, session, httponly=True, samesite="lax", path="/")
        return response

    return dispatch


def _own_form(endpoint: Endpoint, pages: Pages, tokens: Tokens) -> Forward:
    """An endpoint that only the page's own forms reach."""
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415

    async def form(request: Request) -> Response:
        token = await _token_of_form(request)
        action, session = request.url.path, request.cookies.get(COOKIE)
        is_ours = token is not None and is_own_form(request.headers) and tokens.holds(session, action, token)
        return await run_in_threadpool(endpoint if is_ours else pages.stale, request)

    return form


async def _token_of_form(request: Request) -> str | None:
    """The token in a form; None for anything but a small form."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return None
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _LARGEST_FORM:
            return None
    try:
        fields = dict(parse_qsl(content.decode("ascii"), max_num_fields=10))
    except ValueError:
        return None
    return fields.get("token")


@contextmanager
def serving(node: NodeView) -> Iterator[int]:
    """Serve the page of a node while the context lasts.

    Args:
        node: The node to show; `settings.web` says where. Port 0 takes any free one.

    Yields:
        The port.

    Raises:
        SettingsInvalid: The address cannot be listened on.
    """
    # Late: only the node needs it, not the library.
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
    log.info("the page is on http://%s/", address_text(node.settings.web.bind, port))
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
            f"web: cannot listen on {address_text(bind, port)} ({error.strerror}): give another web.port or web.bind",
            reason="cannot-listen",
        ) from error
