"""Protects the node's page from other sites: the Host header, tokens in forms, headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ctflow.node.access.sign_on import Asked

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

COOKIE = "ctflow"
_SECURE_COOKIE = f"__Host-{COOKIE}"  # a browser takes it only of this server, over TLS
_SESSION = re.compile(r"[A-Za-z0-9_-]{20,64}")

# Only this server's style and pictures; no script at all, no frames, forms only to this server.
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# A report has its own policy for its own script; the sandbox gives it a separate origin, so that nothing in it
# can read or request anything from the node.
_REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send no Origin with forms
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def headers(*, report: bool = False, secure: bool = False) -> dict[str, str]:
    """The headers of every answer; over TLS also that browsers shall come back with TLS only."""
    kept = {"Strict-Transport-Security": "max-age=31536000"} if secure else {}
    return {**_HEADERS, **kept, "Content-Security-Policy": _REPORT_POLICY if report else _POLICY}


def cookie_name(*, secure: bool) -> str:
    """The name of the page's cookie."""
    return _SECURE_COOKIE if secure else COOKIE


def session_of(cookies: Mapping[str, str], *, secure: bool) -> str | None:
    """The session in a browser's cookies, if there is one that may be from this page.

    Over TLS only the cookie that nobody but this server can set: a neighbour of its name could set the other one.
    """
    found = cookies.get(cookie_name(secure=secure))
    return found if Tokens.is_session(found) else None


def new_session() -> str:
    """A value for the cookie of a browser in which nobody is signed in."""
    return Tokens.new_session()


def set_cookie(request: Request, response: Response, session: str) -> None:
    """Give the browser its session; the cookie is for this server only, and never for scripts."""
    name: str = request.state.cookie
    response.set_cookie(name, session, httponly=True, samesite="lax", path="/", secure=name.startswith("__Host-"))


def asked_of(request: Request) -> Asked:
    """What identifies the origin of a request; a header that is there twice is one with both values.

    It has a session only where the request's state says whether the browser speaks TLS.
    """
    found: dict[str, str] = {}
    for name, value in request.headers.items():
        found[name] = f"{found[name]},{value}" if name in found else value
    secure = getattr(request.state, "secure", None)
    session = None if secure is None else session_of(request.cookies, secure=secure)
    return Asked(request.client.host if request.client else "", found, session)


class Hosts:
    """The host names under which the page answers.

    A page of another site whose name was redirected here (DNS rebinding) still has its own name in Host. An IP
    address cannot be redirected, so any is accepted.

    Args:
        names: In addition to localhost.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = {name.lower().rstrip(".") for name in names} | {"localhost"}

    def accepts(self, host: str) -> bool:
        """Whether a Host header names this page."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:\d{1,5})?", host.strip().lower())
        if match is None:
            return False
        name = match[1].rstrip(".")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


class Tokens:
    """Tokens in forms, which tell the page's own forms from those of another site.

    A token belongs to a browser (its cookie) and to one action, and is valid until the node restarts.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    @staticmethod
    def new_session() -> str:
        """A value for the cookie."""
        return secrets.token_urlsafe(24)

    @staticmethod
    def is_session(value: str | None) -> bool:
        """Whether a cookie may be from this page."""
        return value is not None and _SESSION.fullmatch(value) is not None

    def token(self, session: str, action: str) -> str:
        """The token of an action (the path of its form)."""
        return hmac.new(self._secret, f"{session}\n{action}".encode(), hashlib.sha256).hexdigest()

    def holds(self, session: str | None, action: str, token: str) -> bool:
        """Whether a form's token is the one issued to this browser for this action."""
        if session is None or not self.is_session(session):
            return False
        return hmac.compare_digest(self.token(session, action).encode(), token.encode("utf-8", "replace"))


def is_own_form(asked: Mapping[str, str]) -> bool:
    """Whether the browser reports this page as a form's origin.

    Args:
        asked: The request's headers, names in lower case.
    """
    if asked.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    origin = asked.get("origin")
    return origin is None or origin.partition("://")[2] == asked.get("host")
