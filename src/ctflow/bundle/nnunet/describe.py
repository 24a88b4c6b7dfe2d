"""What a trained-model folder of nnU-Net is, what of it is understood, and why the rest is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctflow.bundle.nnunet.read import read_nnunet
from ctflow.core.errors import CtflowError
from ctflow.core.model import ModelSpec
from ctflow.core.steps import ClipNormalize, ResampleSpline, ZScore
from ctflow.networks.build import network_from_model


def describe_nnunet(path: Path) -> dict[str, Any]:
    """Describe a folder, or a zip, for `ctflow inspect-model`.

    Args:
        path: As `find_bundle` found it.

    Returns:
        `kind`, `name`, `runs`; if it runs, `parts` (name of a part -> what it is) and `notes`; else `problem`, with the
        class, reason and message of the error that a run would end with.
    """
    found: dict[str, Any] = {"kind": "nnU-Net", "name": path.name}
    try:
        model = read_nnunet(path)
        network = network_from_model(model)
    except CtflowError as error:
        problem = {"type": type(error).__name__, "reason": error.reason, "message": str(error)}
        return {**found, "runs": False, "problem": problem}
    parts = _parts(model.spec)
    parts["weights"] = (
        f"{sum(each.numel() for each in network.parameters()) / 1e6:.1f} million, {model.weights_digest[:12]}"
    )
    return {**found, "name": model.spec.name, "runs": True, "parts": parts, "notes": list(model.spec.notes)}


def _parts(spec: ModelSpec) -> dict[str, str]:
    normalization = next((step for step in spec.preprocessing if isinstance(step, ClipNormalize | ZScore)), None)
    folds = "1 fold" if spec.network.members == 1 else f"{spec.network.members} folds averaged"
    (resample,) = (step for step in spec.preprocessing if isinstance(step, ResampleSpline))
    return {
        "trained as": spec.version,
        "network": f"{spec.network.name.rpartition('.')[2]}, {folds}",
        "grid": f"{_by(resample.spacing_mm)} mm",
        "windows": f"{_by(spec.roi)} voxels, half of each shared",
        "normalization": _words(normalization),
        "mirroring": "none" if not spec.mirror_axes else f"axes {', '.join(map(str, spec.mirror_axes))}",
        "segments": ", ".join(
            f"{each.label} ({each.type.meaning if each.coded else 'no codes'})" for each in spec.segments
        ),
    }


def _words(step: ClipNormalize | ZScore | None) -> str:
    if step is None:
        return "none"
    if isinstance(step, ZScore):
        return f"z-score of {'what is not 0' if step.masked else 'the volume'}"
    return f"clipped to {step.lower:g} to {step.upper:g} HU, mean {step.mean:g}, deviation {step.deviation:g}"


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)
