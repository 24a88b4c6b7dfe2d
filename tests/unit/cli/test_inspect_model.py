from __future__ import annotations

import json

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.inspect_model import inspect_model
from ctflow.cli.main import main


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
        "network_def", "inferer", "model with its weights",
    ]  # fmt: skip
    assert (parts["network_def"]["reason"], parts["inferer"]["reason"]) == ("target", "value")
    assert "--allow-code" in parts["network_def"]["what"]
    assert main(["inspect-model", str(small)]) == 0
    assert "ctflow runs it" in capsys.readouterr().out
