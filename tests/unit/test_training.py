"""The scripts that make training sets and the wide bundle, as whole processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch

from ctflow.bundle.read import read_bundle
from ctflow.model import NetworkSpec, Resample
from ctflow.networks.build import network_from_model, network_from_spec

ROOT = Path(__file__).parents[2]


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, str(ROOT / "training" / script), *words)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wide_bundle_has_its_own_width_batch_and_name_and_does_not_resample(tmp_path):
    weights = ROOT / "bundle" / "models" / "model.pt"
    done = run("make_wide_bundle.py", str(tmp_path / "wide"), "--feature-size", "12", "--weights", str(weights))
    assert done.returncode == 0, done.stderr
    spec, demonstration = read_bundle(tmp_path / "wide").spec, read_bundle(ROOT / "bundle").spec
    assert spec.batch_size == 8
    assert spec.name != demonstration.name
    assert any(isinstance(step, Resample) for step in demonstration.preprocessing)
    assert spec.preprocessing == tuple(step for step in demonstration.preprocessing if not isinstance(step, Resample))
    again = run("make_wide_bundle.py", str(tmp_path / "wide"), "--feature-size", "12", "--weights", str(weights))
    assert again.returncode == 2
    assert "wide exists" in again.stderr


def test_weights_of_another_width_leave_no_bundle(tmp_path):
    shutil.copy(ROOT / "bundle" / "models" / "model.pt", tmp_path / "model.pt")
    weights = ("--weights", str(tmp_path / "model.pt"))
    done = run("make_wide_bundle.py", str(tmp_path / "wide"), "--feature-size", "24", *weights)
    assert done.returncode != 0
    assert "BundleInvalid" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_a_widened_network_computes_what_the_narrow_one_computes(tmp_path):
    done = run("widen_network.py", str(tmp_path / "wide.pt"), "--feature-size", "24", "--noise", "0")
    assert done.returncode == 0, done.stderr
    narrow = read_bundle(ROOT / "bundle")
    wide = NetworkSpec("SwinUNETR", {**narrow.spec.network.arguments, "feature_size": 24})
    networks = [network_from_model(narrow), network_from_spec(wide)]
    networks[1].load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True))
    window = torch.rand((1, 1, 64, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (network.eval()(window) for network in networks)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_width_that_is_no_multiple_is_refused(tmp_path):
    done = run("widen_network.py", str(tmp_path / "wide.pt"), "--feature-size", "40")
    assert done.returncode == 2
    assert "a multiple of 12" in done.stderr
    assert not (tmp_path / "wide.pt").exists()


def test_a_set_has_the_shape_that_was_asked_for(tmp_path):
    done = run("make_set.py", str(tmp_path / "set"), "--phantoms", "2", "--shape", "20,40,32", "--processes", "1")
    assert done.returncode == 0, done.stderr
    cases = sorted((tmp_path / "set").iterdir())
    assert len(cases) == 2
    for case in cases:
        image, label = (nib.load(case / f"{name}.nii") for name in ("image", "label"))
        assert image.shape == label.shape == (20, 40, 32)


@pytest.mark.parametrize("shape", ["1,2", "a,b,c"])
def test_a_wrong_shape_is_refused(tmp_path, shape):
    assert run("make_set.py", str(tmp_path / "set"), "--phantoms", "1", "--shape", shape).returncode == 2
    assert not (tmp_path / "set").exists()


def test_the_recipe_still_names_what_the_wide_network_overrides():
    recipe = json.loads((ROOT / "bundle" / "configs" / "train.json").read_text())
    assert recipe["deterministic_transforms"][3]["_target_"] == "Spacingd"
    assert recipe["deterministic_transforms"][7]["_target_"] == "ClassesToIndicesd"
