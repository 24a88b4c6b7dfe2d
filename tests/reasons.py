"""Errors by their class and reason: the sentence may be reworded, what it names may not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctflow.core.errors import CtflowError


@contextmanager
def raises_reason(
    kind: type[CtflowError], reason: str, *, names: str | tuple[str, ...] = ()
) -> Iterator[pytest.ExceptionInfo[CtflowError]]:
    """As `pytest.raises`, with this reason, which belongs to one class.

    Args:
        kind: The class.
        reason: One of its `REASONS`.
        names: What the message must name: a file, a key, a line, a value.
    """
    assert reason in kind.REASONS, f"{kind.__name__} has no reason {reason!r}"
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert error.reason == reason, error.described
    for each in (names,) if isinstance(names, str) else names:
        assert each in str(error), f"{error} does not name {each!r}"


def reasons_of_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The reasons that log records carry, in order."""
    facts = [getattr(record, "facts", {}) for record in caplog.records]
    return [each["reason"] for each in facts if "reason" in each]
