"""The sign-on that a site chose: who a request comes from, and what that person or sender may do."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ctflow.node.access.attempts import Attempts, network_of
from ctflow.node.access.secret import read_secret_line
from ctflow.node.access.sessions import Sessions
from ctflow.node.access.users import NAME, RIGHTS, Right, Role, TooBusy, User, Users
from ctflow.node.receive.intake import Caller
from ctflow.node.settings.web import Web

_LEAST_TOKEN = 16
_STRENGTH: tuple[Role, ...] = ("admin", "operate", "view", "send")
_MOST_TOLD = 4096
_ALIKE = 64
_TOLD_AGAIN_S = 12 * 3600.0
_BUSY_S = 2.0

log = logging.getLogger(__name__)


class RecordEvent(Protocol):
    """Adds an event to the audit trail, as `Journal.event`."""

    def __call__(self, kind: str, text: str, *, peer: str | None = None) -> None:
        """Add an event."""
        ...


@dataclass(frozen=True)
class Asked:
    """What identifies the origin of a request.

    Attributes:
        client: The address of the connection.
        headers: The request's, with names in lower case.
        session: The value of the page's cookie.
    """

    client: str
    headers: Mapping[str, str]
    session: str | None = None


@dataclass(frozen=True)
class Person:
    """Who uses the page."""

    name: str
    role: Role

    def may(self, right: Right) -> bool:
        """Whether the role includes a right."""
        return right in RIGHTS[self.role]


@dataclass(frozen=True)
class Denied:
    """No: HTTP's status, why, and the seconds to wait if that helps."""

    status: Literal[401, 403, 429]
    text: str
    wait_s: float = 0.0


