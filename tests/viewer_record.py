"""Keeps what viewers made of ctflow's objects: docs/results/viewers.json, from which docs/viewers.md has its table.

CTFLOW_RECORD=docs/results/viewers.json make test-viewers
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

RECORD = Path(__file__).parents[1] / "docs" / "results" / "viewers.json"


def agrees_with_record(viewer: str, form: str, series: str, outcome: str) -> None:
    """Check that an outcome is the record's; if CTFLOW_RECORD names a file, keep it there instead.

    Several processes may do so at the same time.
    """
    given = os.environ.get("CTFLOW_RECORD")
    if given is None:
        assert outcome == json.loads(RECORD.read_text())[viewer][form][series], (viewer, form, series)
        return
    with Path(given).open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        document = json.loads(stream.read() or "{}")
        document.setdefault(viewer, {}).setdefault(form, {})[series] = outcome
        stream.truncate(0)
        stream.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
