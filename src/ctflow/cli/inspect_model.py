"""What `ctflow inspect-model` shows: what a model is, which of its parts ctflow understands, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctflow.bundle.config import Config
from ctflow.bundle.inferer import sliding_from_config
from ctflow.bundle.locate import configuration_files, find_bundle, is_of_nnunet
from ctflow.bundle.network import network_from_config
from ctflow.bundle.nnunet.describe import describe_nnunet
from ctflow.bundle.postprocessing import postprocessing_from_config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.bundle.read import read_bundle, read_config
from ctflow.bundle.workflow import read_workflow
from ctflow.core.errors import CtflowError
from ctflow.networks.own_code import code_of_folder

_LONGEST = 200


def inspect_model(path: Path, configuration: str | None = None, *, allow_code: bool = False) -> dict[str, Any]:
    """Look at every part of a model by itself, so that one that is not understood hides no other.

    Args:
        path: As `-m`.
        configuration: As `--config`.
        allow_code: As `--allow-code`.

    Returns:
        {"kind", "name", "runs": whether ctflow runs it, "parts": [{"part", "understood", "what", "reason"}]}.

    Raises:
        BundleInvalid: There is no model.
    """
    found = find_bundle(path)
    if is_of_nnunet(found):
        return _of_nnunet(found)
    parts = _parts_of_bundle(found, configuration, allow_code=allow_code)
    parts.append(_part("model with its weights", lambda: _whole(found, configuration, allow_code=allow_code)))
    runs = all(part["understood"] for part in parts)
    return {"kind": "MONAI bundle", "name": found.name, "runs": runs, "parts": parts}


def _of_nnunet(found: Path) -> dict[str, Any]:
    described = describe_nnunet(found)
    parts = [
        {"part": name, "understood": True, "what": what, "reason": None}
        for name, what in [
            *described.get("parts", {}).items(),
            *(("note", note) for note in described.get("notes", ())),
        ]
    ]
    if "problem" in described:
        problem = described["problem"]
        parts = [{"part": "model", "understood": False, "what": problem["message"], "reason": problem["reason"]}]
    kind = "zip of a model that nnU-Net v2 trained" if found.is_file() else "model that nnU-Net v2 trained"
    return {"kind": kind, "name": described["name"], "runs": described["runs"], "parts": parts}


def _parts_of_bundle(found: Path, configuration: str | None, *, allow_code: bool) -> list[dict[str, Any]]:
    parts = [_part("configuration", lambda: ", ".join(configuration_files(found, configuration)))]
    readers: dict[str, Callable[[Config], Any]] = {
        "network_def": lambda config: network_from_config(config, code_of_folder(found) if allow_code else None)[0],
        "preprocessing": steps_from_config,
        "inferer": sliding_from_config,
        "postprocessing": postprocessing_from_config,
        "evaluator, dataset, checkpoint": read_workflow,
    }
    for name, reader in readers.items():
        # Each with its own reading of the files, as one reading bounds all expressions together.
        parts.append(_part(name, lambda reader=reader: _fields(reader(read_config(found, configuration)))))  # type: ignore[misc]
    return parts


def _whole(found: Path, configuration: str | None, *, allow_code: bool) -> str:
    model = read_bundle(found, configuration, allow_code=allow_code)
    names = ", ".join(segment.label for segment in model.spec.segments[:6])
    more = f" and {len(model.spec.segments) - 6} more" if len(model.spec.segments) > 6 else ""
    return f"{model.spec.name} {model.spec.version}, weights {model.weights_digest[:12]}, marks {names}{more}"


def _part(name: str, read: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"part": name, "understood": True, "what": _short(read()), "reason": None}
    except CtflowError as error:
        return {"part": name, "understood": False, "what": str(error), "reason": error.reason}


def _fields(value: Any) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(_fields, value)) or "nothing"
    if not hasattr(value, "__dataclass_fields__"):
        return str(value)
    given = ", ".join(f"{each.name}={getattr(value, each.name)!r}" for each in fields(value))
    return f"{type(value).__name__}({given})"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
