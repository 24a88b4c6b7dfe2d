"""Outcomes of rows that nobody computed, for tables, pages and metrics."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ctflow.cohort.outcome import RowFinding, RowOutcome, RowSegment
from ctflow.cohort.report.timeline import utc_of_seconds

FINGERPRINT = "0123456789ab"
BEGAN = 1_793_450_000
DONE = RowOutcome(
    "row-1", FINGERPRINT, "done", "done", "", 0, 1, 2.5,
    digest="d" * 64, folders=("abc",), model={"name": "lungs", "version": "1.2", "weights_digest": "w"},
    version="0.1", node="gpu-01", part="1/1", finished=utc_of_seconds(BEGAN),
    segments=(RowSegment("abc", "Nodule", 1.5, 2), RowSegment("abc", "Cyst", 0.0, 0)),
    findings=(
        RowFinding("abc", "Nodule", 1, 1.25, 14.0, 12.0, 9.0, -30.0),
        RowFinding("abc", "Nodule", 2, 0.25, 7.0, 6.0, 5.0, -700.5, ("outside-body", "mean-hu")),
    ),
    stage_seconds={"read": 0.5, "segment": 1.5}, gpu_busy=0.8,
)  # fmt: skip
REJECTED = replace(
    DONE, id="row-2", status="rejected", reason="gap", message="a slice is missing", exit_code=2, digest="", folders=(),
    segments=(), findings=(), stage_seconds={},
)  # fmt: skip
FAILED = replace(REJECTED, id="row-3", status="failed", reason="worker-ended", exit_code=4, attempt=3, gpu_busy=None)


def many(count: int, seed: int = 0) -> Iterator[RowOutcome]:
    """So many rows: one of thirty rejected, one of hundred failed, half of them after a pause of seven hours."""
    chance, at = random.Random(seed), float(BEGAN)
    for number in range(count):
        at += chance.expovariate(4.0) + (25_000 if number == count // 2 else 0)
        common = {"id": f"s{number:06d}", "node": f"gpu-{number % 3:02d}", "finished": utc_of_seconds(int(at))}
        kind = REJECTED if number % 30 == 7 else FAILED if number % 100 == 3 else DONE
        yield replace(kind, seconds=round(chance.lognormvariate(1.8, 0.4), 3), **common)


def write_markers(folder: Path, outcomes, research_only: str | None = None) -> Path:
    """A destination that has them."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    common = {"research_only": research_only, "settings": {"report": "html"}}
    (folder / "cohort.json").write_text(json.dumps(common))
    for outcome in outcomes:
        (folder / "rows" / str(outcome.name)).write_text(json.dumps(outcome.document))
    return folder
