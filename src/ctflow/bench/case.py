"""The phantom on which configurations are compared: drawn once, and kept next to its measurements."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.core.errors import SettingsInvalid
from ctflow.core.package import digest_of_package
from ctflow.core.volume import Size3
from ctflow.phantom import check_phantom_shape, phantom_from_seed

TUMOURS = 4
_DRAWING = ("ctflow.phantom", "ctflow.phantom.body", "ctflow.phantom.scene")  # the code that a phantom depends on


def check_shape(shape: Size3) -> None:
    """Check that a phantom can have a shape.

    Raises:
        SettingsInvalid: It is too small or too large.
    """
    try:
        check_phantom_shape(shape)
    except ValueError as error:
        raise SettingsInvalid(f"--shape: {error}", reason="invalid-value") from error


def draw_case(folder: Path, *, seed: int, shape: Size3, draw: bool) -> dict[str, Any]:
    """The phantom, in the folder for the configurations, and its description; drawn unless the same one is there."""
    code = "".join(digest_of_package(name) for name in _DRAWING)
    recipe = {"seed": seed, "shape": list(shape), "tumours": TUMOURS, "code": code}
    kept = _kept_case(folder, recipe)
    if kept is not None:
        return kept
    if not draw:
        raise SettingsInvalid(
            "--only-kept: no comparison of this phantom is kept there; name its folder, --shape and --seed",
            reason="nothing-kept",
        )
    phantom = phantom_from_seed(seed, shape, tumours=TUMOURS)
    (folder / "case.json").unlink(missing_ok=True)
    np.savez(folder / "case.npz", hu=phantom.volume.array, affine_mm=phantom.volume.geometry.affine_mm)
    truth = np.packbits(phantom.labels)
    np.save(folder / "truth.npy", truth)
    case = {
        "digest": _digest_of(phantom.volume.array),
        "seed": seed,
        "shape": list(shape),
        "spacing_mm": [round(mm, 4) for mm in phantom.volume.geometry.spacing_mm],
        "tumours": len(phantom.tumours),
    }
    document = {"recipe": recipe, "case": case, "truth": _digest_of(truth)}
    (folder / "case.json").write_text(json.dumps(document), encoding="utf-8")
    return case


def _kept_case(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier run's phantom, if it has this recipe and is whole; drawing it anew takes half a minute."""
    try:
        document = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        with (folder / "case.npz").open("rb") as file, np.load(file) as arrays:
            digest = _digest_of(arrays["hu"])
        case: dict[str, Any] = document["case"]
        whole = case["digest"] == digest and document["truth"] == _digest_of(np.load(folder / "truth.npy"))
        return case if whole and document["recipe"] == recipe else None
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile):  # its write was interrupted
        return None


def _digest_of(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