class SignOn:
    """Who may look, act and send.

    Args:
        web: The site's settings.
        record: Adds to the audit trail.
        is_peer: Whether an AE title at an address may send, as for C-STORE.
        clock: Gives seconds that only grow.

    Raises:
        SettingsInvalid: The file of users or of the token is wrong.
    """

    def __init__(
        self,
        web: Web,
        record: RecordEvent,
        is_peer: Callable[[str, str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kind = web.sign_on
        self._web, self._record, self._is_peer, self._clock = web, record, is_peer, clock
        self._users = Users(web.users_file) if web.sign_on == "local" and web.users_file else None
        self._token = read_secret_line(web.token_file, "web.token_file", _LEAST_TOKEN) if web.token_file else None
        self._attempts = Attempts(clock)
        self._sessions = Sessions(web.session_idle_s, web.session_most_s, clock)
        self._told: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._lock = threading.Lock()
        # The same password from many connections at once is not many attempts: one waits for the other.
        self._alike = [threading.Lock() for _ in range(_ALIKE)]

    # -- where from ---------------------------------------------------------------------------------------------------

    def is_proxy(self, asked: Asked) -> bool:
        """Whether the connection comes from a proxy of the settings."""
        return is_proxy(self._web, asked.client)

    def address(self, asked: Asked) -> str:
        """Where a request comes from: of a proxy's, what the proxy says."""
        if self.is_proxy(asked):
            for hop in reversed(asked.headers.get("x-forwarded-for", "").split(",")):
                found = _address(hop) or _address(hop.rpartition(":")[0])
                if not found:  # what is left of it, its caller may have made up
                    break
                if not is_proxy(self._web, found):
                    return found
        return asked.client

    def is_secure(self, asked: Asked, scheme: str) -> bool:
        """Whether the browser speaks TLS, to this node or to its proxy."""
        return scheme == "https" or (self.is_proxy(asked) and asked.headers.get("x-forwarded-proto") == "https")

    def _is_direct(self, asked: Asked) -> bool:
        """Whether no proxy stands between: one that is not in the settings would lend its address to anyone."""
        forwarded = {"x-forwarded-for", "forwarded", "via", "x-real-ip"} & set(asked.headers)
        return not forwarded and not self.is_proxy(asked)

    # -- persons ------------------------------------------------------------------------------------------------------

    def person(self, asked: Asked) -> Person | None:
        """Who uses the page; None if nobody has signed in, or nobody signs in here."""
        if self.kind == "proxy":
            return self._person_of_proxy(asked)
        found = self._sessions.user(asked.session) if self.kind == "local" else None
        if found is None or self._users is None:
            return None
        if self._users.find(found.name) != found:  # removed, or with another role or password
            self._sessions.end(asked.session)
            self._record("signed-out", f"{found.name}: the user was changed", peer=self.address(asked))
            return None
        return Person(found.name, found.role)

    def _person_of_proxy(self, asked: Asked) -> Person | None:
        web = self._web.proxy
        name, address = asked.headers.get(web.header.lower(), "").strip(), self.address(asked)
        if not name:
            return None
        if not self.is_proxy(asked):
            self._tell("sign-in-refused", "a user's name from an address that is no proxy", asked.client)
            return None
        given = asked.headers.get(web.roles_header.lower(), "") if web.roles_header else ""
        words = {word.strip().lower() for word in given.split(",")}
        role = next((each for each in _STRENGTH if each in words), web.role)
        if not NAME.fullmatch(name) or role == "none":
            self._tell("sign-in-refused", "the proxy names no role, or no valid user", address)
            return None
        self._tell("signed-in", f"{name} as {role}, by the proxy", address)
        return Person(name, role)

    def _tell(self, kind: str, text: str, address: str) -> None:
        """Record what every request repeats once in a while."""
        key, now = (kind, text, network_of(address)), self._clock()
        with self._lock:
            last = self._told.get(key)
            if last is not None and now - last < _TOLD_AGAIN_S:
                return
            self._told[key] = now
            self._told.move_to_end(key)
            if len(self._told) > _MOST_TOLD:
                self._told.popitem(last=False)
        self._record(kind, text, peer=address)

    def sign_in(self, asked: Asked, name: str, password: str) -> str | Denied:
        """Begin a session for a local user.

        Returns:
            The session's id, for the cookie.
        """
        user = self._verified(asked, name, password)
        if isinstance(user, Denied):
            return user
        if "look" not in RIGHTS[user.role]:
            return self._no(asked, f"{user.name} may only send", Denied(403, "This user may only send images."))
        self._sessions.end(asked.session)
        session = self._sessions.begin(user)
        self._record("signed-in", f"{user.name} as {user.role}", peer=self.address(asked))
        return session

    def sign_out(self, asked: Asked) -> None:
        """End the session of a request, if there is one."""
        user = self._sessions.end(asked.session)
        if user is not None:
            self._record("signed-out", user.name, peer=self.address(asked))

    def _verified(self, asked: Asked, name: str, password: str) -> User | Denied:
        """A local user with this password; every failure is counted and recorded."""
        if self._users is None:
            return Denied(403, "There are no users here.")
        with self._alike[hash((name, password, asked.client)) % _ALIKE]:
            return self._verified_by(self._users, asked, name, password)

    def _verified_by(self, users: Users, asked: Asked, name: str, password: str) -> User | Denied:
        address = self.address(asked)
        name = name if NAME.fullmatch(name) else ""
        wait_s = self._attempts.begin(name, address)
        if wait_s:
            self._tell("sign-in-refused", "too many attempts: further ones are not looked at for a while", address)
            return Denied(429, "Too many attempts: try again later.", wait_s)
        try:
            user = users.verified(name, password)
        except TooBusy:
            self._attempts.taken_back(name, address)
            self._tell("sign-in-refused", "too many at once: the password was not looked at", address)
            return Denied(429, "Too many sign in at once: try again.", _BUSY_S)
        if user is None:
            # An unknown name may be a password in the wrong field: it is not recorded.
            who = f"wrong password for {name}" if users.find(name) else "unknown user"
            return self._no(asked, who, Denied(401, "Name or password is wrong."))
        self._attempts.succeeded(name, address)
        return user

    def _no(self, asked: Asked, text: str, denied: Denied) -> Denied:
        self._record("sign-in-refused", text, peer=self.address(asked))
        return denied

    # -- machines -----------------------------------------------------------------------------------------------------

    def may_scrape(self, asked: Asked, person: Person | None) -> bool:
        """Whether a request may see the metrics, and why the node is not ready."""
        if person is not None and person.may("look"):
            return True
        if self.kind == "none" and self._token is None:
            return True
        kind, _, given = asked.headers.get("authorization", "").partition(" ")
        if self._token is not None and kind.lower() == "bearer":
            return hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token.encode())
        return self._is_direct(asked) and _is_loopback(asked.client)

    def sender(self, asked: Asked) -> Caller | Denied:
        """Who sends instances: a user with the right to, or a peer by address."""
        address, (kind, given) = self.address(asked), _authorization(asked)
        if self.kind == "local" and kind == "basic":
            return self._sending_user(asked, *_name_and_password(given))
        if self.kind == "proxy" and self.is_proxy(asked):
            person = self._person_of_proxy(asked)
            if person is None or not person.may("send"):
                return Denied(403, "The proxy names no user who may send images.")
            return Caller(person.name, address)
        is_known = self._is_direct(asked) or (self.is_proxy(asked) and address != asked.client)
        if is_known and self._is_peer(self._web.stow_ae_title, address):
            return Caller(self._web.stow_ae_title, address)
        if self.kind == "local":
            return Denied(401, "Sign in as a user who may send, or send from the address of a peer.")
        return Denied(403, "This address is not among the peers.")

    def _sending_user(self, asked: Asked, name: str, password: str) -> Caller | Denied:
        user = self._verified(asked, name, password)
        if isinstance(user, Denied):
            return user
        if "send" not in RIGHTS[user.role]:
            return self._no(asked, f"{user.name} may not send", Denied(403, "This user may not send images."))
        return Caller(user.name, self.address(asked))


def _authorization(asked: Asked) -> tuple[str, str]:
    kind, _, given = asked.headers.get("authorization", "").partition(" ")
    return kind.lower(), given.strip()


def _name_and_password(given: str) -> tuple[str, str]:
    """Of HTTP's basic authentication (RFC 7617); empty if it is malformed."""
    try:
        name, _, password = base64.b64decode(given, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return "", ""
    return name, password


def is_proxy(web: Web, address: str) -> bool:
    """Whether an address is one of the settings' proxies."""
    try:
        found = ipaddress.ip_address(_address(address))
    except ValueError:
        return False
    return any(found in each for each in web.proxy.addresses)


def _is_loopback(address: str) -> bool:
    return bool(found := _address(address)) and ipaddress.ip_address(found).is_loopback


def _address(text: str) -> str:
    """An address in its usual form, IPv4 also where IPv6 carries it; empty if it is none."""
    try:
        found = ipaddress.ip_address(text.strip().strip('"[]').partition("%")[0])
    except ValueError:
        return ""
    return str(getattr(found, "ipv4_mapped", None) or found)
