from __future__ import annotations

import json
import shutil

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.inspect_model import inspect_model
from ctflow.cli.main import main
from nnunet_support import dataset, plans, untrained, zipped


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_unet_bundle(tmp_path_factory.mktemp("inspected") / "small")


def test_every_part_of_a_model_that_runs_is_shown(small):
    found = inspect_model(small)
    assert (found["kind"], found["runs"]) == ("MONAI bundle", True)
    assert [part["part"] for part in found["parts"]][:3] == ["configuration", "network_def", "preprocessing"]
    assert "Resample" in found["parts"][2]["what"]


def test_a_part_that_is_not_understood_hides_no_other_and_says_why(small, tmp_path, capsys):
    config = json.loads((small / "configs" / "inference.json").read_text())
    config["network_def"] = {"_target_": "scripts.mine.Net"}
    config["inferer"]["mode"] = "linear"
    (small / "configs" / "other.json").write_text(json.dumps(config))
    assert main(["inspect-model", str(small), "--config", "other.json", "--json"]) == 3
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert [name for name, part in parts.items() if not part["understood"]] == [
        "network_def", "inferer", "model",
    ]  # fmt: skip
    assert (parts["network_def"]["reason"], parts["inferer"]["reason"]) == ("target", "value")
    assert "--allow-code" in parts["network_def"]["what"]
    assert parts["model"]["what"] == "see network_def"
    assert main(["inspect-model", str(small)]) == 0
    shown = capsys.readouterr().out
    assert "ctflow runs it" in shown
    assert "Resample (spacing mm 6 x 6 x 6" in shown
    assert "None" not in shown
    assert "'" not in shown, "no Python literals"


def test_a_problem_is_told_once_with_what_allows_it(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "smoothed")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    config["preprocessing"]["transforms"].append({"_target_": "GaussianSmoothd", "keys": "image"})
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    parts = {part["part"]: part["what"] for part in inspect_model(folder)["parts"] if not part["understood"]}
    assert list(parts) == ["preprocessing", "model"]
    assert "is GaussianSmoothd" in parts["preprocessing"]
    assert "--allow-code lets MONAI run it" in parts["preprocessing"]
    assert parts["model"] == "see preprocessing"


def test_weights_of_another_network_are_noticed(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "other")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    config["network_def"]["channels"] = [8, 16]
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    found = inspect_model(folder)
    (part,) = (part for part in found["parts"] if not part["understood"])
    assert (found["runs"], part["part"], part["reason"]) == (False, "model", "weights-mismatch")
    assert "of another shape" in part["what"]


def test_a_configuration_that_cannot_be_read_is_told_once(small, tmp_path):
    broken = shutil.copytree(small, tmp_path / "broken")
    (broken / "configs" / "inference.json").write_text('{"network_def": [1,')
    found = inspect_model(broken)
    assert [(part["part"], part["reason"]) for part in found["parts"]] == [("configuration", "json")]
    assert not found["runs"]


def test_the_environment_gives_configuration_and_leave_to_execute(small, monkeypatch, capsys):
    folder = small.parent / "of_environment"
    shutil.copytree(small, folder)
    (folder / "configs" / "inference.json").rename(folder / "configs" / "other.json")
    assert main(["inspect-model", str(folder)]) == 3
    monkeypatch.setenv("CTFLOW_CONFIG", "other.json")
    assert main(["inspect-model", str(folder)]) == 0
    assert "configs/other.json" in capsys.readouterr().out
    monkeypatch.setenv("CTFLOW_ALLOW_CODE", "perhaps")
    assert main(["inspect-model", str(folder)]) == 64


def test_a_model_of_nnunet_has_its_notes_apart_from_its_parts(tmp_path, capsys):
    folder = untrained(tmp_path / "trained", plans(), dataset({"background": 0, "gizmo": 1}))
    found = inspect_model(zipped(folder, tmp_path / "model.zip"))
    assert (found["kind"], found["runs"]) == ("zip of a model that nnU-Net v2 trained", True)
    assert "note" not in {part["part"] for part in found["parts"]}
    assert any("gizmo" in note for note in found["notes"])
    assert main(["inspect-model", str(folder)]) == 0
    assert "note: no codes are known for the labels gizmo" in capsys.readouterr().out
