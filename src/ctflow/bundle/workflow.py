"""Whether the bundle's own evaluator and dataset use the parts that ctflow reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ctflow.bundle.config import Component, Config, Place, short
from ctflow.bundle.postprocessing import is_the_same
from ctflow.bundle.signatures import EVALUATOR

_NETWORK = re.compile(r"@network_def(?!\w)")


def check_workflow(config: Config) -> None:
    """Reject a configuration whose evaluator or dataset uses other transforms, or another inferer or network.

    ctflow reads `preprocessing`, `network_def`, `inferer` and `postprocessing` by these names. Where the file also says
    who uses what, it must use these.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: It uses something else, or the evaluator changes what the network gets or gives; the reason is
            "workflow", "argument" or "value".
    """
    if "dataset" in config and isinstance(config.raw("dataset").value, Mapping):
        dataset = Place("dataset#transform", config.raw("dataset").value.get("transform"))
        if dataset.value is not None and not is_the_same(config, dataset, "preprocessing"):
            raise _other(config, dataset, "preprocessing")
    if "evaluator" not in config or not isinstance(config.raw("evaluator").value, Mapping):
        return
    evaluator = Component(config, config.raw("evaluator"), "monai.engines")
    if evaluator.target != "SupervisedEvaluator":
        raise evaluator.refused("_target_", f"is {short(evaluator.target)}; ctflow does SupervisedEvaluator", "target")
    for key in ("inferer", "postprocessing"):
        if key not in evaluator.names:
            raise evaluator.refused(key, f'is missing; ctflow reads {key}: write "@{key}"', "workflow")
        if not is_the_same(config, evaluator.place(key), key):
            raise _other(config, evaluator.place(key), key)
    evaluator.demand_signature(EVALUATOR)
    network = evaluator.place("network")
    if not _is_network(config, network.value):
        raise _other(config, network, "network_def")


def _is_network(config: Config, value: object) -> bool:
    """Whether a value is `network_def` or an expression of it, directly or through another top-level key."""
    for _ in range(4):
        if isinstance(value, str) and _NETWORK.search(value):
            return True
        if not isinstance(value, str) or not value.startswith("@") or value[1:] not in config:
            return False
        value = config.raw(value[1:]).value
    return False


def _other(config: Config, place: Place, key: str) -> Exception:
    return config.invalid(place.id, f'is {short(place.value)}; ctflow reads {key}: write "@{key}"', "workflow")
