"""The page as an ASGI application: who is let in, which address is whose, and the headers of every answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from ctflow.node.web.guard import COOKIE, Hosts, Tokens, headers, is_own_form
from ctflow.node.web.pages import Asked, Node, Pages, Reply

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_LARGEST_FORM = 4096  # bytes; a token has 64
_KEY = "{key:str}"

Handler = Callable[[Asked], Reply]
Endpoint = Callable[["Request"], Awaitable["Response"]]

log = logging.getLogger(__name__)


def make_app(node: Node) -> Starlette:
    """The page of a node.

    Args:
        node: What it shows.

    Returns:
        An ASGI application; see `ctflow.node.web.server`.
    """
    # Late: the library does not need it, only the node.
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.exceptions import HTTPException  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    tokens = Tokens()
    pages = Pages(node, tokens)
    gate = _Gate(node, pages, tokens)
    result = f"/series/{_KEY}/results/{{number:str}}"
    shown: dict[str, Handler] = {
        "/": pages.overview,
        "/events": pages.events,
        f"/series/{_KEY}": pages.series,
        f"{result}/preview.png": pages.preview,
        f"{result}/report.html": pages.report,
        "/style.css": pages.style,
        "/icon.svg": pages.icon,
        "/healthz": pages.health,
        "/readyz": pages.ready,
        "/metrics": pages.metrics,
    }
    forms: dict[str, Handler] = {f"/series/{_KEY}/retry": pages.retry, f"/series/{_KEY}/discard": pages.discard}

    async def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        heading = "There is no such page" if status == 404 else "This action is not possible here"
        return await gate.answer(request, lambda _: pages.message(status, heading, "The address may have changed."))

    return Starlette(
        routes=[
            *(Route(path, gate.showing(handler), methods=["GET"]) for path, handler in shown.items()),
            *(Route(path, gate.acting(handler), methods=["POST"]) for path, handler in forms.items()),
        ],
        exception_handlers={HTTPException: refused},
    )


class _Gate:
    """Lets requests in, asks the page in a thread, and gives the answer its headers."""

    def __init__(self, node: Node, pages: Pages, tokens: Tokens) -> None:
        self._node = node
        self._pages = pages
        self._tokens = tokens
        self._hosts = Hosts(node.settings.web.hosts)

    def showing(self, handler: Handler) -> Endpoint:
        """An endpoint that changes nothing."""

        async def endpoint(request: Request) -> Response:
            return await self.answer(request, handler)

        return endpoint

    def acting(self, handler: Handler) -> Endpoint:
        """An endpoint that only a form of ours reaches."""

        async def endpoint(request: Request) -> Response:
            token = await _token_of_form(request)
            action, session = request.url.path, request.cookies.get(COOKIE)
            if token is None or not is_own_form(request.headers) or not self._tokens.holds(session, action, token):
                return await self.answer(request, self._stale)
            return await self.answer(request, handler)

        return endpoint

    def _stale(self, asked: Asked) -> Reply:
        message = "The form is outdated, or belongs to another page. Load the page and try again."
        back = f"/series/{asked.path['key']}"
        return self._pages.message(403, "Nothing was changed", message, back=back, label="Load the page")

    async def answer(self, request: Request, handler: Handler) -> Response:
        """Ask a handler in a thread; a browser without a cookie of ours gets one."""
        from starlette.concurrency import run_in_threadpool  # noqa: PLC0415

        if not self._hosts.accepts(request.headers.get("host", "")):
            text = b"This name is not in the node's settings (web.hosts).\n"
            return _response(Reply(421, text, "text/plain; charset=utf-8"))
        cookie = request.cookies.get(COOKIE)
        session = cookie if cookie is not None and self._tokens.is_session(cookie) else self._tokens.new_session()
        peer = request.client.host if request.client else ""
        asked = Asked(request.path_params, request.query_params, session, peer)
        reply = await run_in_threadpool(self._ask, handler, asked)
        response = _response(reply)
        if session != cookie and reply.media_type.startswith("text/html") and not reply.report:
            response.set_cookie(COOKIE, session, httponly=True, samesite="lax", path="/")
        return response

    def _ask(self, handler: Handler, asked: Asked) -> Reply:
        try:
            return handler(asked)
        except Exception as error:
            log.exception("a page could not be rendered")
            text = f"unexpected {type(error).__name__}; the log says where\n"
            return Reply(500, text.encode(), "text/plain; charset=utf-8")


def _response(reply: Reply) -> Response:
    from starlette.responses import FileResponse, Response  # noqa: PLC0415

    named = headers(report=reply.report)
    if reply.location is not None:
        return Response(status_code=reply.status, headers={**named, "Location": reply.location})
    if reply.file is not None:
        return FileResponse(reply.file, headers=named, media_type=reply.media_type)
    return Response(reply.body, reply.status, named, reply.media_type)


async def _token_of_form(request: Request) -> str | None:
    """The token that a form holds; None for anything that is no small form."""
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
