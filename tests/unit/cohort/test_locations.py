"""Locations of a manifest: which ones there are, and how their files come to this machine and go again."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from cohort_support import run_marking, write_cohort
from ctflow.cohort.locations import fetch
from ctflow.cohort.locations.fetch import fetch_series
from ctflow.cohort.locations.location import fault_of_location, folder_of_location
from ctflow.cohort.manifest.rows import CohortRow, manifest_from_file, write_manifest
from ctflow.core.errors import NotFetched, TemporaryFolderFailed
from object_store_support import BUCKET, ENVIRONMENT, object_store

SERIES = "dicomweb+https://host:8042/dicom-web/studies/1.2/series/1.3"


@pytest.fixture(scope="module")
def server():
    with object_store() as running:
        yield running


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    fetch._opened_scratch.cache_clear()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": server.url}.items():
        monkeypatch.setenv(name, value)
    server.empty()
    yield server
    fetch._opened_scratch().__exit__()
    fetch._opened_scratch.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["/data/x", "x y/ä", "file:///data/x", "s3://bucket/a", "s3://bucket/a/*", "gs://bucket/a/b/", SERIES],
)
def test_a_location_that_may_be_given(text):
    assert fault_of_location(text) == ""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (" ", "is empty"),
        ("a\nb", "line break"),
        ("C:\\data", "path of Windows"),
        ("ftp://host/x", "URL of another kind"),
        ("https://host/studies/1/series/2", "URL of another kind"),
        ("file://host/x", "must be file:///FOLDER"),
        ("s3://bucket", "must be s3://BUCKET/PREFIX"),
        ("s3://bucket/*", "must be s3://BUCKET/PREFIX"),
        ("gs://", "must be gs://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/a", "contains credentials"),
        ("s3://bucket/a?X-Amz-Signature=secret", "contains credentials"),
        ("dicomweb+https://user:secret@host/studies/1/series/2", "contains credentials"),
        ("dicomweb+https://host/studies/1", "must be dicomweb+https://SERVER"),
        ("dicomweb+https://host/studies/1/series/2?x=1", "must be dicomweb+https://SERVER"),
        ("dicomweb+https://host/studies/1/series/../2", "must be dicomweb+https://SERVER"),
    ],
)
def test_a_location_that_is_none(text, fault):
    assert fault in fault_of_location(text)
    assert "secret" not in fault_of_location(text)


def test_folders_are_read_where_they_are(tmp_path):
    assert folder_of_location("../x", tmp_path) == tmp_path / "../x"
    assert folder_of_location("file:///data/a%20b", tmp_path) == Path("/data/a b")
    assert folder_of_location("s3://bucket/a", tmp_path) is None


def test_files_of_a_prefix_come_with_safe_names(store):
    names = ["a.dcm", "b/a.dcm", "../../etc/passwd", "A.DCM", "x" * 900, "ä ö\\n", "deep/b/c"]
    for name in names:
        store.client.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=name.encode())
    store.client.put_object(Bucket=BUCKET, Key="in2/other", Body=b"of another prefix")
    for url in (f"s3://{BUCKET}/in", f"s3://{BUCKET}/in/*"):
        folder = fetch_series(url, "row a")
        assert sorted(path.read_text() for path in folder.iterdir()) == sorted(names)
        assert all(path.is_file() and len(path.name) < 100 for path in folder.iterdir())


def test_what_cannot_be_fetched_is_named(store, monkeypatch):
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.5)

    def reason(url: str) -> str:
        with pytest.raises(NotFetched) as raised:
            fetch_series(url, "row a")
        assert "s3://" not in str(raised.value)
        assert not list(fetch._scratch().path.iterdir())
        return raised.value.reason

    store.client.put_object(Bucket=BUCKET, Key="in/a", Body=b"12345")
    assert reason(f"s3://{BUCKET}/none") == "location-absent"
    assert reason("s3://no-such-bucket/in") == "location-absent"
    store.fault = lambda method, path: 403
    assert reason(f"s3://{BUCKET}/in") == "location-denied"
    store.fault = lambda method, path: 503 if path.endswith("/in/a") else None
    assert reason(f"s3://{BUCKET}/in") == "location-down"
    store.fault = lambda method, path: None
    for limit, most in (("_MOST_BYTES", 4), ("_MOST_FILES", 0)):
        with monkeypatch.context() as patched:
            patched.setattr(fetch, limit, most)
            assert reason(f"s3://{BUCKET}/in") == "location-too-large"


def with_free(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _folder: usage)


@pytest.mark.parametrize(
    ("free", "number", "reason"),
    [
        ((1 << 30) - 1, None, "temporary-full"),
        ((1 << 30) + 4, None, "temporary-too-small"),
        (1 << 31, errno.ENOSPC, "temporary-too-small"),
        (1 << 31, errno.EROFS, "temporary-unwritable"),
    ],
)
def test_a_disk_without_room_is_a_fault_of_this_machine(store, monkeypatch, free, number, reason):
    def download(*_):
        raise OSError(number, "no")

    store.client.put_object(Bucket=BUCKET, Key="in/a", Body=b"12345")
    with_free(monkeypatch, free)
    if number is not None:
        monkeypatch.setattr(fetch.ObjectStore, "download", download)
    with pytest.raises(TemporaryFolderFailed) as raised:
        fetch_series(f"s3://{BUCKET}/in", "row a")
    assert raised.value.reason == reason
    assert not list(fetch._scratch().path.iterdir())


def test_rows_in_an_object_store_have_the_results_of_local_ones(store, tmp_path, monkeypatch):
    with_free(monkeypatch, (1 << 30) + (1 << 20))
    local = write_cohort(tmp_path / "in", 3)
    rows = []
    for row in manifest_from_file(local).rows:
        for path in (tmp_path / "in" / row.location).iterdir():
            store.client.upload_file(str(path), BUCKET, f"in/{row.location}/{path.name}")
        rows.append(CohortRow(row.id, f"s3://{BUCKET}/in/{row.location}/*"))
    rows.append(CohortRow("none", f"s3://{BUCKET}/in/none"))
    store.client.put_object(Bucket=BUCKET, Key="in/large/a", Body=bytes(2 << 20))
    rows.append(CohortRow("large", f"s3://{BUCKET}/in/large"))
    write_manifest(rows, tmp_path / "remote.csv")
    assert run_marking(local, tmp_path / "expected").exit_code == 0
    report = run_marking(tmp_path / "remote.csv", tmp_path / "out")
    assert dict(report.counts) == {"done": 3, "failed": 2}

    def marks(output):
        found = [json.loads(path.read_text()) for path in (output / "rows").glob("*.json")]
        return {mark["id"]: (mark["digest"], mark["reason"], mark["attempt"]) for mark in found}

    failed = {"none": ("", "location-absent", 3), "large": ("", "temporary-too-small", 3)}
    assert marks(tmp_path / "out") == {**marks(tmp_path / "expected"), **failed}
    assert not list(fetch._scratch().path.iterdir()), "what was fetched is removed"
