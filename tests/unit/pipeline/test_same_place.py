"""However a patient lies in the scanner and however the slices are stored, a tumour is found where it is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bundle_support import small_unet_bundle
from ctflow.bundle import read_bundle
from ctflow.core.steps import Resample
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.engines.contract import EngineInfo
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from dicom_support import assembled

SPACING_MM = (2.5, 3.0, 4.0)


class Bright:
    """Marks what is brighter than half of the model's range: no network, so that only the way there and back counts."""

    info = EngineInfo("eager", "fp32", "cpu", (32, 32, 32), (1, 4), "0", 2)

    def predict(self, windows):
        return torch.cat([torch.zeros_like(windows), (windows - 0.5) * 20], dim=1)

    def close(self):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Steps of 2 mm: finer than the CT's."""
    read = read_bundle(small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small"))
    steps = tuple(Resample((2.0, 2.0, 2.0)) if isinstance(s, Resample) else s for s in read.spec.preprocessing)
    return replace(read, spec=replace(read.spec, preprocessing=steps))


@pytest.fixture(scope="module")
def chest() -> Volume:
    """Air, and a tumour whose shape no flip or turn repeats, at an odd place."""
    tumour = np.full((24, 30, 28), -1000, np.int16)
    tumour[6:13, 9:15, 4:11] = 60
    tumour[13:16, 9:12, 4:7] = 60
    affine = np.array(
        [[0, 0, SPACING_MM[2], -41.0], [0, SPACING_MM[1], 0, 22.0], [SPACING_MM[0], 0, 0, -310.0], [0, 0, 0, 1]]
    )
    return Volume(tumour, Geometry(tumour.shape, affine))


def stored(volume: Volume, order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same patient, the array's axes in another order and run through from the other end: the same world."""
    array, affine = volume.array, volume.geometry.affine_mm.copy()
    for axis in flips:
        array = np.flip(array, axis)
        affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
        affine[:, axis] *= -1
    array = np.ascontiguousarray(array.transpose(order))
    return Volume(array, Geometry(array.shape, affine[:, [*order, 3]]))


def lying(volume: Volume, turn: np.ndarray) -> Volume:
    """The patient turned about the scanner's centre: another world."""
    affine = np.eye(4)
    affine[:3, :3] = turn
    return Volume(volume.array, Geometry(volume.geometry.shape, affine @ volume.geometry.affine_mm))


def about_x(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def found(volume: Volume, folder, model, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """World points of the SEG's mask, and the centroid that result.json gives."""
    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: Bright())
    write_ct_series(volume, folder / "ct")
    (case,) = run_folder(folder / "ct", folder / "out", model, Settings(device="cpu", cache=None, force=True)).cases
    loaded = assembled(folder / "ct")
    mask = read_segmentation(case.folder / "segmentation.dcm", [instance.header for instance in loaded.instances])
    (segment,) = json.loads((case.folder / "result.json").read_text())["segments"]
    assert segment["components"] == 1
    return loaded.volume.geometry.world_from_index(np.argwhere(mask)), np.array(segment["centroid_mm"])


def assert_same_tumour(points: np.ndarray, centroid: np.ndarray, expected: Volume) -> None:
    """Centroid and every border within half a voxel, volume within a tenth."""
    truth = expected.geometry.world_from_index(np.argwhere(expected.array > 0))
    half = np.abs(expected.geometry.affine_mm[:3, :3]).sum(axis=1) / 2
    assert (np.abs(centroid - truth.mean(axis=0)) <= half).all()
    assert (np.abs(points.mean(axis=0) - centroid) < 1e-3).all()
    for end in (np.min, np.max):
        assert (np.abs(end(points, axis=0) - end(truth, axis=0)) <= half + 1e-3).all()
    assert len(points) == pytest.approx(len(truth), rel=0.1)


STORED = [((0, 1, 2), flips) for count in range(4) for flips in itertools.combinations(range(3), count)]
STORED += [((1, 0, 2), ()), ((2, 1, 0), (0,)), ((0, 2, 1), (1, 2))]


@pytest.mark.parametrize(("order", "flips"), STORED)
def test_flips_and_other_planes_change_nothing(chest, model, tmp_path, monkeypatch, order, flips):
    assert_same_tumour(*found(stored(chest, order, flips), tmp_path, model, monkeypatch), chest)


LYING = {
    "feet first": np.diag([-1.0, 1.0, -1.0]),
    "prone": np.diag([-1.0, -1.0, 1.0]),
    "feet first, prone": np.diag([1.0, -1.0, -1.0]),
    "on the right side": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
    "turned by 20 degrees": about_x(20),
}


@pytest.mark.parametrize("how", LYING)
def test_a_patient_who_lies_otherwise_has_the_tumour_with_them(chest, model, tmp_path, monkeypatch, how):
    turned = lying(chest, LYING[how])
    assert_same_tumour(*found(turned, tmp_path, model, monkeypatch), turned)
