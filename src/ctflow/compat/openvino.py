"""OpenVINO is imported without its telemetry, which would report each import to its maker.

Read for OpenVINO 2026.1 and later, which import `openvino_telemetry` or, if it is absent, their own empty stand-in.
Pull request 23832 of openvinotoolkit/openvino made the import report; its opt-out is a file in the user's home.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TELEMETRY = "openvino_telemetry"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide the telemetry package; OpenVINO then permanently binds its own empty stand-in."""
    hidden = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]
