"""Lesions that somebody drew become training cases, from a SEG as from an RT Structure Set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import make_set
import nibabel as nib
import numpy as np
import pytest
from drawn import numbers_on_cubic_grid, read_drawn
from real_chests import SPACING_MM

from ctflow.cli.phantom import write_phantom
from ctflow.core.volume import Geometry
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import write_dataset
from ctflow.dicom.write.structure_set import structure_set_from_labels
from dicom_support import assembled, axes, setter, small_volume
from structure_support import MADE_BY, SPEC

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A phantom twice: with a SEG, and with an RT Structure Set of its tumours and of another region."""
    folder = tmp_path_factory.mktemp("cases")
    write_phantom(folder / "seg", 3, (40, 80, 80))
    shutil.copytree(folder / "seg", folder / "rtstruct")
    headers = [instance.header for instance in assembled(folder / "seg" / "ct").instances]
    labels = read_segmentation(folder / "seg" / "truth.dcm", headers)
    labels[1:3, 2:6, 2:6] = 2
    write_dataset(structure_set_from_labels(labels, headers, SPEC, MADE_BY), folder / "rtstruct" / "truth.dcm")
    return folder


def label_of(path):
    image = nib.load(path / "label.nii")
    return image, np.asarray(image.dataobj)


def test_a_set_of_drawn_lesions_is_the_same_from_either_truth(cases, tmp_path):
    words = [tmp_path / "set", "--drawn", cases, "--truth-roi", "mass", "--insertions", "2", "--processes", "1"]
    command = [sys.executable, ROOT / "training" / "make_set.py", *words]  # it forks, which threads do not survive
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [f"{kind}-00{number}" for kind in ("rtstruct", "seg") for number in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == names
    image, labels = label_of(tmp_path / "set" / "seg-000")
    assert np.array_equal(labels, label_of(tmp_path / "set" / "rtstruct-000")[1])
    marked = (labels >= 1) & (labels <= make_set.MOST_TUMOURS)
    series = assembled(cases / "seg" / "ct")
    truth = read_segmentation(cases / "seg" / "truth.dcm", [instance.header for instance in series.instances]) > 0
    geometry = series.volume.geometry
    assert marked.sum() * SPACING_MM**3 / 1000 == pytest.approx(truth.sum() * geometry.voxel_ml, rel=0.1)
    centre = (image.affine @ [*np.argwhere(marked).mean(axis=0), 1])[:3] * [-1, -1, 1]
    origin = centre - geometry.world_from_index(np.argwhere(truth)).mean(axis=0)
    assert origin == pytest.approx(-geometry.affine_mm[:3, 3], abs=0.5), "cases begin at zero"


def test_lesions_keep_their_numbers_and_touching_ones_stay_apart():
    geometry = Geometry((12, 30, 30), axes((2, 1, 0), (-1, 1, 1), (3.0, 0.75, 0.75)))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[2:9, 5:15, 5:15], labels[2:9, 15:25, 5:15] = 1, 7
    numbers = numbers_on_cubic_grid(labels, geometry, 5)
    assert np.unique(numbers).tolist() == [0, 1, 2], "7 is the second round's 2"
    for number, count in ((1, 700), (2, 700)):
        found = (numbers == number).sum() * SPACING_MM**3
        assert found == pytest.approx(count * geometry.voxel_ml * 1000, rel=0.25)
    assert not numbers_on_cubic_grid(np.zeros_like(labels), geometry, 5).any()
    apart = np.zeros_like(labels)
    apart[2:5, 3:9, 3:9] = apart[8:11, 20:27, 20:27] = 1
    assert np.unique(numbers_on_cubic_grid(apart, geometry, 5)).tolist() == [0, 1, 2]


def test_what_training_must_not_see_or_cannot_read_is_named(cases, tmp_path):
    with pytest.raises(ValueError, match="rtstruct: truth.dcm: has 2 regions"):
        read_drawn(cases, [], 5)
    with pytest.raises(ValueError, match="case"):
        read_drawn(tmp_path, [], 5)
    write_ct_series(small_volume(), tmp_path / "ct", adjust=setter(PatientID="lidc-idri-0314"))
    with pytest.raises(ValueError, match=r"truth\.dcm"):
        read_drawn(tmp_path, [], 5)
    headers = [instance.header for instance in assembled(tmp_path / "ct").instances]
    empty = np.zeros((16, 12, 10), np.uint8)
    write_dataset(structure_set_from_labels(empty, headers, SPEC, MADE_BY), tmp_path / "truth.dcm")
    with pytest.raises(ValueError, match="for evaluation alone"):
        read_drawn(tmp_path, [], 5)
