"""A bundle of the layout of the model zoo's swin_unetr_btcv_segmentation, and MONAI's own run of it.

The zoo's weights are not at hand: these are seeded and random, of a smaller network. Everything else that matters to a
reader is as in the zoo's version 0.3.7: expressions, the argument `img_size` that MONAI has removed, 14 classes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from ctflow.networks.build import network_class
from tests_support import KEEPS_FREED_MEMORY

SEED = 14
CLASSES = (
    "background",
    "spleen",
    "Right Kidney",
    "Left Kideny",
    "Gallbladder",
    "Esophagus",
    "Liver",
    "Stomach",
    "Aorta",
    "IVC",
    "Portal and Splenic Veins",
    "Pancreas",
    "Right adrenal gland",
    "Left adrenal gland",
)


def write_btcv_bundle(folder: Path, *, feature_size: int = 12, roi: int = 96) -> Path:
    """Write the bundle into `folder` (made if absent) and return it."""
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(inference_config(feature_size, roi), indent=4))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata(roi), indent=4))
    (folder / "docs" / "README.md").write_text("Seeded random weights, for tests.\n")
    torch.save(random_weights(feature_size), folder / "models" / "model.pt")
    return folder


def random_weights(feature_size: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = network_class("SwinUNETR")(
            in_channels=1, out_channels=len(CLASSES), feature_size=feature_size, spatial_dims=3
        )
    return dict(network.state_dict())


def inference_config(feature_size: int, roi: int) -> dict[str, Any]:
    image = {"keys": "image"}
    before = [
        {"_target_": "LoadImaged", **image, "reader": "ITKReader"},
        {"_target_": "EnsureChannelFirstd", **image},
        {"_target_": "Orientationd", **image, "axcodes": "RAS"},
        {"_target_": "Spacingd", **image, "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
        {"_target_": "ScaleIntensityRanged", **image, "a_min": -175, "a_max": 250, "b_min": 0.0, "b_max": 1.0}
        | {"clip": True},
        {"_target_": "EnsureTyped", **image},
    ]
    pred = {"keys": "pred"}
    after = [
        {"_target_": "Activationsd", **pred, "softmax": True},
        {"_target_": "Invertd", **pred, "transform": "@preprocessing", "orig_keys": "image"}
        | {"nearest_interp": False, "to_tensor": True},
        {"_target_": "AsDiscreted", **pred, "argmax": True},
        {"_target_": "SaveImaged", **pred, "output_dir": "@output_dir"},
    ]
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data/RawData/",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "SwinUNETR",
            "spatial_dims": 3,
            "img_size": roi,
            "in_channels": 1,
            "out_channels": len(CLASSES),
            "feature_size": feature_size,
            "use_checkpoint": False,
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False}
        | {"num_workers": 4},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [roi] * 3, "sw_batch_size": 4, "overlap": 0.5},
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": True,
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@evaluator.run()"],
    }


def metadata(roi: int) -> dict[str, Any]:
    image = {"type": "image", "modality": "CT", "spatial_shape": [roi] * 3, "dtype": "float32", "value_range": [0, 1]}
    classes = {str(number): name for number, name in enumerate(CLASSES)}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20220324.json",
        "version": "0.3.7",
        "changelog": {"0.3.7": "Update metric in metadata"},
        "monai_version": "1.0.1",
        "pytorch_version": "1.13.0",
        "numpy_version": "1.21.2",
        "optional_packages_version": {"nibabel": "3.2.1", "pytorch-ignite": "0.4.8", "einops": "0.4.1"},
        "task": "BTCV multi-organ segmentation",
        "description": "Random weights in the layout of a multi-organ segmentation bundle",
        "authors": "ctflow's tests",
        "copyright": "none",
        "data_source": "none",
        "data_type": "nibabel",
        "intended_use": "This is an example, not to be used for diagnostic purposes",
        "network_data_format": {
            "inputs": {
                "image": image
                | {"format": "hounsfield", "num_channels": 1, "is_patch_data": True, "channel_def": {"0": "image"}}
            },
            "outputs": {
                "pred": image
                | {"format": "segmentation", "num_channels": len(CLASSES), "is_patch_data": True}
                | {"channel_def": classes}
            },
        },
    }


def labels_by_monai(bundle: Path, nifti: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `monai.bundle run` of the bundle writes for one image.

    Args:
        bundle: What `write_btcv_bundle` wrote, or another whose datalist is dataset_dir/imagesTs/*.nii.gz.
        nifti: A .nii.gz file, in HU.
        out: A folder for what MONAI reads and writes.

    Returns:
        The label map on the image's grid (X, Y, Z), int64, and its (4, 4) affine to RAS mm.
    """
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    config["network_def"].pop("img_size", None)  # the installed MONAI refuses it
    config["preprocessing"]["transforms"][0].pop("reader", None)  # itk is not installed; nibabel reads the same
    config["dataloader"]["num_workers"] = 0
    config["evaluator"]["amp"] = False
    images = out / "data" / "imagesTs"
    images.mkdir(parents=True)
    shutil.copyfile(nifti, images / "case.nii.gz")
    (out / "inference.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", out / "inference.json"]
    command += ["--meta_file", bundle / "configs" / "metadata.json", "--bundle_root", bundle]
    command += ["--dataset_dir", out / "data", "--output_dir", out / "eval"]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=out,
        env=os.environ | KEEPS_FREED_MEMORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (written,) = (out / "eval").rglob("*.nii.gz")
    image = nibabel.load(written)
    return np.asarray(image.dataobj).astype(np.int64), image.affine
