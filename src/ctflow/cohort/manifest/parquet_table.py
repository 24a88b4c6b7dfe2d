"""Rows of a Parquet file. Ray Data brings pyarrow, and index tables of public archives are Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ctflow.cohort.manifest.columns import COLUMNS, check_columns
from ctflow.core.atomic import write_atomically
from ctflow.core.errors import ManifestInvalid
from ctflow.core.requirements import check_requirements

_MAGIC = b"PAR1"
_BATCH = 8192  # rows in memory at a time


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        return stream.read(4) == _MAGIC


def rows_from_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Read the rows, a batch at a time.

    Args:
        path: The file; its columns hold text, or nothing.

    Yields:
        As `ctflow.cohort.manifest.csv_table.rows_from_csv`.

    Raises:
        ManifestInvalid: The file is damaged, or a column holds something else than text.
        RequirementUnmet: pyarrow is not installed.
    """
    check_requirements("cohort")
    import pyarrow  # noqa: PLC0415  # of the extra `cohort`
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = dict(zip(schema.names, check_columns(schema.names), strict=True))
            _check_types(schema, pyarrow)
            for batch in file.iter_batches(_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {names[name]: value or "" for name, value in values.items()}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(number, error) from error


def chosen_from_parquet(
    path: Path, choose: Callable[[Sequence[str]], Mapping[str, str]]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """As `ctflow.cohort.manifest.csv_table.chosen_from_csv`; values of other types are given as text."""
    check_requirements("cohort")
    import pyarrow  # noqa: PLC0415  # of the extra `cohort`
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            chosen = choose(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH, columns=list(dict.fromkeys(chosen.values()))):
                for values in batch.to_pylist():
                    number += 1
                    texts = {name: "" if value is None else str(value) for name, value in values.items()}
                    yield f"row {number}", {key: texts[name] for key, name in chosen.items()}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(number, error) from error


def _damaged(number: int, error: Exception) -> ManifestInvalid:
    if isinstance(error, UnicodeDecodeError):  # its own text quotes what it cannot read
        return ManifestInvalid(f"after row {number}: a text of the Parquet file is not UTF-8", reason="encoding")
    what = f"after row {number}: the Parquet file is damaged ({type(error).__name__})"
    return ManifestInvalid(what, reason="manifest-unreadable")


def _check_types(schema: Any, pyarrow: Any) -> None:
    for field in schema:
        kind = field.type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
            raise ManifestInvalid(f"column {field.name}: must be text, not {kind}", reason="wrong-value")


def parquet_from_rows(rows: Iterable[Sequence[str]], path: Path) -> int:
    """As `ctflow.cohort.manifest.csv_table.csv_from_rows`."""
    check_requirements("cohort")
    import pyarrow  # noqa: PLC0415  # of the extra `cohort`
    from pyarrow import parquet  # noqa: PLC0415

    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    count, waiting = 0, iter(rows)

    def write(stream: BinaryIO) -> None:
        nonlocal count
        with parquet.ParquetWriter(stream, schema) as writer:
            while batch := list(islice(waiting, _BATCH)):
                count += len(batch)
                columns = [list(column) for column in zip(*batch, strict=True)]
                writer.write_table(pyarrow.table(columns, schema=schema))

    write_atomically(path, write)
    return count
