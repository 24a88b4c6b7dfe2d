"""The manifest of a cohort: one row a series, read strictly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctflow.cohort.locations.location import fault_of_location
from ctflow.cohort.manifest.columns import COLUMNS
from ctflow.cohort.manifest.csv_table import csv_from_rows, rows_from_csv
from ctflow.cohort.manifest.parquet_table import is_parquet, parquet_from_rows, rows_from_parquet
from ctflow.core.errors import ManifestInvalid, SettingsInvalid
from ctflow.settings.run import read_volume
from ctflow.settings.schema import shown

_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_UID = re.compile(r"[0-9.]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One series of a cohort.

    Attributes:
        id: Names its result; unique, also without regard to case.
        location: Folder of its files, absolute or relative to the manifest; or a URL (`ctflow.cohort.locations`).
        series: Its SeriesInstanceUID, where the location holds several.
        volume: Which of its volumes, as `ctflow run --volume`; empty for the run's choice.
        digest: Expected digest of its files (`ctflow.cohort.manifest.digest`); empty if none is known.
    """

    id: str
    location: str
    series: str = ""
    volume: str = ""
    digest: str = ""

    @property
    def fingerprint(self) -> str:
        """Changes with what the row asks for: content if its digest is known, else the location as written."""
        asked = (self.digest or self.location, self.series, self.volume)
        return hashlib.sha256("\0".join(asked).encode("utf-8", "surrogateescape")).hexdigest()[:12]


@dataclass(frozen=True)
class ManifestPart:
    """A share of a manifest: by the rows' ids, so that it does not depend on their order or on other rows.

    Attributes:
        number: From 1.
        count: How many shares there are.
    """

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """As the name of a folder."""
        return f"part-{self.number}-of-{self.count}"

    def holds(self, row_id: str) -> bool:
        """Whether a row belongs to this share."""
        hashed = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big")
        return hashed % self.count == self.number - 1


WHOLE = ManifestPart()


def part_from_text(text: str) -> ManifestPart:
    """A share as typed, such as 3/8.

    Raises:
        SettingsInvalid: It is no share.
    """
    number, slash, count = text.partition("/")
    is_number = slash and all(each.isascii() and each.isdecimal() and len(each) < 8 for each in (number, count))
    if not is_number or not 1 <= int(number) <= int(count):
        raise SettingsInvalid(
            f"--part: must be I/N with I from 1 to N, such as 1/8, not {shown(text)}", reason="invalid-value"
        )
    return ManifestPart(int(number), int(count))


@dataclass(frozen=True)
class Manifest:
    """The rows of a share.

    Attributes:
        base: Folder to which relative locations belong.
        rows: The share's, in the manifest's order.
        total: Number of rows of the whole manifest.
    """

    base: Path
    rows: tuple[CohortRow, ...]
    total: int


def manifest_from_file(path: Path, part: ManifestPart = WHOLE) -> Manifest:
    """Read a manifest, and check every row of it, whatever the share.

    Args:
        path: CSV, or Parquet, whichever its first bytes say.
        part: The share to keep.

    Returns:
        The share's rows.

    Raises:
        ManifestInvalid: It cannot be read, or a row is wrong; names the line.
        RequirementUnmet: It is Parquet, and pyarrow is not installed.
    """
    try:
        cells = rows_from_parquet(path) if is_parquet(path) else rows_from_csv(path)
        rows, total = _checked(cells, part)
    except OSError as error:
        raise ManifestInvalid(
            f"the manifest cannot be read ({error.strerror or type(error).__name__}): check its path",
            reason="manifest-unreadable",
        ) from error
    if not total:
        raise ManifestInvalid("the manifest has no rows below its header: add one a series", reason="no-rows")
    return Manifest(path.absolute().parent, rows, total)


def write_manifest(rows: Iterable[CohortRow], path: Path) -> int:
    """Write a manifest as its name says; whole, or not at all.

    Args:
        rows: Its rows.
        path: Ends in .csv or .parquet.

    Returns:
        How many rows it has.

    Raises:
        SettingsInvalid: Another ending.
        OutputError: It cannot be written.
    """
    writers = {".csv": csv_from_rows, ".parquet": parquet_from_rows}
    if path.suffix.lower() not in writers:
        raise SettingsInvalid(f"-o: {shown(path.name)} must end in .csv or .parquet", reason="invalid-value")
    return writers[path.suffix.lower()](_values(rows), path)


def is_safe_id(text: str) -> bool:
    """Whether a text may be an id: it becomes the name of a folder and of objects."""
    return bool(_ID.fullmatch(text))


def is_plain_uid(text: str) -> bool:
    """Whether a UID may stand in a manifest: others, which break DICOM's rules, may hold anything."""
    return bool(_UID.fullmatch(text))


def _values(rows: Iterable[CohortRow]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield tuple(str(getattr(row, name)) for name in COLUMNS)


def _checked(cells: Iterable[tuple[str, Mapping[str, str]]], part: ManifestPart) -> tuple[tuple[CohortRow, ...], int]:
    kept: list[CohortRow] = []
    seen: dict[str, str] = {}
    for where, values in cells:
        row = _row(where, values)
        twin = seen.setdefault(row.id.lower(), where)
        if twin is not where:
            raise ManifestInvalid(
                f"{where}: the id {row.id} is also that of {twin} (capitals make no difference): ids must differ",
                reason="duplicate-id",
            )
        if part.holds(row.id):
            kept.append(row)
    return tuple(kept), len(seen)


def _row(where: str, values: Mapping[str, str]) -> CohortRow:
    given = {name: value if name == "location" else value.strip() for name, value in values.items()}
    row = CohortRow(**{**given, "digest": given.get("digest", "").lower()})
    if not is_safe_id(row.id):
        raise ManifestInvalid(
            f"{where}: the id {shown(row.id)} cannot name a result: use 1 to 100 letters, digits, dots, hyphens and"
            " underscores, with a letter or digit first and no dot last",
            reason="unsafe-id",
        )
    _check_location(where, row)
    if row.series and not is_plain_uid(row.series):
        raise _wrong(where, row, "series", "is no UID (a spreadsheet may have changed it)")
    if row.digest and not _DIGEST.fullmatch(row.digest):
        raise _wrong(where, row, "digest", "must be the 64 hexadecimal digits of a SHA-256 digest")
    if row.volume:
        try:
            read_volume(row.volume)
        except ValueError as error:
            raise _wrong(where, row, "volume", str(error)) from error
    return row


def _check_location(where: str, row: CohortRow) -> None:
    fault = fault_of_location(row.location)
    if fault:
        raise ManifestInvalid(f"{where}, id {row.id}: its location {fault}", reason="wrong-location")


def _wrong(where: str, row: CohortRow, column: str, fault: str) -> ManifestInvalid:
    return ManifestInvalid(f"{where}, id {row.id}: {column}: {fault}", reason="wrong-value")
