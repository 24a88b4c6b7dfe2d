"""Signing in and out on the page, and the answers to those who may not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from ctflow.node.access.sign_on import Denied, Person, SignOn
from ctflow.node.web.guard import Tokens, asked_of, new_session, set_cookie
from ctflow.node.web.pages import Pages

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_OWN_PATH = re.compile(r"/(?![/\\])[A-Za-z0-9/_.?=&-]{0,300}")


class SignInPages:
    """The endpoints of signing in and out.

    Args:
        pages: Renders.
        sign_on: Decides.
        tokens: Makes the forms' tokens.
    """

    def __init__(self, pages: Pages, sign_on: SignOn, tokens: Tokens) -> None:
        self._pages, self._sign_on, self._tokens = pages, sign_on, tokens

    def asked_for(self, request: Request) -> Response:
        """The answer to someone who is not signed in."""
        if self._sign_on.kind == "proxy":
            said = "This page is reached through the site's proxy, which signs its users on."
            return self._pages.message(403, "You are not signed on", said)
        if request.method != "GET":
            return self._form(request, 401, "Your session has ended: sign in again.", "/")
        here = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
        query = f"?{urlencode({'next': here})}" if here != "/" and _OWN_PATH.fullmatch(here) else ""
        return self._pages.redirect(f"/sign-in{query}")

    def not_allowed(self, person: Person) -> Response:
        """The answer to someone whose role does not include it."""
        said = f"The role of {person.name} ({person.role}) does not include this."
        return self._pages.message(403, "You may not do this", said)

    def show(self, request: Request) -> Response:
        """The form; to whom is signed in, the list."""
        if self._sign_on.kind != "local" or request.state.person is not None:
            return self._pages.redirect("/")
        return self._form(request, 200, "", _next(request.query_params.get("next", "")))

    def enter(self, request: Request) -> Response:
        """Sign in with the form's name and password."""
        fields, asked = request.state.fields, asked_of(request)
        following = _next(fields.get("next", ""))
        found = self._sign_on.sign_in(asked, fields.get("name", ""), fields.get("password", ""))
        if isinstance(found, Denied):
            return self._form(request, found.status, found.text, following)
        response = self._pages.redirect(following)
        set_cookie(request, response, found)
        return response

    def leave(self, request: Request) -> Response:
        """Sign out."""
        self._sign_on.sign_out(asked_of(request))
        response = self._pages.redirect("/sign-in")
        set_cookie(request, response, new_session())
        return response

    def _form(self, request: Request, status: int, said: str, following: str) -> Response:
        token = self._tokens.token(request.state.session, "/sign-in")
        return self._pages.render("sign_in.html", status, here="", said=said, token=token, following=following)


def _next(given: str) -> str:
    """Where to go after signing in: only a page of this server."""
    return given if _OWN_PATH.fullmatch(given) else "/"
