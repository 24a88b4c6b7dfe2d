"""The page is made anew during a run, and with the tables at its end."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cohort_rows import DONE, FAILED, REJECTED, many, write_markers
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.manifest.rows import Manifest, ManifestPart
from ctflow.cohort.report import keep, make
from ctflow.cohort.report.keep import PageKeeper, kept_report
from ctflow.core.errors import BackendUnavailable, NotWritten

WHOLE = ManifestPart()


def manifest_of(total: int) -> Manifest:
    return Manifest(Path(), (), total)


def page_of(folder: Path) -> str:
    return (folder / "cohort.html").read_text()


def test_a_page_is_made_while_rows_are_committed(tmp_path):
    destination = FolderDestination(write_markers(tmp_path, [DONE]), "whole")
    with PageKeeper(destination, 0.01) as keeper:
        time.sleep(0.1)
        assert not (tmp_path / "cohort.html").exists()  # nothing was committed in this run
        keeper.committed(DONE)
        end = time.monotonic() + 10
        while not (tmp_path / "cohort.html").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert "<strong>1</strong>" in page_of(tmp_path)


def test_only_markers_that_are_new_are_read(tmp_path, monkeypatch):
    destination, read = FolderDestination(write_markers(tmp_path, many(50)), "whole"), []
    original = make.outcome_of_mark
    monkeypatch.setattr(make, "outcome_of_mark", lambda place, name: read.append(name) or original(place, name))
    keeper = PageKeeper(destination)
    keeper.make_page()
    assert len(read) == 50
    write_markers(tmp_path, [DONE, REJECTED])
    keeper.make_page()
    assert len(read) == 52
    assert "<strong>52</strong>" in page_of(tmp_path)
    (tmp_path / "rows" / str(REJECTED.name)).unlink()  # computed again
    write_markers(tmp_path, [replace(DONE, id=REJECTED.id)])
    keeper.make_page()
    assert len(read) == 52 + 52
    assert page_of(tmp_path) == make.page_of(destination, keeper._summary, ())


def test_the_end_of_a_run_makes_the_tables_too(tmp_path):
    destination = FolderDestination(write_markers(tmp_path, many(3)), "whole")
    with kept_report(destination, manifest_of(3), WHOLE) as keeper:
        pass
    assert keeper.files == ("cohort.parquet", "findings.parquet", "cohort.html")
    assert all((tmp_path / name).is_file() for name in keeper.files)


@pytest.mark.parametrize(("part", "total", "is_made"), [(1, 9, True), (2, 9, False), (2, 3, True)])
def test_of_many_shares_the_first_and_the_last_make_it(tmp_path, part, total, is_made):
    destination = FolderDestination(write_markers(tmp_path, many(3)), "share")
    with kept_report(destination, manifest_of(total), ManifestPart(part, 4)):
        pass
    assert (tmp_path / "cohort.html").is_file() is is_made


def test_an_error_ends_a_run_with_its_report_and_an_interruption_without(tmp_path):
    destination = FolderDestination(write_markers(tmp_path, [FAILED]), "whole")
    with pytest.raises(KeyboardInterrupt), kept_report(destination, manifest_of(1), WHOLE):
        raise KeyboardInterrupt
    assert not (tmp_path / "cohort.html").exists()
    with pytest.raises(BackendUnavailable), kept_report(destination, manifest_of(1), WHOLE):
        raise BackendUnavailable("gone", reason="worker-ended")
    assert (tmp_path / "cohort.html").exists()


def test_an_early_end_does_not_wait_for_a_store(tmp_path, monkeypatch):
    destination, hurried = FolderDestination(write_markers(tmp_path, [DONE]), "whole"), threading.Event()
    monkeypatch.setattr(destination, "hurry", hurried.set)
    writing = threading.Event()

    def keep_until_hurried(file, name):
        writing.set()
        assert hurried.wait(30)

    monkeypatch.setattr(destination, "keep", keep_until_hurried)
    with pytest.raises(KeyboardInterrupt), PageKeeper(destination, 0.01) as keeper:
        keeper.committed(DONE)
        assert writing.wait(30)
        raise KeyboardInterrupt
    assert hurried.is_set()


def test_a_report_that_cannot_be_made_is_told_and_fails_no_run(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise NotWritten("no", reason="unwritable")

    monkeypatch.setattr(keep, "make_report", refuse)
    destination = FolderDestination(write_markers(tmp_path, [DONE]), "whole")
    with kept_report(destination, manifest_of(1), WHOLE) as keeper:
        pass
    assert keeper.files == ()
    assert "`ctflow cohort report` makes them" in caplog.text
