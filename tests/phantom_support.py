"""Phantoms that several tests take: each is drawn once a process, which takes about a second."""

from __future__ import annotations

import copy
import functools

from ctflow.phantom import Phantom, phantom_from_seed

_drawn = functools.cache(phantom_from_seed)


def phantom_drawn_once(seed: int, shape: tuple[int, int, int]) -> Phantom:
    """What `phantom_from_seed` gives; the caller's own, who may change it."""
    return copy.deepcopy(_drawn(seed, shape))
