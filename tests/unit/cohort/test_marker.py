"""A commit marker is read strictly, and those of the first version are read, too."""

from __future__ import annotations

import json

import pytest

from ctflow.cohort.marker import outcome_from_bytes
from ctflow.cohort.outcome import MarkName, RowFinding, RowOutcome, RowSegment
from ctflow.core.errors import NotWritten

OUTCOME = RowOutcome(
    "row-1", "0123456789ab", "done", "done", "", 0, 1, 2.0,
    folders=("f",),
    model={"name": "m"},
    segments=(RowSegment("f", "Tumour", 1.5, 2), RowSegment("f", "Cyst", 0.0, 0)),
    findings=(RowFinding("f", "Tumour", 1, 1.0, 12.0, 11.0, 9.0, -20.0, ("outside-body",)),),
    stage_seconds={"read": 0.5},
    gpu_busy=0.75,
)  # fmt: skip


def content(**changes) -> bytes:
    return json.dumps({**json.loads(json.dumps(OUTCOME.document)), **changes}).encode()


def test_a_marker_is_read_as_it_was_written():
    assert outcome_from_bytes(content(), OUTCOME.name) == OUTCOME
    assert outcome_from_bytes(content(gpu_busy=None), OUTCOME.name).gpu_busy is None


def test_a_marker_of_the_first_version_has_no_findings():
    document = json.loads(content(schema_version="1"))
    for name in ("segments", "findings", "stage_seconds", "gpu_busy"):
        del document[name]
    outcome = outcome_from_bytes(json.dumps(document).encode(), OUTCOME.name)
    assert (outcome.id, outcome.seconds, outcome.findings, outcome.gpu_busy) == ("row-1", 2.0, (), None)


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, content()[:-1],
        content(schema_version="3"), content(seconds="2"), content(seconds=True), content(seconds=float("nan")),
        content(exit_code=0.0), content(exit_code=2**40), content(attempt=-1), content(reason="\ud800"),
        content(folders=[1]), content(folders="f"), content(model={"a": 1}),
        content(gpu_busy="x"),
        content(segments=[{}]), content(segments=[1]), content(findings=[{"folder": "f"}]), content(stage_seconds=[]),
        content(other=1), content(id="row-2"), content(status="failed"), content(fingerprint="ffffffffffff"),
    ],
)  # fmt: skip
def test_a_damaged_marker_is_named_without_its_content(damaged):
    with pytest.raises(NotWritten, match="the marker of row row-1 is damaged") as error:
        outcome_from_bytes(damaged, OUTCOME.name)
    assert error.value.reason == "damaged-marker"


@pytest.mark.parametrize(
    "changes",
    [{"seconds": 10**400}, {"seconds": 1e308}, {"seconds": float("nan")}, {"finished": "0001-01-01T00:00:00Z"}],
)
def test_a_marker_with_impossible_figures_is_damaged(changes):
    with pytest.raises(NotWritten) as raised:
        outcome_from_bytes(content(**changes), OUTCOME.name)
    assert raised.value.reason == "damaged-marker"


def test_a_name_that_no_row_has_is_no_markers():
    assert MarkName.from_text("\udcff.0123456789ab.done.json") is None
    assert MarkName.from_text(str(OUTCOME.name)) == OUTCOME.name
