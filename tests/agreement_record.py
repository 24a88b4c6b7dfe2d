"""Keeps the agreement that tests measured: docs/models.md has the figures of docs/results/models-agreement.json.

CTFLOW_RECORD=FILE python -m pytest tests/e2e/test_zoo.py tests/unit/pipeline/test_nnunet.py
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path


def record(group: str, name: str, *equal: float) -> None:
    """Keep shares of equal voxels if CTFLOW_RECORD names a file; several processes may do so at the same time."""
    given = os.environ.get("CTFLOW_RECORD")
    if given:
        with Path(given).open("a+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            document = json.loads(stream.read() or "{}")
            document.setdefault(group, {})[name] = [round(share, 6) for share in equal]
            stream.truncate(0)
            stream.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
