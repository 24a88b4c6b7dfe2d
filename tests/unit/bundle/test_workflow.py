from __future__ import annotations

import pytest

from ctflow.bundle.config import Config
from ctflow.bundle.workflow import Checkpoint, read_workflow
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

PARTS = {
    "network_def": {"_target_": "UNet"},
    "network": "$@network_def.to(@device)",
    "preprocessing": "@first",
    "first": {"_target_": "Compose"},
    "inferer": {"_target_": "SlidingWindowInferer"},
    "postprocessing": {"_target_": "Compose"},
    "other": {"_target_": "SimpleInferer"},
}
EVALUATOR = {
    "_target_": "SupervisedEvaluator",
    "network": "@network",
    "inferer": "@inferer",
    "postprocessing": "@postprocessing",
}


LOADER = {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'"}
LOW = {"_target_": "monai.handlers.CheckpointLoader", "load_path": "$@bundle_root + '/models/' + @modelname"}


@pytest.mark.parametrize("path", ["", "models/..", "a" * 5000])
def test_a_path_that_names_no_file_is_rejected(path):
    with raises_reason(BundleInvalid, "workflow", names="names no file"):
        read_workflow(Config({**PARTS, "handlers": [{**LOADER, "load_path": path}]}, "configs/inference.json"))


def test_the_search_for_a_files_name_in_a_long_text_ends_at_once():
    with raises_reason(BundleInvalid, "workflow", names="low.pt"):
        check(handlers=[{**LOADER, "load_path": "$" + "a" * 1_000_000 + " + 'low.pt'"}])  # days, if quadratic


def check(**parts):
    read_workflow(Config({**PARTS, **parts}, "configs/inference.json"))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"evaluator": EVALUATOR, "dataset": {"transform": "@preprocessing"}},
        {"dataset": {"transform": "@first"}, "evaluator": "$make()"},
        {"dataset": {"transform": "$@preprocessing", "data": "$x"}},
        {"evaluator": EVALUATOR | {"network": "@network_def", "amp": True, "val_handlers": "$x", "mode": "eval"}},
        {"evaluator": EVALUATOR | {"network": "$torch.compile(@network_def)", "inferer": "$@inferer"}},
        {"handlers": [LOADER, {"_target_": "StatsHandler"}], "loader": LOADER},
        {"handlers": [LOW], "modelname": "model.pt"},
        {"handlers": [LOW, "@x"], "modelname": "$@other_one", "other_one": "model.pt"},
        {"handlers": [LOW | {"_disabled_": True}], "modelname": "model_low.pt"},
    ],
)
def test_an_evaluator_and_a_dataset_of_the_parts_that_ctflow_reads_are_taken(parts):
    check(**parts)


@pytest.mark.parametrize(
    ("parts", "key", "reason"),
    [
        ({"evaluator": EVALUATOR | {"inferer": "@other"}}, "evaluator#inferer", "workflow"),
        ({"evaluator": EVALUATOR | {"inferer": {"_target_": "SimpleInferer"}}}, "evaluator#inferer", "workflow"),
        ({"evaluator": EVALUATOR | {"inferer": "$@inferer if x else @other"}}, "evaluator#inferer", "workflow"),
        ({"evaluator": EVALUATOR | {"network": "@other"}}, "evaluator#network", "workflow"),
        ({"evaluator": EVALUATOR | {"network": "$@network_def2.to('cpu')"}}, "evaluator#network", "workflow"),
        ({"evaluator": {k: v for k, v in EVALUATOR.items() if k != "inferer"}}, "evaluator#inferer", "workflow"),
        ({"evaluator": EVALUATOR | {"postprocessing": None}}, "evaluator#postprocessing", "workflow"),
        ({"evaluator": EVALUATOR | {"prepare_batch": "$f"}}, "evaluator#prepare_batch", "expression"),
        ({"evaluator": EVALUATOR | {"mode": "train"}}, "evaluator#mode", "value"),
        ({"evaluator": EVALUATOR | {"colour": 1}}, "evaluator#colour", "argument"),
        ({"evaluator": EVALUATOR | {"_target_": "EnsembleEvaluator"}}, "evaluator#network", "argument"),
        ({"evaluator": EVALUATOR | {"_target_": "SupervisedTrainer"}}, "evaluator#_target_", "target"),
        ({"evaluator": EVALUATOR | {"_target_": "scripts.Mine"}}, "evaluator#_target_", "target"),
        ({"handlers": [LOADER, LOW], "modelname": "model_low.pt"}, "handlers", "workflow"),
        ({"loader": LOW, "modelname": "$pick('best.ckpt')"}, "loader#load_path", "workflow"),
        ({"loader": LOW, "modelname": "../../other.pt"}, "loader#load_path", "workflow"),
        (
            {"evaluator": EVALUATOR | {"val_handlers": [LOADER | {"load_path": "/x/model_low.pt"}]}},
            "evaluator#val_handlers#0#load_path",
            "workflow",
        ),
        ({"dataset": {"transform": "@postprocessing"}}, "dataset#transform", "workflow"),
        ({"dataset": {"transform": {"_target_": "Compose"}}}, "dataset#transform", "workflow"),
        ({"dataset": {"transform": "@nowhere"}}, "dataset#transform", "reference"),
    ],
)
def test_other_parts_are_rejected_by_key(parts, key, reason):
    with raises_reason(BundleInvalid, reason, names=f"configs/inference.json: {key} "):
        check(**parts)


@pytest.mark.parametrize(
    ("parts", "checkpoint"),
    [
        ({}, Checkpoint("models/model.pt", None)),
        ({"handlers": [LOW], "modelname": "$'low.pt' if 1 > 2 else 'high.pt'"}, Checkpoint("models/high.pt", None)),
        ({"loader": LOADER | {"load_dict": {"net": "@network"}}}, Checkpoint("models/model.pt", "net")),
        ({"loader": LOADER | {"load_path": "/workspace/models/best.pt"}}, Checkpoint("models/best.pt", None)),
        ({"loader": LOW, "modelname": "a.pt", "x": LOADER | {"_disabled_": "$not False"}}, Checkpoint("models/a.pt")),
    ],
)
def test_the_weights_are_those_that_the_loader_names(parts, checkpoint):
    assert read_workflow(Config({**PARTS, **parts}, "configs/inference.json")) == (checkpoint,)
