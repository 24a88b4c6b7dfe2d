"""A model zoo bundle's layout is read without executing it."""

from __future__ import annotations

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest

from ctflow.bundle import read_bundle
from ctflow.core.steps import Orient, Resample, ScaleRange
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.networks.build import network_from_model
from ctflow.phantom import phantom_from_seed
from e2e.btcv_bundle import CLASSES, labels_by_monai, write_btcv_bundle

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_btcv_bundle(tmp_path_factory.mktemp("zoo") / "swin_unetr_btcv_segmentation", roi=64)


def test_the_layout_is_read_and_img_size_is_dropped_with_a_note(bundle):
    model = read_bundle(bundle)
    spec = model.spec
    assert (spec.name, spec.version) == ("swin_unetr_btcv_segmentation", "0.3.7")
    assert "img_size" not in spec.network.arguments
    assert any("img_size" in note for note in spec.notes)
    assert spec.preprocessing == (
        Orient("RAS"),
        Resample((1.5, 1.5, 2.0)),
        ScaleRange(-175.0, 250.0, 0.0, 1.0, clip=True),
    )
    assert (spec.roi, spec.overlap, spec.blend, spec.batch_size) == ((64, 64, 64), 0.5, "constant", 4)
    assert (spec.activation, spec.threshold) == ("softmax", None)
    assert [segment.label for segment in spec.segments] == list(CLASSES[1:])
    assert [segment.number for segment in spec.segments] == list(range(1, 14))
    assert not any(segment.coded for segment in spec.segments)
    network_from_model(model)


@pytest.mark.exhaustive  # the next one also runs it
def test_monai_runs_the_same_bundle(bundle, tmp_path):
    rng = np.random.default_rng(3)
    image = rng.integers(-200, 300, (24, 20, 16)).astype(np.int16)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "ct.nii.gz")
    labels, found = labels_by_monai(bundle, tmp_path / "ct.nii.gz", tmp_path / "monai")
    assert labels.shape == image.shape
    np.testing.assert_allclose(found, affine, atol=1e-6)
    assert set(np.unique(labels)) <= set(range(14))
    assert len(np.unique(labels)) > 1


def test_ctflow_and_monai_agree_on_a_series(bundle, tmp_path, entry_point):
    """The same phantom as a DICOM series for ctflow and as NIfTI for MONAI: Dice of every class at least 0.999."""
    whole = phantom_from_seed(7, (20, 80, 80)).volume
    part = np.ascontiguousarray(whole.array[:, 24:56, 24:56])  # a quarter of the windows
    volume = Volume(part, Geometry(part.shape, whole.geometry.affine_mm))
    write_ct_series(volume, tmp_path / "ct", seed=7)
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(volume.array.transpose(2, 1, 0), affine), tmp_path / "ct.nii.gz")
    theirs, found = labels_by_monai(bundle, tmp_path / "ct.nii.gz", tmp_path / "monai")
    np.testing.assert_allclose(found, affine, atol=1e-4)
    done = entry_point("run", ["-i", tmp_path / "ct", "-o", tmp_path / "ours", "-m", bundle])
    assert done.returncode == 0, done.stderr
    assert "img_size" in done.stderr + done.stdout
    (path,) = (tmp_path / "ours").glob("*/segmentation.dcm")
    seg = hd.seg.segread(path)
    sources = sorted((pydicom.dcmread(file) for file in (tmp_path / "ct").iterdir()), key=lambda ct: ct.InstanceNumber)
    ours = seg.get_pixels_by_source_instance(
        [ct.SOPInstanceUID for ct in sources], combine_segments=True, assert_missing_frames_are_empty=True
    )
    theirs = theirs.transpose(2, 1, 0)
    assert ours.shape == theirs.shape
    present = [number for number in range(1, 14) if (theirs == number).sum() > 50]
    assert len(present) >= 3, "a random network marks several classes"
    for number in present:
        a, b = ours == number, theirs == number
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.999
