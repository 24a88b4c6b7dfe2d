"""The rows of what is no folder tree: a DICOMweb server, or an index table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from ctflow.cohort.manifest.index_table import rows_from_index
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.manifest.server import rows_from_server
from ctflow.cohort.stores.dicomweb import SERVER_URL
from ctflow.core.errors import NoUsableSeries, SettingsInvalid
from ctflow.settings.schema import shown


def rows_from_source(source: str, where: Iterable[str] = (), location: str = "") -> Iterator[CohortRow]:
    """The rows of the CT series.

    Args:
        source: `dicomweb+https://SERVER`, or the path of an index table.
        where: COLUMN=VALUE of an index table's rows.
        location: As of `rows_from_index`.

    Raises:
        SettingsInvalid: It is another URL, or `where` has no column.
        NoUsableSeries: There is no CT series.
        ManifestInvalid: As of `rows_from_index` and `rows_from_server`.
        NotFetched: The server does not answer.
    """
    if "://" not in source:
        rows = rows_from_index(Path(source), dict(_condition(each) for each in where), location)
    elif SERVER_URL.fullmatch(source):
        rows = rows_from_server(source)
    else:
        raise SettingsInvalid(
            "SOURCE: must be a folder, dicomweb+https://SERVER without credentials, or an index table",
            reason="invalid-value",
        )
    first = next(rows, None)
    if first is None:
        raise NoUsableSeries("there is no CT series", reason="no-dicom")
    return chain([first], rows)


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column.strip():
        raise SettingsInvalid(f"--where: must be COLUMN=VALUE, not {shown(text)}", reason="invalid-value")
    return column.strip(), value.strip()
