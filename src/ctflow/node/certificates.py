"""The certificates in use: taken anew when their files change, and watched for their end."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from ctflow.core.errors import OutputError
from ctflow.node.tls import TlsContext

_LOOK_AGAIN_S = 2.0
_DAY_S = 86400.0
WARN_DAYS = 30
_ONCE_IN_S, _MOST_TOLD = 60.0, 256
log = logging.getLogger(__name__)


class CertificateWatch(threading.Thread):
    """Takes changed certificates into use, says in time when one of ours expires, and records rejected peers.

    Args:
        contexts: Those in use.
        event: Records an event of the audit trail: kind, text and peer.
    """

    def __init__(self, contexts: Sequence[TlsContext], event: Callable[[str, str, str | None], None]) -> None:
        super().__init__(name="certificates", daemon=True)
        self.contexts = tuple(contexts)
        self._event = event
        self._rejected: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        self._telling = threading.Lock()  # the listener and every association tell
        self._warned_at: dict[str, float] = {}

    def stop(self) -> None:
        """End."""
        self._rejected.put(None)
        self.join()

    def rejected(self, peer: str, why: str) -> None:
        """Record that a peer was rejected; does not wait. The same of one peer is recorded once a minute."""
        now = time.monotonic()
        with self._telling:
            told_at, others = self._told.get((peer, why), (-_ONCE_IN_S, 0))
            if now - told_at < _ONCE_IN_S:
                self._told[peer, why] = (told_at, others + 1)
                return
            self._told.pop((peer, why), None)
            self._told[peer, why] = (now, 0)
            if len(self._told) > _MOST_TOLD:
                del self._told[next(iter(self._told))]
        self._rejected.put((peer, f"{why} (and {others} times since the last such line)" if others else why))

    def run(self) -> None:
        """Run until `stop`."""
        while True:
            for each in self.contexts:
                self.look_at(each)
            try:
                rejected = self._rejected.get(timeout=_LOOK_AGAIN_S)
            except queue.Empty:
                continue
            if rejected is None:
                return
            self._record("tls-rejected", rejected[1], rejected[0])

    def _record(self, kind: str, text: str, peer: str | None = None) -> None:
        try:
            self._event(kind, text, peer)
        except (OutputError, OSError, sqlite3.Error) as error:
            log.error("%s: %s, which the journal did not take (%s)", kind, text, type(error).__name__)  # noqa: TRY400

    def look_at(self, context: TlsContext) -> None:
        """Take a context's files if they have changed; record it, and what is wrong with them."""
        news = context.look()
        if news is True:
            self._record("certificates", f"{context.name}: changed files are in use, {said_of_expiry(context)}")
            self._warned_at.pop(context.name, None)
        elif news is False:
            self._record("certificates-broken", f"{context.problem}; the earlier ones stay in use")
        self._warn(context)

    def _warn(self, context: TlsContext) -> None:
        """Once a day, in the last days of a certificate."""
        now = time.time()
        left_s = (context.expires_at or float("inf")) - now
        if left_s < WARN_DAYS * _DAY_S and now - self._warned_at.get(context.name, 0.0) > _DAY_S:
            self._warned_at[context.name] = now
            log.warning("%s: %s", context.name, said_of_expiry(context))

    def expiries(self) -> list[tuple[str, float]]:
        """When each certificate of ours expires, by its place in the settings."""
        return [(each.name, each.expires_at) for each in self.contexts if each.expires_at is not None]

    def remarks(self) -> list[str]:
        """What is wrong with certificates while the node works."""
        broken = [f"{each.problem}; the earlier ones stay in use" for each in self.contexts if each.problem]
        soon = time.time() + WARN_DAYS * _DAY_S
        ending = [each for each in self.contexts if each.expires_at is not None and each.expires_at < soon]
        return [*broken, *(f"{each.name}: {said_of_expiry(each)}" for each in ending)]


def said_of_expiry(context: TlsContext) -> str:
    """When a context's own certificate expires, as a clause."""
    if context.expires_at is None:
        return "without a certificate of this node"
    day = datetime.fromtimestamp(context.expires_at, UTC).date().isoformat()
    days = int((context.expires_at - time.time()) // _DAY_S)
    return f"the certificate expires on {day}, in {days} days" if days >= 0 else f"the certificate expired on {day}"
