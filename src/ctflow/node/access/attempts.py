"""Limits on attempts to sign in: of an address, and of a name from addresses that it has not signed in from.

An attacker can so neither try many passwords nor lock another user out: a user who has signed in from an address
can do so again from there, whatever others try with the name.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

OF_ADDRESS, ADDRESS_S = 10, 300.0
OF_NAME, NAME_S = 50, 900.0
_MOST_KEPT = 10_000  # addresses, names, pairs: the least recent are forgotten


class Attempts:
    """The recent attempts that have not succeeded.

    Args:
        clock: Gives seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._of_address: OrderedDict[str, deque[float]] = OrderedDict()
        self._of_name: OrderedDict[str, deque[float]] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    def begin(self, name: str, address: str) -> float:
        """Count an attempt, before its password is looked at; `succeeded` and `taken_back` take it back.

        Returns:
            0, or the seconds to wait until the next attempt is looked at; this one is not counted then.
        """
        with self._lock:
            now, network = self._clock(), network_of(address)
            waits = [_wait_s(self._of_address, network, now, OF_ADDRESS, ADDRESS_S)]
            is_known = (name, network) in self._known
            if not is_known:
                waits.append(_wait_s(self._of_name, name, now, OF_NAME, NAME_S))
            if max(waits):
                return max(waits)
            _count(self._of_address, network, now)
            if not is_known:
                _count(self._of_name, name, now)
            return 0.0

    def taken_back(self, name: str, address: str) -> None:
        """The attempt that was begun last was not looked at."""
        with self._lock:
            self._take_back(name, network_of(address))

    def _take_back(self, name: str, network: str) -> None:
        counted = [(self._of_address, network)]
        if (name, network) not in self._known:
            counted.append((self._of_name, name))
        for table, key in counted:
            if table.get(key):
                table[key].pop()

    def succeeded(self, name: str, address: str) -> None:
        """The attempt that was begun last has succeeded."""
        with self._lock:
            network = network_of(address)
            self._take_back(name, network)
            self._known[(name, network)] = None
            self._known.move_to_end((name, network))
            if len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)


def network_of(address: str) -> str:
    """What stands for an address: an IPv6 host has all addresses of its network of 64 bits."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _wait_s(table: OrderedDict[str, deque[float]], key: str, now: float, most: int, span_s: float) -> float:
    times = table.get(key)
    while times and now - times[0] >= span_s:
        times.popleft()
    return times[0] + span_s - now if times and len(times) >= most else 0.0


def _count(table: OrderedDict[str, deque[float]], key: str, now: float) -> None:
    table.setdefault(key, deque()).append(now)
    table.move_to_end(key)
    if len(table) > _MOST_KEPT:
        table.popitem(last=False)
