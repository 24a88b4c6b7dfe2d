"""What `ctflow inspect-model` says of a folder that nnU-Net trained."""

from __future__ import annotations

import json

import pytest

import nnunet_support as nnunet
from ctflow.bundle.nnunet.describe import describe_nnunet


@pytest.fixture
def folder(tmp_path):
    return nnunet.untrained(tmp_path / "made", nnunet.plans(), nnunet.dataset(), folds=2)


def test_a_model_that_runs_is_described(folder, tmp_path):
    for path in (folder, nnunet.zipped(folder, tmp_path / "model.zip")):
        found = describe_nnunet(path)
        assert (found["kind"], found["name"], found["runs"]) == ("nnU-Net", "Dataset001_Test", True)
        assert found["parts"]["network"] == "PlainConvUNet, 2 folds averaged"
        assert found["parts"]["grid"] == "3 x 2 x 2 mm"
        assert found["parts"]["mirroring"] == "axes 0, 1, 2"
        assert found["parts"]["segments"] == "liver (Liver), lung tumour (Neoplasm)"
        assert json.dumps(found)


def test_the_reason_is_named_where_it_does_not_run(folder):
    plans = nnunet.plans(previous_stage="3d_lowres")
    (folder / "plans.json").write_text(json.dumps(plans))
    found = describe_nnunet(folder)
    assert not found["runs"]
    assert found["problem"]["reason"] == "cascade"
    assert "previous_stage" in found["problem"]["message"]
