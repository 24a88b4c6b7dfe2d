"""Count the tumours that networks find, and their false findings, in cases that they were not trained on.

    python training/validate.py DIR MODEL.pt [MODEL.pt ...] [--json FILE]

DIR contains <name>/{image,label}.nii as training/make_set.py writes them. Volumes are prepared as in training
(configs/train.json: orientation, spacing, intensity) and computed in the windows of configs/inference.json. The output
has a line per network and case and one with the sums; the last line names the network with the best score.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_set import EXCLUDED, MOST_TUMOURS
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose
from scipy import ndimage

BUNDLE = Path(__file__).parents[1] / "bundle"
LEAST_ML = 0.2
_EVERYWHERE = np.ones((3, 3, 3), bool)


def read_configs() -> tuple[Compose, SlidingWindowInferer, torch.nn.Module, torch.device]:
    """The bundle's own transforms, windows and network."""
    training = ConfigParser()
    training.read_config(str(BUNDLE / "configs" / "train.json"))
    steps = [training.get_parsed_content(f"deterministic_transforms#{n}") for n in range(6)]
    inference = ConfigParser()
    inference.read_config(str(BUNDLE / "configs" / "inference.json"))
    inference["inferer"]["sw_batch_size"] = 8
    device = inference.get_parsed_content("device")
    return Compose(steps), inference.get_parsed_content("inferer"), inference.get_parsed_content("network"), device


def judge(marked: np.ndarray, labels: np.ndarray, voxel_ml: float) -> dict[str, Any]:
    """Score one case.

    Args:
        marked: (D, H, W) bool.
        labels: (D, H, W) uint8, as described in training/make_set.py.
        voxel_ml: Volume of a voxel.

    Returns:
        tumours and found: counts; dice: mean Dice of each tumour with the components that touch it; false: components
        of at least `LEAST_ML` that touch none; false_ml: total volume of components that touch none.
    """
    truth = (labels > 0) & (labels <= MOST_TUMOURS)
    parts, count = ndimage.label(marked & (labels != EXCLUDED), _EVERYWHERE)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    dice = []
    for number in np.unique(labels[truth]):
        tumour = labels == number
        touching = np.setdiff1d(np.unique(parts[tumour]), [0])
        found = np.isin(parts, touching) & (~truth | tumour)
        dice.append(2 * (found & tumour).sum() / max(1, found.sum() + tumour.sum()))
    invented = np.setdiff1d(np.arange(1, count + 1), np.unique(parts[truth]))
    false_ml = sizes[invented] * voxel_ml
    return {
        "tumours": len(dice),
        "found": int(np.count_nonzero(dice)),
        "dice": float(np.mean(dice)) if dice else None,
        "false": int((false_ml >= LEAST_ML).sum()),
        "false_ml": float(false_ml.sum()),
    }


def validate(model: Path, cases: dict[str, Any], configs: Any) -> dict[str, Any]:
    """Score every case with one network."""
    _, inferer, network, device = configs
    network.load_state_dict(torch.load(model, map_location=device, weights_only=True))
    network.eval()
    results = {}
    for name, case in cases.items():
        window = case["image"][None].to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = inferer(window, network)
        marked = (logits[0, 1] > logits[0, 0]).cpu().numpy()
        results[name] = judge(marked, case["label"][0].numpy().astype(np.uint8), 1.5**3 / 1000)
    return results


def total(results: dict[str, Any]) -> dict[str, float]:
    """The sums over cases, and one score: mean Dice of all tumours minus a twentieth per false finding and case."""
    tumours = sum(case["tumours"] for case in results.values())
    dice = sum(case["dice"] * case["tumours"] for case in results.values() if case["dice"] is not None)
    false = [case["false"] for case in results.values()]
    summed = {
        "tumours": tumours,
        "found": sum(case["found"] for case in results.values()),
        "dice": dice / max(1, tumours),
        "false_a_case": float(np.mean(false)),
        "worst_false": max(false),
        "false_ml_a_case": float(np.mean([case["false_ml"] for case in results.values()])),
    }
    return {**summed, "score": summed["dice"] - 0.05 * summed["false_a_case"]}


def main() -> None:
    """Score each network, print, name the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    if missing := [str(model) for model in words.models if not model.is_file()]:
        parser.error(f"there is no {', no '.join(missing)}")
    configs = read_configs()
    names = sorted(path.parent.name for path in words.folder.glob("*/image.nii"))
    if not names:
        parser.error(f"{words.folder} holds no <name>/image.nii: make it with training/make_set.py")
    paths = {name: words.folder / name for name in names}
    cases = {n: configs[0]({"image": str(p / "image.nii"), "label": str(p / "label.nii")}) for n, p in paths.items()}
    document: dict[str, Any] = {}
    for model in words.models:
        results = validate(model, cases, configs)
        document[str(model)] = {"total": total(results), "cases": results}
        print(
            model,
            json.dumps({key: round(value, 3) for key, value in document[str(model)]["total"].items()}),
            flush=True,
        )
        for name, case in results.items():
            print("  ", name, json.dumps({k: round(v, 3) if v else v for k, v in case.items()}))
    if words.json:
        words.json.write_text(json.dumps(document, indent=1) + "\n")
    print("best:", max(document, key=lambda model: document[model]["total"]["score"]))


if __name__ == "__main__":
    main()
