"""The page and DICOMweb as an ASGI application: access, routes, the headers of every answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from ctflow.node.access.sign_on import SignOn
from ctflow.node.access.users import Right
from ctflow.node.settings.service import is_peer_by_address
from ctflow.node.web.guard import (
    Hosts,
    Tokens,
    asked_of,
    cookie_name,
    headers,
    is_own_form,
    new_session,
    set_cookie,
)
from ctflow.node.web.pages import NodeView, Pages
from ctflow.node.web.sign_in import SignInPages
from ctflow.node.web.store import dicomweb_routes
from ctflow.node.web.viewer import VIEWER, Viewer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_LARGEST_FORM = 4096  # bytes; a token has 64
_FORM_S = 10.0  # for all of it
_RESULT = "/series/{key:str}/results/{number:str}"

Endpoint = Callable[["Request"], "Response"]
Forward = Callable[["Request"], Awaitable["Response"]]
Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

log = logging.getLogger(__name__)


def make_app(node: NodeView) -> Application:
    """The page of a node, and its DICOMweb.

    Args:
        node: The node to show.

    Returns:
        An ASGI application, which `serving` serves.

    Raises:
        SettingsInvalid: The file of users or of the token is wrong.
    """
    # Late: only the node needs it, not the library.
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.exceptions import HTTPException  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415
    from starlette.middleware.base import BaseHTTPMiddleware  # noqa: PLC0415

    settings = node.settings
    sign_on = SignOn(settings.web, node.journal.event, partial(is_peer_by_address, settings))
    hosts, tokens = Hosts(settings.web.hosts), Tokens()
    pages = Pages(node, tokens)

    def refused(_request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        heading = "There is no such page" if status == 404 else "This action is not possible here"
        return pages.message(status, heading, "The address may have changed.")

    page = Starlette(
        routes=_routes(pages, sign_on, tokens),
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_gate(hosts, sign_on, tokens))],
        exception_handlers={HTTPException: refused},
    )
    page.router.redirect_slashes = False  # it would lead to whatever the Host header says, and out of a proxy's TLS
    if node.stow is None:
        return page
    # Beside the page, not behind its gate: bodies are large, and senders have neither cookies nor pages.
    dicomweb = Starlette(routes=dicomweb_routes(node.stow, sign_on, hosts))
    dicomweb.router.redirect_slashes = False

    async def both(scope: Scope, receive: Any, send: Any) -> None:
        is_dicomweb = str(scope.get("path", "")).startswith("/dicom-web")
        await (dicomweb if is_dicomweb else page)(scope, receive, send)

    return both


def _routes(pages: Pages, sign_on: SignOn, tokens: Tokens) -> list[Any]:
    from starlette.routing import Route  # noqa: PLC0415  # an optional package: the extra `serve`

    sign_in = SignInPages(pages, sign_on, tokens)
    shown: dict[str, Endpoint] = {
        "/": pages.overview,
        "/events": pages.events,
        "/series/{key:str}": pages.series,
        f"{_RESULT}/preview.png": pages.preview,
        f"{_RESULT}/report.html": pages.report,
        f"{_RESULT}/{{volume:str}}/preview.png": pages.preview,
        f"{_RESULT}/{{volume:str}}/report.html": pages.report,
    }
    open_to_all: dict[str, Endpoint] = {
        "/style.css": pages.style,
        "/icon.svg": pages.icon,
        "/healthz": pages.health,
        "/readyz": lambda request: pages.ready(whole=sign_on.may_scrape(asked_of(request), request.state.person)),
        "/metrics": _scraped(pages, sign_on),
        "/sign-in": sign_in.show,
    }
    forms: dict[str, Endpoint] = {
        **{
            f"/series/{{key:str}}/{of}{act}": _needs("act", endpoint, sign_in, sign_on)
            for of in ("", "models/{model:str}/")
            for act, endpoint in (("retry", pages.retry), ("discard", pages.discard))
        },
        "/sign-in": sign_in.enter,
        "/sign-out": sign_in.leave,
    }
    looked = {path: _needs("look", endpoint, sign_in, sign_on) for path, endpoint in shown.items()}
    return [
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in {**looked, **open_to_all}.items()),
        *(Route(path, _own_form(endpoint, pages, tokens), methods=["POST"]) for path, endpoint in forms.items()),
    ]


def _needs(right: Right, endpoint: Endpoint, sign_in: SignInPages, sign_on: SignOn) -> Endpoint:
    """An endpoint for those who have a right; without sign-on everyone has."""

    def allowed(request: Request) -> Response:
        person = request.state.person
        if sign_on.kind == "none" or (person is not None and person.may(right)):
            return endpoint(request)
        return sign_in.asked_for(request) if person is None else sign_in.not_allowed(person)

    return allowed


def _scraped(pages: Pages, sign_on: SignOn) -> Endpoint:
    def metrics(request: Request) -> Response:
        if sign_on.may_scrape(asked_of(request), request.state.person):
            return pages.metrics(request)
        return pages.unauthorized("Bearer", "The metrics need the token of web.token_file.")

    return metrics


def _gate(hosts: Hosts, sign_on: SignOn, tokens: Tokens) -> Callable[[Request, Forward], Awaitable[Response]]:
    """Admits requests by their Host, finds out who asks, sets a cookie in browsers, and headers in every answer."""
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415
    from starlette.responses import PlainTextResponse  # noqa: PLC0415

    async def dispatch(request: Request, forward: Forward) -> Response:
        is_secure = request.state.secure = sign_on.is_secure(asked_of(request), request.url.scheme)
        asked = asked_of(request)
        session = asked.session or new_session()
        request.state.session, request.state.cookie = session, cookie_name(secure=is_secure)
        if hosts.accepts(request.headers.get("host", "")):
            try:
                person = request.state.person = await run_in_threadpool(sign_on.person, asked)
                VIEWER.set(_viewer(sign_on, person, sign_on.address(asked), tokens.token(session, "/sign-out")))
                response = await forward(request)
            except Exception as error:
                log.exception("a page could not be rendered")
                response = PlainTextResponse(f"unexpected {type(error).__name__}; the log says where\n", 500)
        else:
            response = PlainTextResponse("This name is not in the node's settings (web.hosts).\n", 421)
        is_report = "Content-Security-Policy" in response.headers  # it has its own
        for name, value in headers(secure=is_secure).items():
            response.headers.setdefault(name, value)
        is_page = response.headers.get("Content-Type", "").startswith("text/html") and not is_report
        if session != asked.session and is_page and "set-cookie" not in response.headers:
            set_cookie(request, response, session)
        return response

    return dispatch


def _viewer(sign_on: SignOn, person: Any, address: str, token: str) -> Viewer:
    if sign_on.kind == "none":
        return Viewer(address=address)
    if person is None:
        return Viewer(can_look=False, can_act=False, address=address)
    out = token if sign_on.kind == "local" else ""
    return Viewer(person.name, person.role, person.may("look"), person.may("act"), out, address)


def _own_form(endpoint: Endpoint, pages: Pages, tokens: Tokens) -> Forward:
    """An endpoint that only the page's own forms reach."""
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415

    async def form(request: Request) -> Response:
        fields = await _fields_of_form(request)
        action, session = request.url.path, asked_of(request).session
        is_ours = is_own_form(request.headers) and tokens.holds(session, action, fields.get("token", ""))
        request.state.fields = fields
        return await run_in_threadpool(endpoint if is_ours else pages.stale, request)

    return form


async def _fields_of_form(request: Request) -> Mapping[str, str]:
    """The fields of a form; none of anything but a small form that comes at once."""
    import anyio  # noqa: PLC0415  # of starlette, which is optional
    from starlette.requests import ClientDisconnect  # noqa: PLC0415  # the same

    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return {}
    content = b""
    try:
        with anyio.move_on_after(_FORM_S) as limit:
            async for part in request.stream():
                content += part
                if len(content) > _LARGEST_FORM:
                    return {}
        if limit.cancelled_caught:
            return {}
        return dict(parse_qsl(content.decode("ascii"), max_num_fields=10))
    except (ValueError, ClientDisconnect):  # no answer reaches a browser that has left
        return {}
