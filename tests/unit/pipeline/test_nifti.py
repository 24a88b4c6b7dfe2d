from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK as itk

from ctflow.core.errors import NotWritten
from ctflow.core.volume import Geometry
from ctflow.pipeline.nifti import write_nifti
from reasons import raises_reason

SHEARED = np.array([[0, 0.1, 0.9, -10.5], [0.3, 0.6, 0, 20.25], [2.5, 0, -0.2, -300], [0, 0, 0, 1.0]])


def orthogonal() -> np.ndarray:
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * (2.5, 0.6, 0.9)
    affine[:3, 3] = (-10.5, 20.25, -300)
    return affine


def some_labels(dtype=np.uint8) -> np.ndarray:
    labels = np.zeros((6, 5, 4), dtype)
    labels[1:3, 2, 0:2] = 1
    labels[5, 4, 3] = np.iinfo(dtype).max
    return labels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("affine", [SHEARED, orthogonal()], ids=["sheared", "orthogonal"])
def test_nibabel_finds_every_voxel_where_it_lies(tmp_path, affine, dtype):
    labels, geometry = some_labels(dtype), Geometry((6, 5, 4), affine)
    write_nifti(labels, geometry, tmp_path / "mask.nii.gz")
    image = nibabel.load(tmp_path / "mask.nii.gz")
    values = np.asarray(image.dataobj)
    assert values.dtype == dtype
    assert np.array_equal(values.transpose(2, 1, 0), labels)
    index = np.argwhere(values)
    theirs = index @ image.affine[:3, :3].T + image.affine[:3, 3]
    assert np.allclose(theirs * [-1, -1, 1], geometry.world_from_index(index[:, ::-1]), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms() == pytest.approx(geometry.spacing_mm[::-1])


def test_simpleitk_finds_the_same(tmp_path):
    labels, geometry = some_labels(), Geometry((6, 5, 4), orthogonal())
    write_nifti(labels, geometry, tmp_path / "mask.nii.gz")
    image = itk.ReadImage(tmp_path / "mask.nii.gz")
    assert np.array_equal(itk.GetArrayFromImage(image), labels)
    for index in ((0, 0, 0), (5, 4, 3), (1, 2, 0)):
        point = image.TransformIndexToPhysicalPoint(index[::-1])
        assert np.allclose(point, geometry.world_from_index(index), atol=1e-3)


def test_the_same_labels_give_the_same_bytes(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(some_labels(), Geometry((6, 5, 4), SHEARED), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_labels_on_another_grid_are_a_programming_mistake(tmp_path):
    with pytest.raises(ValueError, match="do not lie"):
        write_nifti(some_labels(), Geometry((6, 5, 5), SHEARED), tmp_path / "mask.nii.gz")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="mask.nii.gz"):
        write_nifti(some_labels(), Geometry((6, 5, 4), SHEARED), tmp_path / "absent" / "mask.nii.gz")
