"""Rows of a CSV file, as programs and spreadsheets write it."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from ctflow.cohort.manifest.columns import COLUMNS, check_columns
from ctflow.core.atomic import write_atomically
from ctflow.core.errors import ManifestInvalid

_SEPARATORS = ",;\t"  # a spreadsheet writes a semicolon where the comma is the decimal mark
_SAVE = "save it as CSV UTF-8"


def rows_from_csv(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Read the rows, one at a time.

    What spreadsheets add is no fault: a byte order mark, `sep=;`, CRLF, rows and last columns without any value.

    Args:
        path: The file, in UTF-8.

    Yields:
        Where each row is, for messages, and its values.

    Raises:
        ManifestInvalid: The file is not CSV in UTF-8, or a row has another number of values than the header.
        OSError: It cannot be read.
    """
    with _opened(path) as stream:
        for where, names, values in _rows(stream, check_columns):
            yield where, _by_name(where, names, values)


def chosen_from_csv(
    path: Path, choose: Callable[[Sequence[str]], Mapping[str, str]]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Read some columns; as `rows_from_csv`.

    Args:
        path: The file, in UTF-8.
        choose: From the header's names to those of the columns to read, by the names to give them.
    """
    chosen: Mapping[str, str] = {}

    def header(names: Iterable[str]) -> Sequence[str]:
        nonlocal chosen
        found = [name.strip() for name in names]
        chosen = choose(found)
        return found

    with _opened(path) as stream:
        for where, names, values in _rows(stream, header):
            row = _by_name(where, names, values)
            yield where, {key: row[name].strip() for key, name in chosen.items()}


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    with path.open("rb") as raw:
        start = raw.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ManifestInvalid(f"the manifest is in UTF-16: {_SAVE}", reason="encoding")
        raw.seek(0)
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            yield stream


def _rows(
    stream: TextIO, header_of: Callable[[Iterable[str]], Sequence[str]]
) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
    before, header, separator = _beginning(stream)
    line = before
    try:
        names = header_of(_without_empty_end(next(csv.reader([header], delimiter=separator, strict=True), [])))
        reader = csv.reader(stream, delimiter=separator, strict=True)
        for values in reader:
            line, where = before + reader.line_num, f"line {before + reader.line_num}"
            if not any(value.strip() for value in values):
                continue
            yield where, names, values
    except UnicodeDecodeError as error:
        raise ManifestInvalid(f"after line {line}: the manifest is not UTF-8: {_SAVE}", reason="encoding") from error
    except csv.Error as error:  # its text quotes no value
        raise ManifestInvalid(f"after line {line}: no CSV ({error})", reason="manifest-unreadable") from error


def _beginning(stream: TextIO) -> tuple[int, str, str]:
    """Lines up to the header, the header, and what separates its values."""
    separator, number = "", 0
    try:
        while line := stream.readline():
            number += 1
            text = line.strip("\r\n")
            if text.lower().startswith("sep=") and len(text) == 5:
                separator = text[4]
            elif text.strip(_SEPARATORS + " "):
                return number, text, separator or max(_SEPARATORS, key=text.count)
    except UnicodeDecodeError as error:
        raise ManifestInvalid(f"the manifest is not UTF-8: {_SAVE}", reason="encoding") from error
    raise ManifestInvalid("the manifest is empty: its first line must name the columns", reason="no-rows")


def _by_name(where: str, names: Sequence[str], values: Sequence[str]) -> Mapping[str, str]:
    extra = [value for value in values[len(names) :] if value.strip()]
    if extra or len(values) < len(names):
        raise ManifestInvalid(
            f"{where}: {len(values)} values for {len(names)} columns (quote values that contain the separator)",
            reason="row-length",
        )
    return dict(zip(names, values, strict=False))


def _without_empty_end(names: Sequence[str]) -> Sequence[str]:
    filled = [number for number, name in enumerate(names, start=1) if name.strip()]
    return names[: filled[-1]] if filled else ()


def csv_from_rows(rows: Iterable[Sequence[str]], path: Path) -> int:
    """Write rows, in the order of the manifest's columns; returns how many.

    Raises:
        OutputError: The file cannot be written.
    """
    count = 0

    def write(stream: BinaryIO) -> None:
        nonlocal count
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(row)
            count += 1
        text.detach()  # which flushes; the file is closed by whoever opened it

    write_atomically(path, write)
    return count
