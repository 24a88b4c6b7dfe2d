"""Sessions of signed-in users, in the node's memory: a restart ends them all."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from ctflow.node.access.users import User

_MOST, _MOST_OF_USER = 1000, 20  # the least recent ends


@dataclass(frozen=True)
class _Session:
    user: User
    began: float
    seen: float


class Sessions:
    """Sessions by their random ids, of which only digests are kept.

    Args:
        idle_s: Seconds without a request after which a session ends.
        most_s: Seconds after which it ends in any case.
        clock: Gives seconds that only grow.
    """

    def __init__(self, idle_s: float, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s, self._most_s, self._clock = idle_s, most_s, clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, user: User) -> str:
        """A new session; its id is for the browser's cookie alone."""
        session, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._sessions[_digest(session)] = _Session(user, now, now)
            own = [key for key, each in self._sessions.items() if each.user.name == user.name]
            for key in own[: max(len(own) - _MOST_OF_USER, 0)]:
                del self._sessions[key]
            if len(self._sessions) > _MOST:
                self._sessions.popitem(last=False)
        return session

    def user(self, session: str | None) -> User | None:
        """The user of a session, which thereby is not idle; None if there is none, or it has ended."""
        if session is None:
            return None
        key, now = _digest(session), self._clock()
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                return None
            if now - found.seen > self._idle_s or now - found.began > self._most_s:
                del self._sessions[key]
                return None
            self._sessions[key] = replace(found, seen=now)
            self._sessions.move_to_end(key)
            return found.user

    def end(self, session: str | None) -> User | None:
        """End a session; return its user, if there was one."""
        if session is None:
            return None
        with self._lock:
            found = self._sessions.pop(_digest(session), None)
        return found.user if found else None


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()
