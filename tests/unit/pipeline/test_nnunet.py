"""nnU-Net's models segment as nnU-Net's own predictor does, and their results are the same files as any model's."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread

import nnunet_support as nnunet
from agreement_record import record
from ctflow.api import read_series
from ctflow.bundle import find_bundle, read_bundle
from ctflow.core.errors import SettingsInvalid
from ctflow.core.volume import Geometry, Volume
from ctflow.pipeline.run import run_folder
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from ctflow.window.grid import window_starts
from phantom_support import phantom_drawn_once
from reasons import raises_reason

REGIONS = {"background": 0, "lung": [1, 2], "lung tumour": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two folds, trained by nnU-Net."""
    return nnunet.train(tmp_path_factory.mktemp("trained"), nnunet.plans(), nnunet.dataset(), folds=2)


def straight(array, spacing_mm) -> Volume:
    """A volume whose axes are those of a series that SimpleITK reads."""
    d, h, w = spacing_mm
    affine = np.array([[0, 0, w, 0], [0, h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1.0]])
    return Volume(np.ascontiguousarray(array), Geometry(array.shape, affine))


def phantom() -> Volume:
    """A part of a chest, of two or three windows along each axis."""
    source = phantom_drawn_once(5, (24, 96, 96)).volume
    return straight(source.array[4:20, 30:62, 20:52], (4.0, 2.5, 2.5))


def labels_of(folder: Path, volume: Volume, **chosen):
    with Segmenter(read_bundle(find_bundle(folder)), Settings(engine="eager", device="cpu", **chosen)) as segmenter:
        segmentation, _ = segmenter.segment(volume)
    return segmentation


def agreement(name: str, folder: Path, volume: Volume, *, mirror: bool = True) -> tuple[float, float]:
    """Shares of equal voxels: with nnU-Net's predictor, and with it where it adds logits in fp32.

    nnU-Net adds the windows' logits in half precision, so voxels whose classes hardly differ fall to either.
    """
    ours = labels_of(folder, volume, mirror="plans" if mirror else "none").labels
    given = folder, volume.array, volume.geometry.spacing_mm
    theirs = [nnunet.predict(*given, mirror=mirror, in_full_precision=full) for full in (False, True)]
    assert len(np.unique(theirs[0])) > 1, "nothing to compare"
    shares = float((ours == theirs[0]).mean()), float((ours == theirs[1]).mean())
    record("nnunet", name, *shares)
    return shares


@pytest.mark.parametrize("mirror", [True, False])
def test_labels_equal_nnunets_own(trained, mirror):
    volume = phantom()
    grid = read_bundle(trained).spec.preprocessing[-1].spacing_mm
    size = [
        round(n * mm / new) for n, mm, new in zip(volume.array.shape, volume.geometry.spacing_mm, grid, strict=True)
    ]
    axes = [len({start[axis] for start in window_starts(tuple(size), (16, 24, 24), 0.5, "even")}) for axis in range(3)]
    assert min(axes) >= 2, "too small to blend windows"
    share, in_fp32 = agreement("phantom, mirrored" if mirror else "phantom", trained, volume, mirror=mirror)
    assert share >= 0.999
    assert in_fp32 >= 0.99999


def test_labels_of_a_chest_equal_nnunets_own(trained, data):
    source = read_series(data / "lidc-idri-0314")
    volume = straight(source.array[100:160, 200:270, 190:280], source.geometry.spacing_mm)
    share, in_fp32 = agreement("chest, mirrored", trained, volume)
    assert share >= 0.999
    assert in_fp32 >= 0.99999


def test_labels_of_a_head_with_thick_slices_equal_nnunets_own(trained, data):
    """Its slices are resampled apart from rows and columns."""
    files = [dcmread(path) for path in sorted((data / "tilted").glob("*.dcm"))]
    size = max({(each.Rows, each.Columns) for each in files})
    chosen = [each for each in files if (each.Rows, each.Columns) == size][:12]
    array = np.stack([each.pixel_array * float(each.RescaleSlope) + float(each.RescaleIntercept) for each in chosen])
    volume = straight(array[:, 150:280, 150:280].astype(np.int16), (7.0, 0.45, 0.45))
    share, in_fp32 = agreement("head, mirrored", trained, volume)
    assert share >= 0.999
    assert in_fp32 >= 0.99999


