"""Whether the bundle's own evaluator and dataset use the parts that ctflow reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ctflow.bundle.config import Component, Config, ConfigValue, is_disabled, short
from ctflow.bundle.locate import WEIGHTS
from ctflow.bundle.postprocessing import is_the_same
from ctflow.bundle.signatures import EVALUATOR

_NETWORK = re.compile(r"@network_def(?!\w)")
_MENTIONED = re.compile(r"@(\w+)")
_WEIGHTS_FILE = re.compile(r"[\w.-]+\.(?:pt|pth|ts|ckpt)(?!\w)")
_MOST_STEPS = 4  # between keys


def check_workflow(config: Config) -> None:
    """Reject a configuration whose evaluator or dataset uses other transforms, or another inferer or network.

    ctflow reads `preprocessing`, `network_def`, `inferer` and `postprocessing` by these names, and models/model.pt.
    If the file also wires them up, it must use these.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: It uses something else, or the evaluator changes the network's input or output; the reason is
            "workflow", "argument" or "value".
    """
    for loader in _checkpoint_loaders(config):
        _check_weights(config, loader)
    if "dataset" in config and isinstance(config.raw("dataset").value, Mapping):
        dataset = ConfigValue("dataset#transform", config.raw("dataset").value.get("transform"))
        if dataset.value is not None and not is_the_same(config, dataset, "preprocessing"):
            raise _other(config, dataset, "preprocessing")
    if "evaluator" not in config or not isinstance(config.raw("evaluator").value, Mapping):
        return
    evaluator = Component(config, config.raw("evaluator"), "monai.engines")
    if evaluator.target != "SupervisedEvaluator":
        raise evaluator.refused(
            "_target_", f"is {short(evaluator.target)}; ctflow implements SupervisedEvaluator", "target"
        )
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
    for _ in range(_MOST_STEPS):
        if isinstance(value, str) and _NETWORK.search(value):
            return True
        if not isinstance(value, str) or not value.startswith("@") or value[1:] not in config:
            return False
        value = config.raw(value[1:]).value
    return False


def _checkpoint_loaders(config: Config) -> Iterator[ConfigValue]:
    """Each CheckpointLoader at the top level, in `handlers` or among the evaluator's handlers."""
    lists = [config.raw("handlers")] if "handlers" in config else []
    if "evaluator" in config and isinstance(config.raw("evaluator").value, Mapping):
        lists.append(ConfigValue("evaluator#val_handlers", config.raw("evaluator").value.get("val_handlers")))
    places = [config.raw(key) for key in config.keys]
    for each in lists:
        if isinstance(each.value, list):
            places += [ConfigValue(f"{each.id}#{number}", item) for number, item in enumerate(each.value)]
    for place in places:
        target = place.value.get("_target_") if isinstance(place.value, Mapping) else None
        if isinstance(target, str) and target.rpartition(".")[2] == "CheckpointLoader":
            yield place


def _check_weights(config: Config, loader: ConfigValue) -> None:
    """Reject a loader whose path names a file other than ctflow reads; a path without a file name passes."""
    switch = loader.value.get("_disabled_")
    if not (isinstance(switch, str) and switch.startswith("$")) and is_disabled(config, loader):
        return
    path = loader.value.get("load_path")
    names = {name for text in _texts(config, path) for name in _WEIGHTS_FILE.findall(text)}
    wanted = WEIGHTS.rpartition("/")[2]
    if names and wanted not in names:
        problem = f"loads {short(min(names))}; ctflow reads {WEIGHTS}: rename the weights to that"
        raise config.invalid(f"{loader.id}#load_path", problem, "workflow")


def _texts(config: Config, value: Any) -> Iterator[str]:
    """A text and those of the top-level keys that it mentions, even in an expression, which is not evaluated."""
    seen: set[str] = set()
    left = [value]
    while left and len(seen) < _MOST_STEPS * _MOST_STEPS:
        text = left.pop()
        if not isinstance(text, str):
            continue
        yield text
        for key in _MENTIONED.findall(text):
            if key in config and key not in seen:
                seen.add(key)
                left.append(config.raw(key).value)


def _other(config: Config, place: ConfigValue, key: str) -> Exception:
    return config.invalid(place.id, f'is {short(place.value)}; ctflow reads {key}: write "@{key}"', "workflow")
