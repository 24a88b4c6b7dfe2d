"""`ctflow export` takes every model that `run` takes, with the same options."""

from __future__ import annotations

import json
import shutil

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.main import main
from nnunet_support import dataset, plans, untrained, zipped


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """What `export` of some words prints as its last line."""
    monkeypatch.setenv("CTFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CTFLOW_DEVICE", "cpu")

    def export(*words) -> dict:
        assert main(["export", *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return export


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_a_model_of_nnunet_gets_its_onnx_file(exported, tmp_path, is_zip):
    model = untrained(tmp_path / "trained", plans(), dataset(), folds=2)
    if is_zip:
        model = zipped(model, tmp_path / "model.zip")
    (measured,) = exported("-m", model, "--engine", "openvino")["measured"]
    assert measured["backend"] == "openvino"
    assert measured["parity"]["relative_error"] < 1e-4
    assert len([*(tmp_path / "cache").glob("onnx-*/engine.onnx")]) == 1


def test_configuration_and_own_code_are_taken_as_run_takes_them(exported, tmp_path, capsys):
    bundle = small_unet_bundle(tmp_path / "small")
    inference = json.loads((bundle / "configs" / "inference.json").read_text())
    inference["network_def"]["_target_"] = "scripts.nets.Net"
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").touch()
    (bundle / "scripts" / "nets.py").write_text("from monai.networks.nets import UNet\nclass Net(UNet):\n    pass\n")
    (bundle / "configs" / "own.json").write_text(json.dumps(inference))
    (bundle / "configs" / "inference.json").unlink()
    words = ["-m", bundle, "--engine", "eager"]
    assert main(["export", *map(str, words), "--config", "own.json"]) == 3
    assert "--allow-code" in capsys.readouterr().err
    assert exported(*words, "--config", "own.json", "--allow-code")["backend"] == "eager"


def test_the_environment_gives_the_configuration(exported, tmp_path, monkeypatch):
    bundle = small_unet_bundle(tmp_path / "small")
    shutil.move(bundle / "configs" / "inference.json", bundle / "configs" / "other.json")
    monkeypatch.setenv("CTFLOW_CONFIG", "other.json")
    assert exported("-m", bundle, "--engine", "eager")["backend"] == "eager"
