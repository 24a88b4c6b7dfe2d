from __future__ import annotations

import pytest

from ctflow.bundle.config import Config
from ctflow.bundle.workflow import check_workflow
from ctflow.errors import BundleInvalid

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


def check(**parts):
    check_workflow(Config({**PARTS, **parts}, "configs/inference.json"))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"evaluator": EVALUATOR, "dataset": {"transform": "@preprocessing"}},
        {"dataset": {"transform": "@first"}, "evaluator": "$make()"},
        {"dataset": {"transform": "$@preprocessing", "data": "$x"}},
        {"evaluator": EVALUATOR | {"network": "@network_def", "amp": True, "val_handlers": "$x", "mode": "eval"}},
        {"evaluator": EVALUATOR | {"network": "$torch.compile(@network_def)", "inferer": "$@inferer"}},
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
        ({"evaluator": EVALUATOR | {"_target_": "EnsembleEvaluator"}}, "evaluator#_target_", "target"),
        ({"evaluator": EVALUATOR | {"_target_": "scripts.Mine"}}, "evaluator#_target_", "target"),
        ({"dataset": {"transform": "@postprocessing"}}, "dataset#transform", "workflow"),
        ({"dataset": {"transform": {"_target_": "Compose"}}}, "dataset#transform", "workflow"),
        ({"dataset": {"transform": "@nowhere"}}, "dataset#transform", "reference"),
    ],
)
def test_other_parts_are_rejected_by_key(parts, key, reason):
    with pytest.raises(BundleInvalid) as caught:
        check(**parts)
    assert f"configs/inference.json: {key} " in str(caught.value)
    assert caught.value.reason == reason
