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


def small_unet_bundle(folder: Path) -> Path:
    """A bundle whose windows take milliseconds: a small UNet on a grid of 6 mm, windows of 32^3."""
    bundle_with_spacing(folder, 6.0, 32)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["network_def"] = {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2],
        "norm": "instance",
    }  # fmt: skip
    path.write_text(json.dumps(config, indent=2))
    _write_untrained_unet({**config["network_def"]}, folder / "models" / "model.pt")
    return folder


def coarse_unet_bundle(folder: Path) -> Path:
    """A bundle of windows of 64^3 at 6 mm that marks some hundred voxels in every chest, as tumours would lie, at once.

    A SwinUNETR's window takes a hundred times as long, and most tests ask what is done with marks, not who made them.
    """
    small_unet_bundle(folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["inferer"]["roi_size"] = [64] * 3
    path.write_text(json.dumps(config, indent=2))
    _write_smooth_unet({**config["network_def"]}, folder / "models" / "model.pt")
    return folder


def _write_smooth_unet(definition: dict[str, object], path: Path) -> None:
    """Kernels of one sign smooth, so that marks hang together; the bias was chosen for a few of them."""
    import torch  # noqa: PLC0415
    from monai.networks.nets import UNet  # noqa: PLC0415

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = UNet(**{key: value for key, value in definition.items() if key != "_target_"})
    weights = {
        key: value.abs() * value.mean((2, 3, 4), keepdim=True).sign() if value.ndim == 5 else value
        for key, value in network.state_dict().items()
    }
    weights["model.2.conv.bias"] = torch.tensor([0.0, -9.0])
    torch.save(weights, path)


def _write_untrained_unet(definition: dict[str, object], path: Path) -> None:
    import torch  # noqa: PLC0415
    from monai.networks.nets import UNet  # noqa: PLC0415

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = UNet(**{key: value for key, value in definition.items() if key != "_target_"})
    torch.save(network.state_dict(), path)


def _write_untrained_weights(definition: dict[str, object], path: Path) -> None:
    """Seeded weights whose bias is chosen so that a chest has a few marks: tests do not hang on the trained ones."""
    import torch  # noqa: PLC0415  # the tests of packages without torch also come by here
    from monai.networks.nets import SwinUNETR  # noqa: PLC0415

    arguments = {key: value for key, value in definition.items() if key != "_target_"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = SwinUNETR(**arguments)
    with torch.no_grad():
        network.out.conv.conv.bias.copy_(torch.tensor([0.0, -2.7]))
    torch.save(network.state_dict(), path)
