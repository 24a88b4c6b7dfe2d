"""Write the demonstration bundle at another width, with random weights and on the CT's own grid: what -m takes.

    python benchmarks/wide_bundle.py FOLDER [--feature-size 48] [--marked 0.0003] [--device cuda:0]

The article's network has feature_size 48. Nobody publishes weights of it for this model, and time does not depend on
them, but what is marked does count: the head's bias is chosen so that the share --marked of four windows of a phantom
is tumour. A window is 96 x 96 x 96 voxels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from ctflow.bundle.locate import demonstration_bundle
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import network_from_spec
from ctflow.phantom import phantom_from_seed

_HU = (-1000.0, 400.0)  # what the bundle scales to 0 and 1


def wide_config(folder: Path, feature_size: int) -> NetworkSpec:
    """Change the bundle's configuration; its network."""
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["network_def"]["feature_size"] = feature_size
    steps = config["preprocessing"]["transforms"]
    config["preprocessing"]["transforms"] = [
        step for step in steps if not (isinstance(step, dict) and step.get("_target_") == "Spacingd")
    ]
    path.write_text(json.dumps(config, indent=4) + "\n")
    about = folder / "configs" / "metadata.json"
    words = json.loads(about.read_text()) | {"name": f"ctflow benchmark network {feature_size}, random weights"}
    about.write_text(json.dumps(words, indent=4) + "\n")
    arguments = {key: value for key, value in config["network_def"].items() if key != "_target_"}
    return NetworkSpec("SwinUNETR", arguments)


@torch.inference_mode()
def random_weights(network: NetworkSpec, marked: float, device: str) -> dict[str, torch.Tensor]:
    """Weights whose network marks that share of a phantom's windows."""
    torch.manual_seed(0)
    module = network_from_spec(network).eval().to(device)
    volume = phantom_from_seed(1000, (96, 192, 192)).volume
    image = np.clip((volume.array.astype(np.float32) - _HU[0]) / (_HU[1] - _HU[0]), 0, 1)
    windows = (
        torch.from_numpy(image).unfold(1, 96, 96).unfold(2, 96, 96).permute(1, 2, 0, 3, 4).reshape(-1, 1, 96, 96, 96)
    )
    logits = torch.cat([module(window[None].to(device)) for window in windows])
    surplus = (logits[:, 1] - logits[:, 0]).flatten().cpu()
    least = surplus.kthvalue(int(surplus.numel() * (1 - marked))).values
    weights = {name: value.cpu().clone() for name, value in module.state_dict().items()}
    (bias,) = (name for name in weights if name.startswith("out.") and name.endswith("bias"))
    weights[bias][0] += least
    return weights


def main() -> int:
    """Write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--marked", type=float, default=0.0003)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    shutil.copytree(demonstration_bundle(), given.folder)
    network = wide_config(given.folder, given.feature_size)
    torch.save(random_weights(network, given.marked, given.device), given.folder / "models" / "model.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
