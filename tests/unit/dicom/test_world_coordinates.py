"""Every voxel lies where DICOM and SimpleITK say it lies."""

from __future__ import annotations

import itertools

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctflow.core.volume import Volume
from dicom_support import DEPTH, assembled, axes, rotation, selection_of, small_volume


def read_by_simpleitk(folder) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    (uid,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), uid))
    return reader.Execute()


def assert_same_places(volume: Volume, image: sitk.Image, samples: int = 300) -> None:
    rng = np.random.default_rng(0)
    shape = volume.geometry.shape
    assert image.GetNumberOfPixels() == volume.array.size
    corners = list(itertools.product(*((0, n - 1) for n in shape)))
    for index in [*corners, *(tuple(int(rng.integers(n)) for n in shape) for _ in range(samples))]:
        point = volume.geometry.world_from_index(index)
        theirs = image.TransformPhysicalPointToIndex(point.tolist())
        assert np.allclose(image.TransformIndexToPhysicalPoint(theirs), point, atol=2e-3)
        if volume.padding is None or not volume.padding[index]:
            assert image[theirs] == pytest.approx(float(volume.array[index]), abs=1e-4)


def test_lidc_agrees_with_simpleitk(data):
    result = assembled(data / "lidc-idri-0314")
    assert result.volume.array.dtype == np.int16
    assert_same_places(result.volume, read_by_simpleitk(data / "lidc-idri-0314"))


def test_the_lidc_nodule_is_soft_tissue_in_lung(data):
    nibabel = pytest.importorskip("nibabel")
    nodule = nibabel.load(data / "lidc-idri-0314.nodule.nii.gz")
    marked = np.argwhere(np.asarray(nodule.dataobj) > 0)
    ras = marked @ nodule.affine[:3, :3].T + nodule.affine[:3, 3]
    volume = assembled(data / "lidc-idri-0314").volume
    inverse = np.linalg.inv(volume.geometry.affine_mm)
    index = np.rint((ras * [-1, -1, 1]) @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    assert np.median(volume.array[tuple(index.T)]) > -200


ORIENTATIONS = [
    axes(order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("affine", ORIENTATIONS)
def test_all_48_orientations_are_read_back(write, affine):
    """A left-handed grid comes back with its slices in the other order: the same voxels at the same places."""
    volume = small_volume(affine)
    result = assembled(write(volume)).volume
    if np.linalg.det(affine[:3, [2, 1, 0]]) > 0:  # w, h, d right-handed: the normal points along d
        assert np.array_equal(result.array, volume.array)
    else:
        assert np.array_equal(result.array, volume.array[::-1])
    back = np.linalg.inv(volume.geometry.affine_mm)
    for index in np.random.default_rng(0).integers(0, volume.array.shape, (20, 3)):
        point = result.geometry.world_from_index(index)
        original = np.rint(back[:3, :3] @ point + back[:3, 3]).astype(int)
        assert result.array[tuple(index)] == volume.array[tuple(original)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-1.5, 1.5)] * 3),
    spacing=st.tuples(st.floats(0.5, 5.0), st.floats(0.3, 1.5), st.floats(0.3, 1.5)),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
)
def test_oblique_series_agree_with_simpleitk(write, angles, spacing, origin):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) @ axes((2, 1, 0), (1, 1, 1), (1, 1, 1))[:3, :3] * spacing
    affine[:3, 3] = origin
    folder = write(small_volume(affine))
    result = assembled(folder).volume
    assert np.allclose(result.geometry.affine_mm, affine, atol=1e-4)
    assert_same_places(result, read_by_simpleitk(folder), samples=30)


def test_anisotropic_spacing_is_between_rows_then_between_columns(write):
    folder = write()
    assert [float(mm) for mm in pydicom.dcmread(next(folder.iterdir())).PixelSpacing] == [0.6, 0.9]
    result = assembled(folder).volume
    assert result.geometry.spacing_mm == pytest.approx((2.5, 0.6, 0.9))
    assert_same_places(result, read_by_simpleitk(folder))


def test_shuffled_file_names_give_the_same_volume(write, volume):
    folder = write()
    order = np.random.default_rng(3).permutation(DEPTH)
    for source, target in enumerate(order):
        (folder / f"{source:05d}.dcm").rename(folder / f"x{target:05d}.dcm")
    result = assembled(folder).volume
    assert np.array_equal(result.array, volume.array)
    assert np.allclose(result.geometry.affine_mm, volume.geometry.affine_mm, atol=1e-5)


def test_instance_numbers_do_not_decide_the_order(write, volume):
    folder = write(adjust=lambda dataset, index: setattr(dataset, "InstanceNumber", str(100 - index)))
    assert np.array_equal(assembled(folder).volume.array, volume.array)


def test_feet_first_lies_where_it_lies(write):
    volume = small_volume(axes((2, 1, 0), (1, 1, -1)))
    folder = write(volume)
    assert_same_places(assembled(folder).volume, read_by_simpleitk(folder))
    (candidate,) = selection_of(folder).selected
    assert candidate.selected
