from __future__ import annotations

import numpy as np
import pydicom
import pytest

from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.phantom import phantom_from_seed
from dicom_support import assembled, small_volume
from tests_support import dciodvfy_errors


def test_the_series_conforms(tmp_path):
    paths = write_ct_series(phantom_from_seed(1, (16, 48, 48)).volume, tmp_path / "ct")
    assert dciodvfy_errors(paths[0]) == []
    assert dciodvfy_errors(paths[-1]) == []


def test_the_same_volume_and_seed_give_the_same_files(tmp_path, volume):
    first = write_ct_series(volume, tmp_path / "a", seed=1)
    again = write_ct_series(volume, tmp_path / "b", seed=1)
    other = write_ct_series(volume, tmp_path / "c", seed=2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert pydicom.dcmread(first[0]).SeriesInstanceUID != pydicom.dcmread(other[0]).SeriesInstanceUID


def test_every_uid_is_valid_and_every_instance_has_its_own(write):
    datasets = [pydicom.dcmread(path) for path in write().iterdir()]
    assert len({dataset.SOPInstanceUID for dataset in datasets}) == len(datasets)
    assert all(dataset.SOPInstanceUID.is_valid for dataset in datasets)
    assert len({dataset.SeriesInstanceUID for dataset in datasets}) == 1


def test_a_fractional_slope_writes_the_nearest_values(write):
    volume = small_volume()
    result = assembled(write(volume, slope=0.25, intercept=-1100.5)).volume
    assert np.abs(result.array - volume.array).max() <= 0.125


def test_a_value_that_does_not_fit_is_a_programming_mistake(tmp_path, volume):
    with pytest.raises(ValueError, match="16 bits"):
        write_ct_series(volume, tmp_path / "ct", intercept=0)


def test_a_sheared_grid_is_not_written(tmp_path, volume):
    sheared = np.array(volume.geometry.affine_mm)
    sheared[1, 0] = 0.5
    with pytest.raises(ValueError, match="orthogonal"):
        write_ct_series(Volume(volume.array, Geometry(volume.geometry.shape, sheared)), tmp_path / "ct")


def test_feet_first_is_declared(write):
    affine = np.array([[0, 0, 1, 0], [0, -1, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 1.0]])
    assert pydicom.dcmread(next(write(small_volume(affine)).iterdir())).PatientPosition == "FFS"
