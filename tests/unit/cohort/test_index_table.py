"""Manifests of index tables, with the columns that the Imaging Data Commons publishes."""

from __future__ import annotations

import csv

import pyarrow
import pytest
from pyarrow import parquet

from ctflow.cohort.manifest.rows import manifest_from_file, write_manifest
from ctflow.cohort.manifest.source import rows_from_source
from ctflow.core.errors import CtflowError

COLUMNS = ("collection_id", "PatientID", "SeriesInstanceUID", "StudyInstanceUID", "Modality", "instanceCount",
           "crdc_series_uuid", "series_aws_url", "series_size_MB")  # fmt: skip
ROWS = [
    ("nlst", "p1", "1.2.1", "1.1.1", "CT", 120, "aaaa", "s3://idc-open-data/aaaa/*", 60.1),
    ("nlst", "p1", "1.2.2", "1.1.1", "SEG", 1, "bbbb", "s3://idc-open-data/bbbb/*", 0.2),
    ("nlst", "p2", "1.2.3", "1.1.2", "CT", 90, "cccc", "s3://idc-open-data-two/cccc/*", 45.0),
    ("other", "p3", "1.2.4", "1.1.3", "CT", 80, "dddd", "s3://idc-open-data/dddd/*", 40.0),
    ("other", "p3", "1.2.5", "1.1.3", "CT", 80, "eeee", "s3://idc-open-data/eeee/*", None),
]


def table(tmp_path, kind: str, rows=ROWS, columns=COLUMNS):
    path = tmp_path / f"index.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([columns, *rows])
    else:
        values = zip(*rows, strict=True)
        parquet.write_table(pyarrow.table(dict(zip(columns, map(list, values), strict=True))), path)
    return path


def reason(*arguments) -> str:
    with pytest.raises(CtflowError) as raised:
        list(rows_from_source(*arguments))
    return raised.value.reason


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_ct_series_of_an_index_have_rows(tmp_path, kind):
    rows = list(rows_from_source(str(table(tmp_path, kind))))
    assert [(row.series, row.location) for row in rows] == [
        ("1.2.1", "s3://idc-open-data/aaaa/"),
        ("1.2.3", "s3://idc-open-data-two/cccc/"),
        ("1.2.4", "s3://idc-open-data/dddd/"),
        ("1.2.5", "s3://idc-open-data/eeee/"),
    ]
    assert write_manifest(rows, tmp_path / "m.csv") == 4
    assert manifest_from_file(tmp_path / "m.csv").rows == tuple(rows)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_conditions_choose_rows(tmp_path, kind):
    path = str(table(tmp_path, kind))
    assert [row.series for row in rows_from_source(path, ["collection_id=nlst"])] == ["1.2.1", "1.2.3"]
    assert [row.series for row in rows_from_source(path, ["Collection_ID=nlst", "instanceCount=90"])] == ["1.2.3"]
    assert reason(path, ["collection_id=none"]) == "no-dicom"
    assert reason(path, ["collection=nlst"]) == "missing-column"
    assert reason(path, ["collection_id"]) == "invalid-value"


def test_another_column_may_hold_the_locations(tmp_path):
    columns = tuple(name.replace("series_aws_url", "where_it_is") for name in COLUMNS)
    path = str(table(tmp_path, "csv", columns=columns))
    assert reason(path) == "missing-column"
    assert len(list(rows_from_source(path, (), "where_it_is"))) == 4
    older = tuple(name.replace("series_aws_url", "series_aws_location") for name in COLUMNS)
    assert len(list(rows_from_source(str(table(tmp_path, "csv", columns=older))))) == 4


def test_what_is_wrong_with_an_index_is_named(tmp_path):
    assert reason(str(table(tmp_path, "csv", [*ROWS, ROWS[0]]))) == "duplicate-id"
    wrong = ("x", "p", "1.2.9", "1.1.9", "CT", 1, "f", "ftp://host/f", 1)
    assert reason(str(table(tmp_path, "csv", [wrong]))) == "wrong-location"
    for twice in ("series_aws_url", "Series_AWS_URL"):
        columns = tuple(twice if name == "instanceCount" else name for name in COLUMNS)
        assert reason(str(table(tmp_path, "csv", columns=columns))) == "double-column"
    assert reason(str(tmp_path / "absent.csv")) == "manifest-unreadable"
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    assert reason(str(tmp_path / "damaged.parquet")) == "manifest-unreadable"
    assert reason("https://host/index") == "invalid-value"
    assert reason("dicomweb+https://user:secret@host/x") == "invalid-value"
