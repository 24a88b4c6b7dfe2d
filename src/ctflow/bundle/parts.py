"""What a bundle does around its network: as ctflow's own steps or, if its code may be executed, by MONAI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctflow.bundle.config import Config
from ctflow.bundle.config.ensemble import RUN_BY_MONAI, is_ensemble
from ctflow.bundle.inferer import Sliding, sliding_from_config
from ctflow.bundle.locate import METADATA
from ctflow.bundle.network import note_of_code
from ctflow.bundle.postprocessing import Postprocessing, postprocessing_from_config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.bundle.workflow import read_workflow
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import OwnCode, OwnWorkflow
from ctflow.core.steps import Step
from ctflow.networks.own_code import code_of_folder, packages_of

_READERS: Mapping[str, Callable[[Config], Any]] = {
    "preprocessing": steps_from_config,
    "inferer": sliding_from_config,
    "postprocessing": postprocessing_from_config,
    "evaluator": read_workflow,
}
_OF_CODE = frozenset({"target", "expression", "argument"})  # what MONAI may know and ctflow does not
_LIBRARIES = frozenset({"monai", "torch"})
_WHOLE_VOLUME = Sliding((0, 0, 0), 0.0, "constant", 1)


@dataclass(frozen=True)
class BundleParts:
    """Preprocessing, windows and post-processing; with a workflow, transforms are MONAI's, and these are empty."""

    steps: tuple[Step, ...]
    sliding: Sliding
    after: Postprocessing
    workflow: OwnWorkflow | None = None
    notes: tuple[str, ...] = ()


def read_parts(config: Config, code: OwnCode | None) -> BundleParts:
    """Read what is around the network.

    Args:
        config: The bundle's configuration.
        code: The bundle's own code, if it may be executed: then MONAI runs what ctflow does not understand.

    Raises:
        BundleInvalid: Something is not understood and may not be executed; or its code is not in the bundle's folder.
    """
    found: dict[str, Any] = {}
    problems: dict[str, BundleInvalid] = {}
    for name, reader in _READERS.items():
        try:
            found[name] = reader(config)
        except BundleInvalid as error:
            if code is None or is_ensemble(config):
                raise _advised(error, may_run=not is_ensemble(config)) from None
            problems[name] = error
    if code is None or not problems:
        return BundleParts(found["preprocessing"], found["inferer"], found["postprocessing"])
    _demand_own_code(config, Path(code.folder))
    evaluates = "evaluator" in problems
    files = (*config.file.split(" + "), METADATA)
    whole = code_of_folder(Path(code.folder), files)
    workflow = OwnWorkflow(config.document, files, whole, infers="inferer" in problems, evaluates=evaluates)
    sliding = _WHOLE_VOLUME if workflow.infers or evaluates else found["inferer"]
    notes = tuple(f"run by MONAI, as --allow-code permits: {error}" for error in problems.values())
    what = "its transforms" + (" and evaluator" if evaluates else " and inferer" if workflow.infers else "")
    return BundleParts((), sliding, Postprocessing(restored="labels"), workflow, (note_of_code(what, whole), *notes))


def _advised(error: BundleInvalid, *, may_run: bool) -> BundleInvalid:
    if error.reason not in _OF_CODE or RUN_BY_MONAI in str(error):
        return error
    advice = "--allow-code lets MONAI run it, with all that the bundle's code may do to this computer"
    if not may_run:
        advice = f"with an ensemble --allow-code does not change that. {RUN_BY_MONAI}"
    return BundleInvalid(f"{error}; {advice}", reason=error.reason)


def _demand_own_code(config: Config, folder: Path) -> None:
    """Require that classes which the workflow names are MONAI's, torch's or of the bundle's folder.

    Code from elsewhere would not be part of the model's identity.
    """
    allowed = _LIBRARIES | packages_of(folder)
    left: list[Any] = [config.raw(key).value for key in _READERS if key in config]
    seen: set[str] = set()
    while left:
        value = left.pop()
        if isinstance(value, dict):
            target = value.get("_target_")
            if isinstance(target, str) and "." in target and target.partition(".")[0] not in allowed:
                raise config.invalid(
                    "_target_", f"is {target[:80]!r}, which is neither MONAI's nor in the bundle's folder", "own-code"
                )
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and value.startswith("@"):
            key = value[1:].replace("#", "::").partition("::")[0]
            if key in config and key not in seen:
                seen.add(key)
                left.append(config.raw(key).value)
