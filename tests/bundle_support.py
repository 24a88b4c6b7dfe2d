"""Variants of the demonstration bundle for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def bundle_with_spacing(folder: Path, spacing_mm: float, roi: int) -> Path:
    """A copy of the demonstration bundle that works on a coarser grid, so that a test takes seconds."""
    shutil.copytree(REPOSITORY / "bundle", folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    for transform in config["preprocessing"]["transforms"]:
        if isinstance(transform, dict) and transform["_target_"].endswith("Spacingd"):
            transform["pixdim"] = [spacing_mm] * 3
    config["inferer"]["roi_size"] = [roi] * 3
    path.write_text(json.dumps(config, indent=2))
    return folder
