"""Errors by their class and reason: the sentence may be reworded."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from ctflow.core.errors import CtflowError


@contextmanager
def raises_reason(kind: type[CtflowError], reason: str):
    """As `pytest.raises` of exactly this class, and with this reason."""
    assert reason in kind.REASONS, f"{kind.__name__} has no reason {reason!r}"
    with pytest.raises(kind) as caught:
        yield caught
    assert (type(caught.value), caught.value.reason) == (kind, reason), str(caught.value)
