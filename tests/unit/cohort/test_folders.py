"""A folder of many series is read once, and each row still gets its own."""

from __future__ import annotations

import json

import pytest
from pydicom import dcmread

from cohort_support import run_marking
from ctflow.cohort.locations import folders
from ctflow.cohort.locations.folders import FolderIndexes
from ctflow.cohort.manifest.rows import write_manifest
from ctflow.cohort.manifest.tree import rows_from_survey, survey_tree
from ctflow.dicom.read import scan
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume

COUNT = 4


@pytest.fixture
def flat(tmp_path):
    """Series of several studies in one folder, and a file that is not DICOM."""
    (tmp_path / "in").mkdir()
    for seed in range(COUNT):
        write_ct_series(small_volume(seed=seed, shape=(8, 32, 32)), tmp_path / "made", seed=seed)
        for path in (tmp_path / "made").iterdir():
            path.rename(tmp_path / "in" / f"{seed}-{path.name}")
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    return tmp_path / "in"


def test_every_row_gets_the_files_of_its_studies_and_the_damaged_ones(flat, monkeypatch):
    (flat / "damaged.dcm").touch()
    rows = list(rows_from_survey(survey_tree(flat)))
    indexes, reads, original = FolderIndexes(), [], scan._read_file
    monkeypatch.setattr(scan, "_read_file", lambda path, name: reads.append(path) or original(path, name))
    assert len(indexes.files(flat, rows[0].series, is_fresh=False)) == 8 * COUNT + 2, "a small folder is read whole"
    assert not reads
    monkeypatch.setattr(folders, "_FEW_FILES", 10)
    for row in rows:
        found = indexes.files(flat, row.series, is_fresh=False)
        assert [path.name for path in found if path.suffix != ".dcm" or path.name == "damaged.dcm"] == [
            "damaged.dcm",
            "notes.txt",
        ]
        of_row = [path for path in found if path.name[0].isdigit()]
        assert len(of_row) == 8
        assert {str(dcmread(path).SeriesInstanceUID) for path in of_row} == {row.series}
    assert len(reads) == 8 * COUNT + 2, "once for all rows"
    assert indexes.files(flat, "1.2.3", is_fresh=False) is None
    indexes.files(flat, rows[0].series, is_fresh=True)
    assert len(reads) == 2 * (8 * COUNT + 2)


def test_indexes_of_the_folders_that_were_used_last_are_kept(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_FEW_FILES", 10)
    monkeypatch.setattr(folders, "_MOST_FILES", 50)
    indexes = FolderIndexes()
    flat.with_name("other").symlink_to(flat)
    for folder in (flat, flat.with_name("other"), flat):
        indexes.files(folder, "1.2.3", is_fresh=False)
    assert list(indexes._indexes) == [flat]


def test_results_are_those_of_folders_that_are_read_whole(flat, tmp_path, monkeypatch):
    write_manifest(rows_from_survey(survey_tree(flat)), tmp_path / "m.csv")

    def digests(output):
        assert run_marking(tmp_path / "m.csv", output).exit_code == 0
        found = [json.loads(path.read_text()) for path in (output / "rows").glob("*.json")]
        return {mark["id"]: mark["digest"] for mark in found}

    whole = digests(tmp_path / "whole")
    monkeypatch.setattr(folders, "_FEW_FILES", 10)
    assert digests(tmp_path / "out") == whole
    assert len(whole) == COUNT
