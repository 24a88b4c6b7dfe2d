"""Who looks at a page."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Viewer:
    """Who looks at a page: without sign-on anyone, who may do everything.

    Attributes:
        name: The user; empty without sign-on, or if nobody is signed in.
        role: The user's role.
        can_look: Whether pages show the node's state.
        can_act: Whether pages have buttons.
        address: Where the request comes from, as the proxy says if there is one.
        sign_out: Token of the form that signs out; empty if there is none.
    """

    name: str = ""
    role: str = ""
    can_look: bool = True
    can_act: bool = True
    sign_out: str = ""
    address: str = ""


_ANYONE = Viewer()
# Of the request that is being answered: every page shows it, also a message, which knows no request.
VIEWER: ContextVar[Viewer] = ContextVar("viewer", default=_ANYONE)
