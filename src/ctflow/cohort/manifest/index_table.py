"""The rows of an index table, as public archives publish it: a row a series, with the prefix of its objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ctflow.cohort.locations.location import fault_of_location
from ctflow.cohort.manifest.csv_table import chosen_from_csv
from ctflow.cohort.manifest.parquet_table import chosen_from_parquet, is_parquet
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.manifest.series import row_of_series
from ctflow.core.errors import ManifestInvalid
from ctflow.settings.schema import shown

# Of the Imaging Data Commons: idc-index-data 17 and later, and before.
_LOCATIONS = ("series_aws_url", "series_aws_location")


def rows_from_index(path: Path, where: Mapping[str, str] | None = None, location: str = "") -> Iterator[CohortRow]:
    """The rows of the CT series, in the table's order; of the table, a batch of rows is in memory.

    Args:
        path: CSV or Parquet with the columns SeriesInstanceUID, StudyInstanceUID and Modality.
        where: Values that columns must have.
        location: The column of the locations; empty for that of the Imaging Data Commons.

    Raises:
        ManifestInvalid: It is no such table, or a series is there twice.
        RequirementUnmet: It is Parquet, and pyarrow is not installed.
    """
    where = where or {}

    def choose(names: Sequence[str]) -> Mapping[str, str]:
        known = {name.lower(): name for name in names}
        count = Counter(name.lower() for name in names)
        column = location or next((each for each in _LOCATIONS if each in known), _LOCATIONS[0])
        wanted = {"study": "StudyInstanceUID", "uid": "SeriesInstanceUID", "modality": "Modality", "location": column}
        wanted |= {f"where {name}": name for name in where}
        for name in wanted.values():
            if name.lower() not in known:
                raise ManifestInvalid(f"the index table has no column {shown(name)}", reason="missing-column")
            if count[name.lower()] > 1:
                raise ManifestInvalid(f"the index table: column {shown(name)} is there twice", reason="double-column")
        return {key: known[name.lower()] for key, name in wanted.items()}

    seen: set[str] = set()
    try:
        table = chosen_from_parquet(path, choose) if is_parquet(path) else chosen_from_csv(path, choose)
        for place, values in table:
            if values["modality"] == "CT" and all(values[f"where {name}"] == value for name, value in where.items()):
                yield _row(place, values, seen)
    except OSError as error:
        raise ManifestInvalid(
            f"the index table cannot be read ({error.strerror or type(error).__name__}): check its path",
            reason="manifest-unreadable",
        ) from error


def _row(place: str, values: Mapping[str, str], seen: set[str]) -> CohortRow:
    location = values["location"].removesuffix("*")
    if fault := fault_of_location(location):
        raise ManifestInvalid(f"{place} of the index table: the location {fault}", reason="wrong-location")
    row = row_of_series(values["study"], values["uid"], location)
    if row.id in seen:
        raise ManifestInvalid(
            f"{place} of the index table: its series is there twice: choose one version with --where",
            reason="duplicate-id",
        )
    seen.add(row.id)
    return row
