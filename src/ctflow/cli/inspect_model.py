"""What `ctflow inspect-model` shows: what a model is, which of its parts ctflow understands, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ctflow.bundle.config import Config
from ctflow.bundle.inferer import Sliding, sliding_from_config
from ctflow.bundle.locate import configuration_files, find_bundle, is_of_nnunet
from ctflow.bundle.network import network_from_config
from ctflow.bundle.nnunet.describe import describe_nnunet
from ctflow.bundle.postprocessing import Postprocessing, postprocessing_from_config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.bundle.read import read_bundle, read_config
from ctflow.bundle.workflow import Checkpoint, read_workflow
from ctflow.core.errors import CtflowError
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import network_from_model
from ctflow.networks.own_code import code_of_folder

_LONGEST = 300
_NAMES = {Sliding: "windows", Postprocessing: "labels", Checkpoint: "weights"}


def inspect_model(path: Path, configuration: str | None = None, *, allow_code: bool = False) -> dict[str, Any]:
    """Look at every part of a model by itself, so that one that is not understood hides no other.

    Args:
        path: As `-m`.
        configuration: As `--config`.
        allow_code: As `--allow-code`.

    Returns:
        {"kind", "name", "runs": whether ctflow runs it, "parts": [{"part", "understood", "what", "reason"}], "notes"}.

    Raises:
        BundleInvalid: There is no model.
    """
    found = find_bundle(path)
    if is_of_nnunet(found):
        return _of_nnunet(found)
    notes: list[str] = []
    parts = [_part("configuration", lambda: _configuration(found, configuration))]
    if parts[0]["understood"]:  # else all other parts would repeat what is wrong with it
        parts += _parts_of_bundle(found, configuration, allow_code=allow_code)
        parts.append(_part("model", lambda: _whole(found, configuration, notes, allow_code=allow_code)))
    if allow_code and parts[-1]["understood"]:
        for part in parts:
            if not part["understood"]:
                part |= {
                    "understood": True,
                    "reason": None,
                    "what": f"run by MONAI, as --allow-code permits: {part['what']}",
                }
    runs = all(part["understood"] for part in parts)
    return {"kind": "MONAI bundle", "name": found.resolve().name, "runs": runs, "parts": _once(parts), "notes": notes}


def _configuration(found: Path, configuration: str | None) -> str:
    read_config(found, configuration)
    return ", ".join(configuration_files(found, configuration))


def _once(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A problem that several parts meet is told once, with the advice that a later one adds; that names the first."""
    told: list[dict[str, Any]] = []
    for part in parts:
        if not part["understood"]:
            known = next((each for each in told if part["what"].startswith(each["what"])), None)
            if known is None:
                told.append(part)
            else:
                known["what"], part["what"] = part["what"], f"see {known['part']}"
    return parts


def _of_nnunet(found: Path) -> dict[str, Any]:
    described = describe_nnunet(found)
    parts = [
        {"part": name, "understood": True, "what": what, "reason": None}
        for name, what in described.get("parts", {}).items()
    ]
    if "problem" in described:
        problem = described["problem"]
        parts = [{"part": "model", "understood": False, "what": problem["message"], "reason": problem["reason"]}]
    kind = "zip of a model that nnU-Net v2 trained" if found.is_file() else "model that nnU-Net v2 trained"
    notes = described.get("notes", [])
    return {"kind": kind, "name": described["name"], "runs": described["runs"], "parts": parts, "notes": notes}


def _parts_of_bundle(found: Path, configuration: str | None, *, allow_code: bool) -> list[dict[str, Any]]:
    parts = []
    readers: dict[str, Callable[[Config], Any]] = {
        "network_def": lambda config: network_from_config(config, code_of_folder(found) if allow_code else None)[0],
        "preprocessing": steps_from_config,
        "inferer": sliding_from_config,
        "postprocessing": postprocessing_from_config,
        "evaluator, dataset, checkpoint": read_workflow,
    }
    for name, reader in readers.items():
        # Each with its own reading of the files, as one reading bounds all expressions together.
        parts.append(_part(name, lambda reader=reader: _words(reader(read_config(found, configuration)))))  # type: ignore[misc]
    return parts


def _whole(found: Path, configuration: str | None, notes: list[str], *, allow_code: bool) -> str:
    model = read_bundle(found, configuration, allow_code=allow_code)
    network_from_model(model)
    notes += model.spec.notes
    names = ", ".join(segment.label for segment in model.spec.segments[:6])
    more = f" and {len(model.spec.segments) - 6} more" if len(model.spec.segments) > 6 else ""
    return f"{model.spec.name} {model.spec.version}, weights {model.weights_digest[:12]}, marks {names}{more}"


def _part(name: str, read: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"part": name, "understood": True, "what": _short(read()), "reason": None}
    except CtflowError as error:
        return {"part": name, "understood": False, "what": str(error), "reason": error.reason}


def _words(value: Any) -> str:
    """A part as "Name (argument value, argument value)"; arguments that have their default are left out."""
    if isinstance(value, NetworkSpec):
        several = f"{value.members} x " if value.members > 1 else ""
        return _named(f"{several}{value.name.rpartition('.')[2]}", value.arguments)
    if is_dataclass(value) and not isinstance(value, type):
        given = ((each, getattr(value, each.name)) for each in fields(value))
        shown = {each.name: one for each, one in given if one not in (each.default, [])}
        return _named(_NAMES.get(type(value), type(value).__name__), shown)
    if isinstance(value, Mapping):
        return _named("", value)
    if isinstance(value, list | tuple):
        between = "; " if any(map(is_dataclass, value)) else " x " if all(map(_is_number, value)) else ", "
        return between.join(map(_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(name: str, arguments: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in arguments.items())
    return f"{name} ({listed})".strip() if listed else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