@pytest.mark.parametrize("case", ["regions", "residual", "transposed", "z-score", "ignored"])
def test_other_models_equal_nnunets_own(tmp_path, case):
    plans, dataset = nnunet.plans(), nnunet.dataset()
    configuration = plans["configurations"][nnunet.CONFIGURATION]
    if case == "regions":
        dataset = nnunet.dataset(REGIONS, regions_class_order=[1, 2])
    elif case == "residual":
        configuration["architecture"] = nnunet.residual()
    elif case == "transposed":
        plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
        configuration |= {"patch_size": [24, 16, 24], "spacing": [2.0, 3.0, 2.0]}
    elif case == "z-score":
        configuration |= {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}
    else:
        dataset = nnunet.dataset({"background": 0, "liver": 1, "ignore": 2})
    volume = phantom()
    volume.array[:, :4] = volume.array[:2] = 0  # cropped
    share, in_fp32 = agreement(
        f"phantom, {case}", nnunet.train(tmp_path, plans, dataset), volume, mirror=case == "transposed"
    )
    assert share >= 0.999
    assert in_fp32 >= 0.9999


def test_steps_on_labels_equal_nnunets_own(trained, tmp_path):
    module = importlib.import_module("nnunetv2.postprocessing.remove_connected_components")
    folder = shutil.copytree(trained, tmp_path / "trained")
    volume = phantom()
    before = labels_of(folder, volume, mirror="none").labels
    name = "remove_all_but_largest_component_from_segmentation"
    document = {"postprocessing_fns": [name], "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}]}
    (folder / "postprocessing.json").write_text(json.dumps(document))
    wanted = getattr(module, name)(before, [1, 2])
    assert (wanted != before).any()
    np.testing.assert_array_equal(labels_of(folder, volume, mirror="none").labels, wanted)


def test_mirroring_is_a_setting_that_results_show(trained):
    volume = phantom()
    mirrored, plain = labels_of(trained, volume), labels_of(trained, volume, mirror="none")
    assert mirrored.window["mirror"] == [0, 1, 2]
    assert "mirror" not in plain.window
    assert not np.array_equal(mirrored.labels, plain.labels)


def test_fractions_agree_with_labels_and_end_at_the_crop(tmp_path):
    folder = nnunet.untrained(tmp_path / "m", nnunet.plans(), nnunet.dataset())
    volume = phantom()
    volume.array[:, :4] = 0
    found = labels_of(folder, volume, mirror="none", seg="fractional")
    assert found.fractions.shape == (2, *volume.array.shape)
    assert not found.fractions[:, :, :4].any()
    assert np.array_equal(found.labels > 0, found.fractions.max(0) > 255 - found.fractions.sum(0, dtype=int))


def test_regions_have_no_fractions(tmp_path):
    given = nnunet.dataset(REGIONS, regions_class_order=[1, 2])
    folder = nnunet.untrained(tmp_path / "m", nnunet.plans(), given)
    with raises_reason(SettingsInvalid, "conflict", names="fractional"):
        labels_of(folder, phantom(), seg="fractional")


def test_a_zip_gives_a_seg_with_codes_and_sides(tmp_path, series):
    labels = {"background": 0, "kidney_left": 1, "lung_nodule": 2}
    folder = nnunet.untrained(tmp_path / "made", nnunet.plans(), nnunet.dataset(labels))
    archive = nnunet.zipped(folder, tmp_path / "model.zip")
    model = read_bundle(find_bundle(archive))
    (case,) = run_folder(series, tmp_path / "out", model, Settings(engine="eager", device="cpu", mirror="none")).cases
    assert case.error is None, case.error
    (path,) = (tmp_path / "out").glob("*/segmentation.dcm")
    seg = hd.seg.segread(path)
    by_label = {each.SegmentLabel: each for each in seg.SegmentSequence}
    kidney = by_label["kidney_left"].SegmentedPropertyTypeCodeSequence[0]
    assert (kidney.CodeValue, kidney.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert by_label["lung_nodule"].AnatomicRegionSequence[0].CodeValue == "39607008"
    document = json.loads(next((tmp_path / "out").glob("*/result.json")).read_text())
    assert document["window"]["blend"] == "nnunet"
    assert document["model"]["version"] == "nnUNetTrainer__nnUNetPlans__3d_fullres"
