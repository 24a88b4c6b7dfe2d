"""The real CTs for training: found by their content, with a licence that allows it, and never also held out."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume

SCRIPT = Path(__file__).parents[3] / "training" / "backgrounds.py"
_SPEC = importlib.util.spec_from_file_location("training_backgrounds", SCRIPT)
assert _SPEC is not None
assert _SPEC.loader is not None
backgrounds = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = backgrounds  # dataclasses look their module up
_SPEC.loader.exec_module(backgrounds)


def entry_of(volume: Volume, **changes) -> dict:
    entry = {
        "name": "chest",
        "patient": "P1",
        "collection": "Collection",
        "licence": "CC BY 4.0",
        "doi": "10.1234/5",
        "use": "train",
        "repository": "owner/data",
        "commit": "abc",
        "path": "series",
        "series_uid": "",
        "digest": backgrounds.digest_of_volume(volume),
        "lesions": [{"what": "nodule", "lps_mm": [[0, 1, 2], [3, 4, 5]]}],
    }
    return {**entry, **changes}


def catalogue_of(folder: Path, *entries: dict) -> Path:
    path = folder / "catalogue.json"
    path.write_text(json.dumps({"backgrounds": entries}))
    return path


def write_nifti_ct(volume: Volume, path: Path) -> None:
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(volume.array.transpose(2, 1, 0), to_ras), path)


@pytest.fixture
def volume() -> Volume:
    return small_volume()


@pytest.fixture
def series(tmp_path, volume) -> dict:
    """The volume as a DICOM series in tmp_path/chest, and its entry."""
    paths = write_ct_series(volume, tmp_path / "chest")
    return entry_of(volume, series_uid=str(pydicom.dcmread(paths[0]).SeriesInstanceUID))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, str(SCRIPT), *map(str, words))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_series_is_recognised_whatever_its_files_are_called_and_what_lies_beside_them(tmp_path, volume, series):
    for number, path in enumerate(sorted((tmp_path / "chest").iterdir())):
        path.rename(path.with_name(f"{1000 - number}.ima"))
    write_ct_series(small_volume(seed=1), tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "other", tmp_path / "chest" / "other")
    read = backgrounds.read_catalogue(catalogue_of(tmp_path, series))
    ((background, found),) = backgrounds.load_backgrounds(tmp_path, "train", read)
    assert background.lesions == (backgrounds.Lesion("nodule", ((0, 1, 2), (3, 4, 5))),)
    np.testing.assert_array_equal(found.array, volume.array)
    np.testing.assert_allclose(found.geometry.affine_mm, volume.geometry.affine_mm, atol=1e-6)


def test_a_nifti_file_has_the_digest_of_the_same_dicom_series(tmp_path, volume):
    write_nifti_ct(volume, tmp_path / "chest.nii.gz")
    read = backgrounds.read_catalogue(catalogue_of(tmp_path, entry_of(volume, use="held-out")))
    ((_, found),) = backgrounds.load_backgrounds(tmp_path, "held-out", read)
    np.testing.assert_array_equal(found.array, volume.array)
    assert list(backgrounds.load_backgrounds(tmp_path, "train", read)) == []


@pytest.mark.parametrize("change", ["one voxel", "the position"])
def test_a_digest_tells_any_change_of_voxels_or_geometry(volume, change):
    array, affine = volume.array.copy(), volume.geometry.affine_mm.copy()
    if change == "one voxel":
        array[0, 0, 0] += 1
    else:
        affine[0, 3] += 0.01
    changed = Volume(array, Geometry(volume.geometry.shape, affine))
    assert backgrounds.digest_of_volume(changed) != backgrounds.digest_of_volume(volume)


def test_a_digest_does_not_depend_on_the_type_of_the_voxels(volume):
    as_float = Volume(volume.array.astype(np.float32), volume.geometry)
    assert backgrounds.digest_of_volume(as_float) == backgrounds.digest_of_volume(volume)


def test_the_script_is_content_when_all_are_there(tmp_path, series):
    done = run(tmp_path, "--catalogue", catalogue_of(tmp_path, series))
    assert done.returncode == 0, done.stderr
    assert "chest (train): there and unchanged" in done.stdout


def test_the_script_says_where_a_missing_ct_is_to_be_had_and_under_which_licence(tmp_path, volume):
    entry = entry_of(volume, series_uid="1.2.3")
    done = run(tmp_path / "empty", "--catalogue", catalogue_of(tmp_path, entry))
    assert done.returncode == 1
    for word in ("missing", "'series'", "github.com/owner/data/tree/abc", "10.1234/5", "CC BY 4.0", "empty/chest"):
        assert word in done.stdout


def test_the_script_tells_a_ct_that_differs(tmp_path, series):
    done = run(tmp_path, "--catalogue", catalogue_of(tmp_path, {**series, "digest": "0" * 64}))
    assert done.returncode == 1
    assert "differs" in done.stdout
    assert "replace" in done.stdout


@pytest.mark.parametrize("content", [b"not NIfTI", b""])
def test_an_unreadable_ct_is_reported_and_not_raised(tmp_path, volume, content):
    (tmp_path / "chest.nii.gz").write_bytes(content)
    (background,) = backgrounds.read_catalogue(catalogue_of(tmp_path, entry_of(volume)))
    with pytest.raises(ValueError, match="unreadable"):
        backgrounds.checked_background(background, tmp_path)


def test_a_series_that_is_not_in_its_folder_is_unreadable(tmp_path, series):
    (background,) = backgrounds.read_catalogue(catalogue_of(tmp_path, series))
    with pytest.raises(ValueError, match="unreadable"):
        backgrounds.checked_background(replace(background, series_uid="1.2.3"), tmp_path)


def test_loading_stops_at_a_ct_that_differs(tmp_path, series):
    read = backgrounds.read_catalogue(catalogue_of(tmp_path, {**series, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="chest: differs"):
        list(backgrounds.load_backgrounds(tmp_path, "train", read))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "CC BY-NC 4.0"}, "licence"),
        ({"licence": ""}, "licence"),
        ({"use": "test"}, "use"),
        ({"patient": "LIDC-IDRI-0314"}, "evaluation alone"),
        ({"patient": "lidc-idri-0314"}, "evaluation alone"),
    ],
)
def test_what_training_must_not_see_is_refused(tmp_path, volume, change, message):
    path = catalogue_of(tmp_path, entry_of(volume, **change))
    with pytest.raises(ValueError, match=message):
        backgrounds.read_catalogue(path)
    done = run(tmp_path, "--catalogue", path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_patient_is_either_trained_on_or_held_out(tmp_path, volume):
    path = catalogue_of(tmp_path, entry_of(volume), entry_of(volume, name="second", use="held-out"))
    with pytest.raises(ValueError, match="P1 is both trained on and held out"):
        backgrounds.read_catalogue(path)


def test_a_name_stands_for_one_ct(tmp_path, volume):
    with pytest.raises(ValueError, match="chest occurs twice"):
        backgrounds.read_catalogue(catalogue_of(tmp_path, entry_of(volume), entry_of(volume)))


def test_the_catalogue_in_the_repository_is_in_order():
    read = backgrounds.read_catalogue()
    assert {background.use for background in read} == set(backgrounds.USES)
    patients = {background.patient for background in read}
    said = (Path(backgrounds.__file__).parents[1] / "docs" / "model.md").read_text()
    assert f"{len(read)} real CTs of {len(patients)} patients" in said
    for background in read:
        assert len(background.digest) == 64
        assert background.doi or background.licence == "Apache-2.0"
        for lesion in background.lesions:
            assert all(near < far for near, far in zip(*lesion.lps_mm, strict=True))
