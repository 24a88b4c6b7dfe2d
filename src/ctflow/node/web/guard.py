"""Protects the node's page from other sites: the Host header, tokens in forms, headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Collection, Mapping

COOKIE = "ctflow"
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


def headers(*, report: bool = False) -> dict[str, str]:
    """The headers of every answer."""
    return {**_HEADERS, "Content-Security-Policy": _REPORT_POLICY if report else _POLICY}


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
