"""Variants of the demonstration bundle for tests: a coarser grid, and weights that mark something in every chest."""

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
    _write_untrained_weights(config["network_def"], folder / "models" / "model.pt")
    return folder


def _write_untrained_weights(definition: dict[str, object], path: Path) -> None:
    """Seeded weights whose bias is chosen so that a chest has a few marks: tests do not hang on the trained ones."""
    import torch  # noqa: PLC0415  # the tests of rooms without torch also come by here
    from monai.networks.nets import SwinUNETR  # noqa: PLC0415

    arguments = {key: value for key, value in definition.items() if key != "_target_"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = SwinUNETR(**arguments)
    with torch.no_grad():
        network.out.conv.conv.bias.copy_(torch.tensor([0.0, -2.7]))
    torch.save(network.state_dict(), path)
