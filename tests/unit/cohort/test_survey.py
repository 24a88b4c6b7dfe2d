"""The manifest of a folder tree: a row a CT series, whatever else lies there."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from pydicom import dcmread

from ctflow.cohort.manifest.digest import digest_of_series
from ctflow.cohort.manifest.rows import manifest_from_file, write_manifest
from ctflow.cohort.manifest.tree import rows_from_survey, survey_tree
from ctflow.core.errors import ManifestInvalid, NoUsableSeries
from ctflow.dicom.read import scan
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume


@pytest.fixture
def tree(tmp_path):
    """Two series in folders, two in one folder, and other files."""
    for seed, folder in enumerate(["a/1", "a/2"]):
        write_ct_series(small_volume(seed=seed), tmp_path / "t" / folder, seed=seed)
    for seed in (2, 3):
        write_ct_series(small_volume(seed=seed), tmp_path / "made", seed=seed)
        for path in (tmp_path / "made").iterdir():
            (tmp_path / "t" / "flat").mkdir(exist_ok=True)
            path.rename(tmp_path / "t" / "flat" / f"{seed}-{path.name}")
    (tmp_path / "t" / "notes.txt").write_text("no DICOM")
    (tmp_path / "t" / "flat" / "empty.dcm").touch()
    other = dcmread(next((tmp_path / "t" / "a" / "1").iterdir()))
    other.Modality = "MR"
    other.SeriesInstanceUID = "1.2.3"
    other.save_as(tmp_path / "t" / "a" / "1" / "mr.dcm")
    return tmp_path / "t"


def test_every_ct_series_has_a_row_and_other_files_are_counted(tree):
    found = survey_tree(tree)
    rows = list(rows_from_survey(found))
    assert [row.location for row in rows] == [str(tree / each) for each in ("a/1", "a/2", "flat", "flat")]
    assert len({row.id for row in rows}) == len({row.series for row in rows}) == 4
    assert all(row.id.startswith(row.series) for row in rows)
    assert (found.others, found.unreadable, found.ignored, found.spread) == (1, 1, 1, 0)


def test_rows_are_a_manifest_that_is_read(tree, tmp_path):
    rows = tuple(rows_from_survey(survey_tree(tree, digests=True), tmp_path))
    write_manifest(rows, tmp_path / "m.csv")
    assert manifest_from_file(tmp_path / "m.csv").rows == rows
    assert rows[0].location == "t/a/1"


def test_the_digest_is_what_a_shell_computes(tree):
    row = next(rows_from_survey(survey_tree(tree / "a" / "2", digests=True)))
    command = "sha256sum * | cut -c-64 | sort | sha256sum"
    told = subprocess.run(["sh", "-c", command], cwd=row.location, check=True, capture_output=True, text=True).stdout
    assert row.digest == told.split()[0]
    assert row.digest == digest_of_series(scan_folder(tree / "a" / "2").instances)


def test_a_series_in_two_folders_has_one_row_for_the_folder_above(tree):
    first = next(row for row in rows_from_survey(survey_tree(tree, digests=True)) if row.location.endswith("a/1"))
    (tree / "b").mkdir()
    for path in sorted((tree / "a" / "1").glob("*.dcm"))[:3]:
        shutil.move(path, tree / "b" / path.name)
    found = survey_tree(tree, digests=True)
    row = next(each for each in rows_from_survey(found) if each.series == first.series)
    assert (row.location, row.digest, row.id) == (str(tree), first.digest, first.id)
    assert (found.spread, len(found.series)) == (1, 4)


def test_headers_of_one_folder_are_in_memory_and_only_what_tells_series_apart(tree, monkeypatch):
    sizes, original = [], scan._scanned

    def looked(*arguments):
        found = original(*arguments)
        sizes.append((found.folder, max((len(each.header) for each in found.instances), default=0)))
        return found

    monkeypatch.setattr(scan, "_scanned", looked)
    survey_tree(tree)
    assert len(sizes) == 4
    assert {size for _, size in sizes} <= {0, 3}


def test_a_uid_that_is_none_stays_out_of_the_manifest(tree):
    for path in (tree / "a" / "2").iterdir():
        image = dcmread(path)
        image.SeriesInstanceUID = "Muster^Max"
        image.save_as(path)
    row = next(row for row in rows_from_survey(survey_tree(tree / "a" / "2")))
    assert row.series == ""
    assert "Muster" not in row.id


def test_a_folder_whose_name_is_no_text_is_refused(tree):
    (tree / "a" / "1").rename(tree / "a" / "x\ny")
    with pytest.raises(ManifestInvalid, match="rename it"):
        list(rows_from_survey(survey_tree(tree)))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(NoUsableSeries) as raised:
        survey_tree(tmp_path / "none")
    assert raised.value.reason == "not-a-folder"


def test_a_tree_without_series_has_no_rows(tmp_path):
    assert list(rows_from_survey(survey_tree(tmp_path))) == []
