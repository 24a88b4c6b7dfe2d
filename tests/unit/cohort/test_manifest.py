"""Manifests: what people and spreadsheets write is read, and what is wrong is named with its line."""

from __future__ import annotations

import pytest

from ctflow.cohort.manifest.rows import CohortRow, ManifestPart, manifest_from_file, part_from_text, write_manifest
from ctflow.core.errors import ManifestInvalid, SettingsInvalid

HEADER = "id,location,series,volume,digest\n"


def rows(tmp_path, content: str | bytes) -> tuple[CohortRow, ...]:
    path = tmp_path / "m.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return manifest_from_file(path).rows


def refused(tmp_path, content: str | bytes) -> tuple[str, str]:
    with pytest.raises(ManifestInvalid) as raised:
        rows(tmp_path, content)
    return raised.value.reason, str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        "id,location\na,x y/z\nb,/d\n",
        "\ufeffid,location\r\na,x y/z\r\nb,/d\r\n",
        "id;location\na;x y/z\nb;/d\n",
        "sep=;\r\nid;location\r\na;x y/z\r\nb;/d",
        "id\tlocation\na\tx y/z\nb\t/d\n",
        'ID , Location,,\n"a",x y/z,,\n\n,,,\n b ,"/d",\n',
        "\n\nlocation,id\nx y/z,a\n/d,b\n",
    ],
    ids=["plain", "bom", "semicolons", "sep", "tabs", "empty cells", "blank lines"],
)
def test_what_programs_and_spreadsheets_write_is_read(tmp_path, content):
    assert rows(tmp_path, content) == (CohortRow("a", "x y/z"), CohortRow("b", "/d"))


def test_every_column_is_read(tmp_path):
    (row,) = rows(tmp_path, f"{HEADER}a,x,1.2.3,phase=50,{'AB' * 32}\n")
    assert row == CohortRow("a", "x", "1.2.3", "phase=50", "ab" * 32)


@pytest.mark.parametrize(
    ("content", "reason", "told"),
    [
        ("id,location,colour\na,x,red\n", "unknown-column", "'colour'"),
        ("id,location,id\na,x,b\n", "double-column", "id"),
        ("location\nx\n", "missing-column", "id"),
        ("id\na\n", "missing-column", "location"),
        ("", "no-rows", "empty"),
        ("\n ,\n", "no-rows", "empty"),
        ("id,location\n", "no-rows", "no rows"),
        ("id,location\na,x\nb,y\n\nA,z\n", "duplicate-id", "line 5"),
        ("id,location\n../a,x\n", "unsafe-id", "line 2"),
        ("id,location\n.a,x\n", "unsafe-id", "line 2"),
        ("id,location\na.,x\n", "unsafe-id", "line 2"),
        ("id,location\na/b,x\n", "unsafe-id", "line 2"),
        ("id,location\n1.23E+17,x\n", "unsafe-id", "line 2"),
        ("id,location\n\u00e4,x\n", "unsafe-id", "line 2"),
        (f"id,location\n{'a' * 101},x\n", "unsafe-id", "line 2"),
        ("id,location\n,x\n", "unsafe-id", "line 2"),
        ("id,location\na,\n", "wrong-location", "empty"),
        ('id,location\na,"x\ny"\n', "wrong-location", "line break"),
        ("id,location\na,ftp://host/x\n", "wrong-location", "URL"),
        ("id,location\na,D:\\Muster^Max\n", "wrong-location", "Windows"),
        ("id,location\na,x,y\n", "row-length", "line 2"),
        ("id,location\na,x\nb\n", "row-length", "line 3"),
        ('id,location\na,"x\nb,y\n', "manifest-unreadable", "CSV"),
        (f"{HEADER}a,x,1.2 3,,\n", "wrong-value", "series"),
        (f"{HEADER}a,x,1.24E+10,,\n", "wrong-value", "spreadsheet"),
        (f"{HEADER}a,x,,phase,\n", "wrong-value", "volume"),
        (f"{HEADER}a,x,,,abc\n", "wrong-value", "digest"),
        ("id,location\na,x\n".encode("utf-16"), "encoding", "UTF-16"),
        ("id,location\na,M\u00fcller\n".encode("latin-1"), "encoding", "UTF-8"),
        (b"PAR1 and nothing more", "manifest-unreadable", "Parquet"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(tmp_path, content, reason, told):
    found, message = refused(tmp_path, content)
    assert found == reason
    assert told in message
    assert "Muster" not in message


def test_an_absent_manifest_is_named(tmp_path):
    with pytest.raises(ManifestInvalid, match="No such file") as raised:
        manifest_from_file(tmp_path / "none.csv")
    assert raised.value.reason == "manifest-unreadable"


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_what_is_written_is_read(tmp_path, name):
    written = (CohortRow("a", 'x, "y";\u00e4', "1.2", "all", "0" * 64), CohortRow("b", "/d"))
    assert write_manifest(written, tmp_path / name) == 2
    assert manifest_from_file(tmp_path / name).rows == written


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415

    parquet.write_table(pyarrow.table({"id": [1, 2], "location": ["x", "y"]}), tmp_path / "m.parquet")
    with pytest.raises(ManifestInvalid, match="column id: must be text, not int64"):
        manifest_from_file(tmp_path / "m.parquet")


def test_a_parquet_file_whose_text_is_not_utf_8_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415

    texts = pyarrow.array([b"M\xfcller", b"b"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ["a", "b"], "location": texts}), tmp_path / "m.parquet")
    with pytest.raises(ManifestInvalid, match="not UTF-8") as raised:
        manifest_from_file(tmp_path / "m.parquet")
    assert raised.value.reason == "encoding"
    assert "ller" not in str(raised.value)


def test_another_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SettingsInvalid, match="must end in"):
        write_manifest([CohortRow("a", "x")], tmp_path / "m.txt")
    assert not list(tmp_path.iterdir())


def test_parts_hold_every_row_once_whatever_the_other_rows_are(tmp_path):
    path = tmp_path / "m.csv"
    write_manifest((CohortRow(f"r{number}", "x") for number in range(1000)), path)
    shares = [manifest_from_file(path, ManifestPart(number, 7)) for number in range(1, 8)]
    assert sorted(row.id for share in shares for row in share.rows) == sorted(f"r{number}" for number in range(1000))
    assert all(100 < len(share.rows) < 200 and share.total == 1000 for share in shares)
    assert ManifestPart(3, 7).holds("r5") == any(row.id == "r5" for row in shares[2].rows)


def test_the_rows_of_a_part_stay_the_same_in_later_versions():
    assert [number for number in range(20) if ManifestPart(1, 4).holds(f"r{number}")] == [3, 4, 8, 11, 12, 16, 17, 19]


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/4", "a/b", "\u0661/4", "1 /4"])
def test_a_wrong_part_is_refused(text):
    with pytest.raises(SettingsInvalid, match="--part"):
        part_from_text(text)


def test_a_row_is_another_if_it_asks_for_something_else():
    row = CohortRow("a", "x")
    changes = ({"location": "y"}, {"series": "1"}, {"volume": "1"}, {"digest": "0" * 64})
    others = [CohortRow(**{"id": "a", "location": "x", **change}) for change in changes]
    assert len({each.fingerprint for each in (row, *others)}) == 5
    assert CohortRow("a", "x", digest="0" * 64).fingerprint == CohortRow("a", "moved", digest="0" * 64).fingerprint
