"""The routes of DICOMweb: STOW-RS, and what this server can do (PS3.18 8.9, 10.5)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ctflow.node.access.sign_on import Denied, SignOn
from ctflow.node.dicomweb.stow import STUDIES, Stow, StowIntake, drain, refused
from ctflow.node.web.guard import Hosts, asked_of, headers

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_ALLOWED = "OPTIONS, POST"
_REALM = {"WWW-Authenticate": 'Basic realm="ctflow", charset="UTF-8"'}


def dicomweb_routes(intake: StowIntake, sign_on: SignOn, hosts: Hosts) -> list[Any]:
    """The routes of DICOMweb.

    Args:
        intake: Where instances go.
        sign_on: Who may send.
        hosts: Names under which the server answers.

    Returns:
        Routes of Starlette.
    """
    from starlette.concurrency import run_in_threadpool  # noqa: PLC0415  # an optional package: the extra `serve`
    from starlette.routing import Route  # noqa: PLC0415

    stow = Stow(intake)

    async def post(request: Request) -> Response:
        denial = _wrong_host(request, hosts)
        if denial is not None:
            return denial
        asked = asked_of(request)
        caller = await run_in_threadpool(sign_on.sender, asked)
        if isinstance(caller, Denied):
            intake.refused("peer")
            await drain(request)
            more = _REALM if caller.status == 401 else {}
            wait = {"Retry-After": f"{caller.wait_s:.0f}"} if caller.wait_s else {}
            return refused(caller.status, caller.text, {**more, **wait})
        return await stow.store(request, caller)

    async def options(request: Request) -> Response:
        from starlette.responses import Response  # noqa: PLC0415

        wrong = _wrong_host(request, hosts)
        accepted = {"Allow": _ALLOWED, "Accept-Post": 'multipart/related; type="application/dicom"'}
        return wrong or Response(status_code=204, headers=accepted)

    return [
        route
        for path in (STUDIES, f"{STUDIES}/{{study:str}}")
        for route in (
            Route(path, _with_headers(post), methods=["POST"]),
            Route(path, _with_headers(options), methods=["OPTIONS"]),
        )
    ] + [Route("/dicom-web", _with_headers(options), methods=["OPTIONS"])]


def _wrong_host(request: Request, hosts: Hosts) -> Response | None:
    if hosts.accepts(request.headers.get("host", "")):
        return None
    return refused(421, "This name is not in the node's settings (web.hosts).", {})


def _with_headers(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        response = await endpoint(request)
        for name, value in headers(secure=request.url.scheme == "https").items():
            response.headers.setdefault(name, value)
        return response

    return answered
