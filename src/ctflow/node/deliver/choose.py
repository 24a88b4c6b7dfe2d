"""Which destinations a result goes to: those whose conditions its measurements meet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctflow.node.deliver.send import COPY, WHOLE
from ctflow.node.deliver.webhook import DOCUMENT
from ctflow.node.journal.records import WorkerResult
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.when import When
from ctflow.node.work.worker import OBJECTS


@dataclass(frozen=True)
class ChosenDestinations:
    """What is sent where.

    Attributes:
        deliveries: Names of a destination and a file, in sending order.
        text: For the audit trail, where conditions decided; else empty.
    """

    deliveries: tuple[tuple[str, str], ...]
    text: str = ""


def choose_destinations(settings: ServiceSettings, results: Path, answer: WorkerResult) -> ChosenDestinations:
    """Choose the destinations of a result; every volume's SEG comes first, as the reports refer to them.

    Args:
        settings: Its destinations and webhooks.
        results: Folder of the results.
        answer: The result as the worker wrote it.
    """
    if answer.demonstration and not settings.allow_demonstration:
        return ChosenDestinations(())
    files = sorted((each.file for each in answer.objects), key=lambda file: OBJECTS.index(Path(file).name))
    wanted: list[tuple[str, When | None, Sequence[str]]] = [
        *(
            (each.name, each.when, files)
            for each in settings.destinations
            if not each.models or answer.run_model in each.models
        ),
        *((each.name, each.when, (DOCUMENT,)) for each in settings.webhooks),
    ]
    volumes = None if all(when is None for _, when, _ in wanted) else volumes_of_result(results / answer.folder)
    deliveries, to, not_to = [], [], []
    for name, when, each_file in wanted:
        why = _why_not(when, answer.model, volumes)
        if why:
            not_to.append(f"{name} ({why})")
            continue
        to.append(name)
        deliveries += [(name, file) for file in each_file]
    copies = [(COPY, WHOLE)] if settings.copy_to else []
    text = f"to {', '.join(to) or 'no destination'}" + (f"; not to {', '.join(not_to)}" if not_to else "")
    if any(when is not None for _, when, _ in wanted) and volumes is None:
        text += "; result.json cannot be read, so no condition was applied"
    return ChosenDestinations((*deliveries, *copies), text if any(when is not None for _, when, _ in wanted) else "")


def volumes_of_result(folder: Path) -> list[Mapping[str, Any]] | None:
    """The documents of a result, one for each volume of its series; None if they cannot be read."""
    try:
        document = json.loads((folder / "result.json").read_bytes())
        volumes = document["series"] if isinstance(document["series"], list) else [document]
        for volume in volumes:
            for segment in volume["segments"]:
                float(segment["volume_ml"]), int(segment["components"]), str(segment["label"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return volumes


def _why_not(when: When | None, model: str, volumes: Sequence[Mapping[str, Any]] | None) -> str:
    """Why a result does not meet conditions; empty if it does, or if they cannot be applied.

    A result that holds several volumes meets them if one of its volumes does.
    """
    if when is None or volumes is None:
        return ""
    if when.model and model not in when.model:
        return "another model"
    reasons = [_why_not_volume(when, volume["segments"]) for volume in volumes]
    return "" if not all(reasons) else reasons[0] if reasons else "no volume"


def _why_not_volume(when: When, segments: Sequence[Mapping[str, Any]]) -> str:
    counted = [each for each in segments if not when.segments or each["label"] in when.segments]
    volume_ml = sum(float(each["volume_ml"]) for each in counted)
    findings = sum(int(each["components"]) for each in counted)
    if when.volume_ml is not None and not when.volume_ml.min <= volume_ml <= when.volume_ml.max:
        return f"volume_ml is {volume_ml:.2f}"
    if when.findings is not None and not when.findings.min <= findings <= when.findings.max:
        return f"findings are {findings}"
    if when.segments and when.volume_ml is None and when.findings is None and not volume_ml:
        return "no such segment is marked"
    return ""
