"""Make a bundle for benchmarks from a wider network that was trained at the phantoms' own spacing.

    python training/make_wide_bundle.py OUT --feature-size 48 --weights model.pt

The bundle is a copy of the demonstration bundle with another feature_size, without resampling, with the given weights,
and with a name that says so. It is read back and its network is built before OUT is created.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctflow.bundle.locate import INFERENCE, METADATA, WEIGHTS, demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.atomic import temporary_folder
from ctflow.networks.build import network_from_model

TRAIN = "configs/train.json"
RESAMPLING = "Spacingd"
BATCH = 8  # windows per call, to keep an H200 busy
_WORDS = {
    "name": "ctflow benchmark network",
    "version": "0.1.0",
    "changelog": {"0.1.0": "trained on synthetic chests for minutes"},
    "task": "Benchmark of tumour segmentation in synthetic chest CT",
    "data_source": "ctflow phantoms",
    "intended_use": "Benchmarks of the software on ctflow's phantoms, research only. Not a medical device; not for "
    "diagnosis or any clinical use. The weights were trained for minutes on synthetic chests and have not been "
    "validated.",
}
_DESCRIPTION = (
    "A SwinUNETR of feature_size {feature_size}, trained for minutes on a few synthetic chests at their own spacing, "
    "without resampling. It exists so that benchmarks have a network of usual width whose masks mean something on "
    "ctflow's phantoms. Research only; it has seen no patient."
)
_README = """# ctflow benchmark network

A SwinUNETR of feature_size {feature_size} for benchmarks of ctflow, made by `training/make_wide_bundle.py` from the
demonstration bundle. It was trained for minutes on a few of ctflow's synthetic chests, at their own spacing, and does
not resample: a volume of another spacing is not what it has seen.

**Research only.** It has not been validated, has seen no patient, and is not a medical device.

How it was trained: `docs/model.md` of the repository. Licence: Apache-2.0, see `LICENSE`.
"""


def edit_document(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON object in its file; `change` modifies it in place."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")


def drop_resampling(steps: list[Any]) -> None:
    """Remove Spacingd from a list of transforms, in place; a reference (a string) stays."""
    steps[:] = [step for step in steps if not (isinstance(step, dict) and step.get("_target_") == RESAMPLING)]


def widen_configs(folder: Path, feature_size: int) -> None:
    """Set another width and no resampling, in the bundle's inference and training."""

    def inference(document: dict[str, Any]) -> None:
        document["network_def"]["feature_size"] = feature_size
        document["inferer"]["sw_batch_size"] = BATCH
        drop_resampling(document["preprocessing"]["transforms"])

    def training(document: dict[str, Any]) -> None:
        document["network_def"]["feature_size"] = feature_size
        drop_resampling(document["deterministic_transforms"])

    edit_document(folder / INFERENCE, inference)
    edit_document(folder / TRAIN, training)


def make_bundle(folder: Path, feature_size: int, weights: Path) -> None:
    """Fill a folder with the wide bundle.

    Args:
        folder: Empty.
        feature_size: The network's, a multiple of 12.
        weights: A state dict of that network, as train.json's CheckpointSaver writes it; from any device.

    Raises:
        BundleInvalid: The weights are no state dict, not finite, or do not fit that network.
    """
    skipped = shutil.ignore_patterns("model.pt")  # the demonstration's weights
    shutil.copytree(demonstration_bundle(), folder, ignore=skipped, dirs_exist_ok=True)
    widen_configs(folder, feature_size)
    description = _DESCRIPTION.format(feature_size=feature_size)
    edit_document(folder / METADATA, lambda document: document.update(_WORDS, description=description))
    (folder / "docs" / "README.md").write_text(_README.format(feature_size=feature_size), encoding="utf-8")
    (folder / WEIGHTS).parent.mkdir(exist_ok=True)
    shutil.copyfile(weights, folder / WEIGHTS)
    model = read_bundle(folder)
    network_from_model(model)
    # Written again: GPU tensors would carry the device name, and a trainer may nest them.
    torch.save(dict(model.weights), folder / WEIGHTS)


def main() -> None:
    """Make the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--weights", type=Path, required=True)
    words = parser.parse_args()
    out = words.out.resolve()
    if out.exists():
        parser.error(f"{out.name} exists: name a new folder")
    with temporary_folder(out.parent, out.name) as folder:
        make_bundle(folder, words.feature_size, words.weights)
        folder.rename(out)
    print(f"{out.name}: SwinUNETR of feature_size {words.feature_size}")


if __name__ == "__main__":
    main()
