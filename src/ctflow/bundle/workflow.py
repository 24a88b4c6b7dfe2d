"""Whether the bundle's own evaluator and dataset use the parts that ctflow reads."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.config import Component, Config, ConfigValue, is_disabled, short
from ctflow.bundle.config.signatures import EVALUATOR
from ctflow.bundle.locate import WEIGHTS
from ctflow.bundle.postprocessing import is_the_same
from ctflow.bundle.vista3d import vista_evaluator, vista_signature
from ctflow.core.errors import BundleInvalid

_NETWORK = re.compile(r"@network_def(?!\w)")
_MENTIONED = re.compile(r"@(\w+)")
_WEIGHTS_FILE = re.compile(r"(?<![\w.-])[\w.-]+\.(?:pt|pth|ts|ckpt)(?!\w)")
_MOST_STEPS = 4  # between keys


@dataclass(frozen=True)
class Checkpoint:
    """Where a bundle's weights are.

    Attributes:
        file: Path inside the bundle.
        key: What its loader calls the network in the file; None if there is no loader.
    """

    file: str
    key: str | None = None


def checkpoint_from_config(config: Config) -> Checkpoint:
    """The weights that a configuration loads; models/model.pt if it does not say.

    Raises:
        BundleInvalid: Its loaders name several files, or one outside the bundle; the reason is "workflow".
    """
    return _checkpoint(config)


def read_workflow(config: Config) -> Checkpoint:
    """Reject a configuration whose evaluator or dataset uses other transforms, or another inferer or network.

    ctflow reads `preprocessing`, `network_def`, `inferer` and `postprocessing` by these names, and the weights that its
    CheckpointLoader names. If the file also wires them up, it must use these.

    Args:
        config: The bundle's configuration.

    Returns:
        The weights that it loads; models/model.pt if it does not say.

    Raises:
        BundleInvalid: It uses something else, or the evaluator changes the network's input or output; the reason is
            "workflow", "argument" or "value".
    """
    checkpoint = _checkpoint(config)
    if "dataset" in config and isinstance(config.raw("dataset").value, Mapping):
        dataset = ConfigValue("dataset#transform", config.raw("dataset").value.get("transform"))
        if dataset.value is not None and not is_the_same(config, dataset, "preprocessing"):
            raise _other(config, dataset, "preprocessing")
    if "evaluator" not in config or not isinstance(config.raw("evaluator").value, Mapping):
        return checkpoint
    vista = vista_evaluator(config, config.raw("evaluator"))
    evaluator = vista or Component(config, config.raw("evaluator"), "monai.engines")
    if vista is None and evaluator.target != "SupervisedEvaluator":
        raise evaluator.refused(
            "_target_", f"is {short(evaluator.target)}; ctflow implements SupervisedEvaluator", "target"
        )
    for key in ("inferer", "postprocessing"):
        if key not in evaluator.names:
            raise evaluator.refused(key, f'is missing; ctflow reads {key}: write "@{key}"', "workflow")
        if not is_the_same(config, evaluator.place(key), key):
            raise _other(config, evaluator.place(key), key)
    evaluator.demand_signature(EVALUATOR if vista is None else vista_signature(evaluator))
    network = evaluator.place("network")
    if not _is_network(config, network.value):
        raise _other(config, network, "network_def")
    return checkpoint


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


def _checkpoint(config: Config) -> Checkpoint:
    """The one file that the loaders name.

    Raises:
        BundleInvalid: They name several files, or one outside the bundle.
    """
    found: dict[str, Checkpoint] = {}
    for loader in _checkpoint_loaders(config):
        if _is_switched_off(config, loader):
            continue
        file = _file_of(config, ConfigValue(f"{loader.id}#load_path", loader.value.get("load_path")))
        keys = loader.value.get("load_dict")
        key = next(iter(keys)) if isinstance(keys, Mapping) and len(keys) == 1 else None
        if file is not None:
            found[file] = Checkpoint(file, key if isinstance(key, str) else None)
    if len(found) > 1:
        names = ", ".join(sorted(found)[:4])
        raise config.invalid("handlers", f"load several files ({names}); ctflow reads one", "workflow")
    return next(iter(found.values()), Checkpoint(WEIGHTS))


def _is_switched_off(config: Config, loader: ConfigValue) -> bool:
    switch = loader.value.get("_disabled_")
    if isinstance(switch, str) and switch.startswith("$"):
        try:
            value = config.resolved(ConfigValue(f"{loader.id}#_disabled_", switch)).value
        except BundleInvalid:
            return False
        return value not in (None, [], {}) and bool(value)
    return is_disabled(config, loader)


def _file_of(config: Config, place: ConfigValue) -> str | None:
    """The checkpoint's path inside the bundle; None if the configuration does not tell."""
    try:
        path = config.resolved(place).value
    except BundleInvalid as error:
        if error.reason != "expression":
            raise
        # Where the folder comes from elsewhere, the file's name may still be written there.
        names = {name for text in _texts(config, place.value) for name in _WEIGHTS_FILE.findall(text)}
        if not names or names == {posixpath.basename(WEIGHTS)}:
            return None
        problem = f"loads {short(min(names))} from a place that ctflow does not know ({error})"
        raise config.invalid(place.id, problem, "workflow") from None
    if path is None:
        return None
    if not isinstance(path, str):
        raise config.invalid(place.id, f"is {short(path)}, which names no file", "workflow")
    file = posixpath.normpath(path.replace("\\", "/"))
    if file == "." or any(len(part) > 255 for part in file.split("/")):
        raise config.invalid(place.id, f"is {short(path)}, which names no file", "workflow")
    if file.startswith("/") or file.split("/")[0] == "..":
        inside = [part for part in file.split("/") if part == "models"]
        if not inside:
            raise config.invalid(place.id, f"is {short(path)}, outside the bundle", "workflow")
        file = file[file.rindex("/models/") + 1 :] if "/models/" in file else WEIGHTS
    return file


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
