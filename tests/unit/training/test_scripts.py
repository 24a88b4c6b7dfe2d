"""The scripts that make training sets and the wide bundle."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch

from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.core.steps import Resample
from ctflow.networks.build import network_from_model, network_from_spec
from reasons import raises_reason

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process: another one would import torch again."""

    def run(script: str, *words: str) -> None:
        path = str(ROOT / "training" / script)
        monkeypatch.setattr(sys, "argv", [path, *words])
        runpy.run_path(path, run_name="__main__")

    return run


def test_a_wide_bundle_has_its_own_width_batch_and_name_and_does_not_resample(tmp_path, run, capsys):
    weights = ROOT / "bundle" / "models" / "model.pt"
    words = [str(tmp_path / "wide"), "--feature-size", "12", "--weights", str(weights)]
    command = [sys.executable, str(ROOT / "training" / "make_wide_bundle.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec, demonstration = read_bundle(tmp_path / "wide").spec, read_bundle(ROOT / "bundle").spec
    assert spec.batch_size == 8
    assert spec.name != demonstration.name
    assert any(isinstance(step, Resample) for step in demonstration.preprocessing)
    assert spec.preprocessing == tuple(step for step in demonstration.preprocessing if not isinstance(step, Resample))
    with pytest.raises(SystemExit) as ended:
        run("make_wide_bundle.py", *words)
    assert ended.value.code == 2
    assert "wide exists" in capsys.readouterr().err


def test_weights_of_another_width_leave_no_bundle(tmp_path, run):
    shutil.copy(ROOT / "bundle" / "models" / "model.pt", tmp_path / "model.pt")
    weights = ("--weights", str(tmp_path / "model.pt"))
    with raises_reason(BundleInvalid, "weights-mismatch"):
        run("make_wide_bundle.py", str(tmp_path / "wide"), "--feature-size", "24", *weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_a_widened_network_computes_what_the_narrow_one_computes(tmp_path, run):
    run("widen_network.py", str(tmp_path / "wide.pt"), "--feature-size", "24", "--noise", "0")
    narrow = read_bundle(ROOT / "bundle")
    wide = NetworkSpec("SwinUNETR", {**narrow.spec.network.arguments, "feature_size": 24})
    networks = [network_from_model(narrow), network_from_spec(wide)]
    networks[1].load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True))
    window = torch.rand((1, 1, 64, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (network.eval()(window) for network in networks)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_width_that_is_no_multiple_is_refused(tmp_path, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("widen_network.py", str(tmp_path / "wide.pt"), "--feature-size", "40")
    assert ended.value.code == 2
    assert "a multiple of 12" in capsys.readouterr().err
    assert not (tmp_path / "wide.pt").exists()


def test_a_set_has_the_shape_that_was_asked_for(tmp_path):
    words = [str(tmp_path / "set"), "--phantoms", "2", "--shape", "20,40,32", "--processes", "1"]
    command = [sys.executable, str(ROOT / "training" / "make_set.py"), *words]  # it forks, which threads do not survive
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = sorted((tmp_path / "set").iterdir())
    assert len(cases) == 2
    for case in cases:
        image, label = (nib.load(case / f"{name}.nii") for name in ("image", "label"))
        assert image.shape == label.shape == (20, 40, 32)


@pytest.mark.parametrize("shape", ["1,2", "a,b,c"])
def test_a_wrong_shape_is_refused(tmp_path, run, shape):
    with pytest.raises(SystemExit) as ended:
        run("make_set.py", str(tmp_path / "set"), "--phantoms", "1", "--shape", shape)
    assert ended.value.code == 2
    assert not (tmp_path / "set").exists()


def test_the_recipe_still_names_what_the_wide_network_overrides():
    recipe = json.loads((ROOT / "bundle" / "configs" / "train.json").read_text())
    assert recipe["deterministic_transforms"][3]["_target_"] == "Spacingd"
    assert recipe["deterministic_transforms"][7]["_target_"] == "ClassesToIndicesd"


@pytest.mark.exhaustive
def test_two_processes_train_one_network_and_write_one_plain_state_dict(tmp_path):
    make = [sys.executable, str(ROOT / "training" / "make_set.py"), str(tmp_path / "set"), "--phantoms", "2"]
    subprocess.run([*make, "--shape", "20,40,40", "--processes", "1"], check=True, capture_output=True)
    configs = "['configs/train.json','configs/multi_gpu_train.json']"
    words = ["--config_file", configs, "--dataset_dir", str(tmp_path / "set"), "--ckpt_dir", str(tmp_path / "out")]
    small = ["--max_epochs", "1", "--workers", "0", "--roi_size", "[64,64,64]", "--cases_per_step", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle"]
    command = [*launch, "run", *words, *small]
    done = subprocess.run(command, cwd=ROOT / "bundle", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    shipped = torch.load(ROOT / "bundle" / "models" / "model.pt", weights_only=True)
    assert [(name, value.shape) for name, value in trained.items()] == [(n, v.shape) for n, v in shipped.items()]
    assert all(value.isfinite().all() for value in trained.values())


def test_preparing_needs_the_backgrounds(tmp_path, run):
    with pytest.raises(SystemExit) as ended:
        run("make_set.py", str(tmp_path / "set"), "--prepare")
    assert ended.value.code == 2
    assert not (tmp_path / "set").exists()
