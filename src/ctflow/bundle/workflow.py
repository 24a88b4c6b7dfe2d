"""Whether the bundle's own evaluator and dataset use the parts that ctflow reads."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.config import Component, Config, ConfigValue, is_disabled, short
from ctflow.bundle.config.ensemble import EVALUATOR as ENSEMBLE
from ctflow.bundle.config.ensemble import Ensemble, ensemble_from_config, member_at
from ctflow.bundle.config.signatures import ENSEMBLE_EVALUATOR, EVALUATOR
from ctflow.bundle.locate import WEIGHTS
from ctflow.bundle.postprocessing import is_the_same
from ctflow.bundle.vista3d import vista_evaluator, vista_signature
from ctflow.core.errors import BundleInvalid

_NETWORK = re.compile(r"@network_def(?!\w)")
_MENTIONED = re.compile(r"@(\w+)")
_WEIGHTS_FILE = re.compile(r"(?<![\w.-])[\w.-]+\.(?:pt|pth|ts|ckpt)(?!\w)")
_MOST_STEPS = 4  # between keys
_SIGNATURES = {"SupervisedEvaluator": EVALUATOR, ENSEMBLE: ENSEMBLE_EVALUATOR}


@dataclass(frozen=True)
class Checkpoint:
    """Where a bundle's weights are.

    Attributes:
        file: Path inside the bundle.
        key: What its loader calls the network in the file; None if there is no loader.
        is_shared: Whether its loader takes several networks from the file, which then must have that key.
    """

    file: str
    key: str | None = None
    is_shared: bool = False


def checkpoints_from_config(config: Config) -> tuple[Checkpoint, ...]:
    """The weights that a configuration loads, of each network; models/model.pt if it does not say.

    Raises:
        BundleInvalid: Its loaders name several files for a network, one outside the bundle, or none for a network of an
            ensemble; the reason is "workflow".
    """
    ensemble = ensemble_from_config(config)
    return (_checkpoint(config),) if ensemble is None else _checkpoints_of(config, ensemble)


def read_workflow(config: Config) -> tuple[Checkpoint, ...]:
    """Reject a configuration whose evaluator or dataset uses other transforms, or another inferer or network.

    ctflow reads `preprocessing`, `network_def`, `inferer` and `postprocessing` by these names, and the weights that its
    CheckpointLoader names. If the file also wires them up, it must use these. An ensemble's evaluator names its
    networks itself.

    Args:
        config: The bundle's configuration.

    Returns:
        The weights that it loads, of each network; models/model.pt if it does not say.

    Raises:
        BundleInvalid: It uses something else, or the evaluator changes the network's input or output; the reason is
            "workflow", "argument" or "value".
    """
    checkpoints = checkpoints_from_config(config)
    if "dataset" in config and isinstance(config.raw("dataset").value, Mapping):
        dataset = ConfigValue("dataset#transform", config.raw("dataset").value.get("transform"))
        if dataset.value is not None and not is_the_same(config, dataset, "preprocessing"):
            raise _other(config, dataset, "preprocessing")
    if "evaluator" not in config or not isinstance(config.raw("evaluator").value, Mapping):
        return checkpoints
    vista = vista_evaluator(config, config.raw("evaluator"))
    evaluator = vista or Component(config, config.raw("evaluator"), "monai.engines")
    if vista is None and evaluator.target not in _SIGNATURES:
        known = " and ".join(_SIGNATURES)
        raise evaluator.refused("_target_", f"is {short(evaluator.target)}; ctflow implements {known}", "target")
    for key in ("inferer", "postprocessing"):
        if key not in evaluator.names:
            raise evaluator.refused(key, f'is missing; ctflow reads {key}: write "@{key}"', "workflow")
        if not is_the_same(config, evaluator.place(key), key):
            raise _other(config, evaluator.place(key), key)
    evaluator.demand_signature(_SIGNATURES[evaluator.target] if vista is None else vista_signature(evaluator))
    if evaluator.target != ENSEMBLE:
        network = evaluator.place("network")
        if not _is_network(config, network.value):
            raise _other(config, network, "network_def")
    return checkpoints


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
    for loader, file in _loaded(config):
        keys = loader.value.get("load_dict")
        key = next(iter(keys)) if isinstance(keys, Mapping) and len(keys) == 1 else None
        if file is not None:
            found[file] = Checkpoint(file, key if isinstance(key, str) else None)
    if len(found) > 1:
        names = ", ".join(sorted(found)[:4])
        raise config.invalid("handlers", f"load several files ({names}); ctflow reads one", "workflow")
    return next(iter(found.values()), Checkpoint(WEIGHTS))


def _checkpoints_of(config: Config, ensemble: Ensemble) -> tuple[Checkpoint, ...]:
    """The file of each network of an ensemble.

    Raises:
        BundleInvalid: A network has none or several, or something else is loaded.
    """
    found: dict[str, Checkpoint] = {}
    numbers = {member.made_at: member.place for member in ensemble.members}
    for loader, file in _loaded(config):
        place = config.resolved(ConfigValue(f"{loader.id}#load_dict", loader.value.get("load_dict")))
        if not isinstance(place.value, Mapping) or not place.value or file is None:
            lacking = "load_path names no file" if file is None else "load_dict names no network"
            raise config.invalid(loader.id, f"loads weights of an ensemble, but its {lacking}", "workflow")
        for key, network in place.value.items():
            at = ConfigValue(f"{place.id}#{key}", network)
            made_at = member_at(config, at).made_at
            if made_at not in numbers or made_at in found:
                problem = "has weights of another loader, too" if made_at in found else "is not in evaluator#networks"
                raise config.invalid(at.id, f"is {short(network)}, which {problem}", "workflow")
            found[made_at] = Checkpoint(file, str(key), is_shared=len(place.value) > 1)
    for made_at, place_id in numbers.items():
        if made_at not in found:
            raise config.invalid(place_id, "has no weights: no CheckpointLoader's load_dict names it", "workflow")
    return tuple(found[made_at] for made_at in numbers)


def _loaded(config: Config) -> Iterator[tuple[ConfigValue, str | None]]:
    """Each CheckpointLoader that is switched on, and the file that it names."""
    for loader in _checkpoint_loaders(config):
        if not _is_switched_off(config, loader):
            yield loader, _file_of(config, ConfigValue(f"{loader.id}#load_path", loader.value.get("load_path")))


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
