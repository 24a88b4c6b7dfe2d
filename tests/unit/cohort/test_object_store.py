"""An object store that fails, answers slowly, or holds very many objects."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from dataclasses import replace

import pytest

from cohort_support import run_marking, write_cohort
from ctflow.cohort.destinations.from_text import destination_from_text, text_of_destination
from ctflow.cohort.destinations.objects import ObjectDestination
from ctflow.cohort.outcome import RowOutcome
from ctflow.cohort.stores import objects
from ctflow.cohort.stores.objects import ObjectStore
from ctflow.cohort.stores.patience import StoreFault, TooMuchFault
from ctflow.core.errors import RequirementUnmet, SettingsInvalid, StoreFailed
from object_store_support import BUCKET, ENVIRONMENT, object_store

OUTCOME = RowOutcome("row", "0123456789ab", "done", "done", "", 0, 1, 1.5)
URL = f"s3://{BUCKET}/out"


@pytest.fixture(scope="module")
def server():
    with object_store() as running:
        yield running


def test_a_cohort_whose_store_fails_often_and_is_down_for_a_while_loses_no_row(store, tmp_path):
    manifest = write_cohort(tmp_path / "in", 3)
    draws, down = random.Random(5), []

    def fault(_method: str, path: str) -> int | None:
        if "/rows/" in path and not down:
            down.append(time.monotonic())
        if down and time.monotonic() - down[0] < 2:
            return 503
        return 500 if draws.random() < 0.07 else None

    store.fault = fault
    report = run_marking(manifest, tmp_path, destination=ObjectDestination(URL, "whole"))
    store.fault = lambda _method, _path: None
    assert dict(report.counts) == {"done": 3}
    assert sum(key.endswith("segmentation.dcm") for key in store.keys("out/results/")) == 3
    assert len(store.keys("out/rows/")) == 3
    assert store.keys("out/begun/") == []


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": server.url}.items():
        monkeypatch.setenv(name, value)
    server.empty()
    return server


def commit(destination, row_id="row", files=20):
    folder = destination.workspace(row_id)
    for number in range(files):
        (folder / f"{number}.dcm").write_bytes(bytes([number]) * 1000)
    destination.commit(folder, replace(OUTCOME, id=row_id))


def test_every_fifth_request_fails_and_each_result_is_whole(store):
    count = itertools.count(1)
    store.fault = lambda _method, _path: (500, 503)[next(count) % 2] if next(count) % 5 == 0 else None
    with ObjectDestination(URL, "whole", patience_s=30) as destination:
        destination.agree({"model": "a"})
        for number in range(5):
            commit(destination, f"row-{number}")
        assert sorted(mark.id for mark in destination.marks()) == [f"row-{number}" for number in range(5)]
    store.fault = lambda _method, _path: None
    assert len(store.keys("out/results/")) == 100
    assert store.content("out/results/row-3/7.dcm") == b"\7" * 1000


def test_slow_answers_are_cut_off_and_asked_for_again(store, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "_SMALL_S", 0.5)
    store.client.put_object(Bucket=BUCKET, Key="in/a", Body=b"x" * 1000)
    slow = iter([1.5, 1.5])
    store.fault = lambda method, path: next(slow, None) if (method, path) == ("GET", f"/{BUCKET}/in/a") else None
    ObjectStore(f"s3://{BUCKET}/in", 30).download({"a": (tmp_path / "a", 1000)})
    assert (tmp_path / "a").read_bytes() == b"x" * 1000
    assert sum(path.endswith("/in/a") and method == "GET" for method, path in store.requests) == 3


def test_a_store_that_stays_down_ends_in_a_named_error_and_the_row_stays_open(store):
    with ObjectDestination(URL, "whole", patience_s=1) as destination:
        store.fault = lambda _method, _path: 503
        started = time.monotonic()
        with pytest.raises(StoreFailed) as raised:
            commit(destination)
        assert (raised.value.reason, raised.value.exit_code) == ("store-down", 5)
        assert 0.3 < time.monotonic() - started < 10
        assert "s3://" not in str(raised.value)
        store.fault = lambda _method, _path: None
        assert list(destination.marks()) == []


def test_a_store_that_comes_back_gets_the_result_that_waited(store):
    with ObjectDestination(URL, "whole", patience_s=60) as destination:
        store.fault = lambda _method, _path: 503
        timer = threading.Timer(2, lambda: setattr(store, "fault", lambda _method, _path: None))
        timer.start()
        commit(destination)
        timer.join()
        assert [mark.id for mark in destination.marks()] == ["row"]


@pytest.mark.parametrize("fault", [503, 20.0], ids=["down", "hanging"])
def test_a_run_that_ends_does_not_wait_for_a_store(store, monkeypatch, fault):
    monkeypatch.setattr("ctflow.cohort.stores.patience._LAST_S", 0.2)
    with ObjectDestination(URL, "whole") as destination:
        store.fault = lambda _method, _path: fault
        timer = threading.Timer(1, destination.hurry)
        timer.start()
        started = time.monotonic()
        with pytest.raises(StoreFailed):
            list(destination.marks())
        assert time.monotonic() - started < 8


def test_what_another_try_would_not_change_is_told_at_once(store, monkeypatch):
    for url, reason in ((URL.replace(BUCKET, "absent-bucket"), "store-absent"), (URL, "store-denied")):
        if reason == "store-denied":
            store.fault = lambda _method, _path: 403
        with ObjectDestination(url, "whole") as destination, pytest.raises(StoreFailed) as raised:
            list(destination.marks())
        assert raised.value.reason == reason


def test_a_public_archive_needs_no_credentials(store, monkeypatch):
    store.client.put_object(Bucket=BUCKET, Key="in/a", Body=b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    objects.file_system.cache_clear()
    monkeypatch.setattr(objects, "file_system", functools.cache(objects.file_system.__wrapped__))
    assert ObjectStore(f"s3://{BUCKET}/in", 5).sizes() == {"a": 1}


def test_names_come_in_pages_of_which_each_may_fail(store, monkeypatch):
    for number in range(60):
        store.client.put_object(Bucket=BUCKET, Key=f"in/{number}", Body=b"x" * number)
    own = ObjectStore(f"s3://{BUCKET}/in", 30)
    call = own._files._call_s3
    monkeypatch.setattr(own._files, "_call_s3", lambda *names, **query: call(*names, **query, MaxKeys=5))
    draws = random.Random(3)
    store.fault = lambda _method, _path: 503 if draws.random() < 0.3 else None
    store.requests.clear()
    assert own.sizes() == {str(number): number for number in range(60)}
    assert 12 < len(store.requests) < 30
    store.fault = lambda _method, _path: None
    store.requests.clear()
    with pytest.raises(TooMuchFault):
        own.sizes(most=12)
    assert len(store.requests) == 3


def test_what_another_process_writes_is_listed_at_once(store):
    own = ObjectStore(URL, 5)
    assert own.sizes("rows") == {}
    store.client.put_object(Bucket=BUCKET, Key="out/rows/a", Body=b"xy")
    assert own.sizes("rows") == {"a": 2}
    store.client.delete_object(Bucket=BUCKET, Key="out/rows/a")
    assert own.sizes("rows") == {}


def test_of_two_writers_of_an_object_one_wins(store):
    first, second = ObjectStore(URL, 5), ObjectStore(URL, 5)
    first.create("a", b"first")
    second.create("a", b"second")
    assert first.read("a") == second.read("a") == b"first"
    with pytest.raises(StoreFault, match="FileNotFoundError"):
        first.read("b")


@pytest.mark.parametrize(
    "text", ["ftp://host/x", "s3://", "s3://key:secret@bucket/x", "file://host/x", "http://127.0.0.1/"]
)
def test_another_url_is_refused(text):
    with pytest.raises(SettingsInvalid) as raised:
        destination_from_text(text, "whole")
    assert raised.value.reason == "invalid-value"
    assert "secret" not in str(raised.value)


def test_a_server_and_no_other_destination_has_a_journal():
    for output, journal in (("dicomweb+https://host/dicom-web", None), ("/out", "/journal"), (URL, "/journal")):
        with pytest.raises(SettingsInvalid) as raised:
            text_of_destination(output, journal)
        assert raised.value.reason == "conflict"
    assert text_of_destination("/out", None) == "/out"


def test_google_storage_needs_a_package_that_is_named():
    with pytest.raises(RequirementUnmet, match="pip install gcsfs"):
        destination_from_text("gs://bucket/x", "whole")
