"""cohort.parquet, a row a series, and findings.parquet, a row a finding: streamed, whole or not at all.

Two files, not one with a column for the kind: a mean over a file is then the mean of one thing, and the id joins them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ctflow.cohort.outcome import RowFinding, RowOutcome
from ctflow.cohort.report.timeline import seconds_of_utc
from ctflow.core.requirements import check_requirements

_BATCH = 4096  # rows in memory at a time
_STAGES = ("read", "prepare", "segment", "compare", "restore", "seg", "measure", "write", "preview", "report")
_SERIES: Mapping[str, str] = {
    **dict.fromkeys(("id", "fingerprint", "status", "reason", "message"), "string"),
    "exit_code": "int32",
    "attempt": "int32",
    "seconds": "double",
    "finished": "timestamp",
    **dict.fromkeys(("node", "part", "digest", "input_digest", "model", "model_version", "weights_digest"), "string"),
    "ctflow_version": "string",
    "gpu_busy": "double",
    "volumes": "int32",
    "findings": "int64",
    "volume_ml": "double",
    **{f"{stage}_s": "double" for stage in _STAGES},
    "segments": "segments",
}
_FINDING: Mapping[str, str] = {"id": "string"} | {
    each.name: {"int": "int32", "float": "double"}.get(str(each.type), "string") for each in fields(RowFinding)
}
_RowColumns = Mapping[str, str]
_RowValues = Sequence[Any]


class RowSink(Protocol):
    """Takes the rows of one table."""

    def __call__(self, values: _RowValues) -> None:
        """Take a row, in the order of the table's columns."""


class CohortTables:
    """The tables being written; made by `tables_in`.

    Args:
        series: Takes a row a series.
        findings: Takes a row a finding.
    """

    def __init__(self, series: RowSink, findings: RowSink) -> None:
        self._series, self._findings = series, findings

    def add(self, outcome: RowOutcome) -> None:
        """Add a row of the cohort and its findings."""
        self._series(_series_values(outcome))
        for finding in outcome.findings:
            self._findings([outcome.id, *_finding_values(finding)])


def table_names(form: str) -> tuple[str, str]:
    """The files of a form, "parquet" or "csv"."""
    return f"cohort.{form}", f"findings.{form}"


def usual_form() -> str:
    """Parquet if pyarrow is installed, else CSV."""
    return "parquet" if find_spec("pyarrow") else "csv"


@contextmanager
def tables_in(folder: Path, form: str) -> Iterator[CohortTables]:
    """Write both tables.

    Args:
        folder: Gets the files of `table_names`; they are whole at the end of the context.
        form: "parquet" or "csv".

    Raises:
        RequirementUnmet: Parquet is asked for, and pyarrow is not installed.
    """
    if form == "parquet":
        check_requirements("cohort")
    opened: Callable[[Path, _RowColumns], AbstractContextManager[RowSink]] = _parquet if form == "parquet" else _csv
    first, second = (folder / name for name in table_names(form))
    with opened(first, _SERIES) as series, opened(second, _FINDING) as findings:
        yield CohortTables(series, findings)


def _series_values(outcome: RowOutcome) -> list[Any]:
    given = {
        **{name: getattr(outcome, name, None) for name in _SERIES},
        "model": outcome.model.get("name"),
        "model_version": outcome.model.get("version"),
        "weights_digest": outcome.model.get("weights_digest"),
        "ctflow_version": outcome.version,
        "volumes": len(outcome.folders),
        "findings": sum(segment.findings for segment in outcome.segments),
        "volume_ml": round(sum(segment.volume_ml for segment in outcome.segments), 6),
        **{f"{stage}_s": outcome.stage_seconds.get(stage) for stage in _STAGES},
        "segments": [
            {name: getattr(segment, name) for name in ("folder", "label", "volume_ml", "findings")}
            for segment in outcome.segments
        ],
    }
    return [given[name] for name in _SERIES]


def _finding_values(finding: RowFinding) -> list[Any]:
    values = [getattr(finding, each.name) for each in fields(RowFinding)]
    return [" ".join(value) if isinstance(value, tuple) else value for value in values]


@contextmanager
def _csv(path: Path, columns: _RowColumns) -> Iterator[RowSink]:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)

        def write(values: _RowValues) -> None:
            writer.writerow(_cell(value) for value in values)

        yield write


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"  # a spreadsheet would compute it
    return value


@contextmanager
def _parquet(path: Path, columns: _RowColumns) -> Iterator[RowSink]:
    import pyarrow  # noqa: PLC0415  # of the extra `cohort`
    from pyarrow import parquet  # noqa: PLC0415

    schema = pyarrow.schema([(name, _type(pyarrow, kind)) for name, kind in columns.items()])
    waiting: list[_RowValues] = []
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            made = [
                _array(pyarrow, cells, field) for cells, field in zip(zip(*waiting, strict=True), schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(made, schema=schema))
            waiting.clear()

        def write(values: _RowValues) -> None:
            waiting.append(values)
            if len(waiting) == _BATCH:
                flush()

        yield write
        if waiting:
            flush()


def _type(pyarrow: Any, kind: str) -> Any:
    if kind == "segments":
        inner = [("folder", "string"), ("label", "string"), ("volume_ml", "double"), ("findings", "int64")]
        return pyarrow.list_(pyarrow.struct([(name, _type(pyarrow, each)) for name, each in inner]))
    if kind == "timestamp":
        return pyarrow.timestamp("s", tz="UTC")
    return {"string": pyarrow.string, "double": pyarrow.float64, "int32": pyarrow.int32, "int64": pyarrow.int64}[kind]()


def _array(pyarrow: Any, cells: Sequence[Any], field: Any) -> Any:
    if pyarrow.types.is_timestamp(field.type):
        return pyarrow.array([seconds_of_utc(cell) for cell in cells], pyarrow.int64()).cast(field.type)
    return pyarrow.array(cells, field.type)
