"""Trained-model folders of nnU-Net, made by its own trainer, and its own predictor's results of them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

CONFIGURATION = "3d_fullres"
_STEPS, _RATE = 10, 0.1
LABELS: Mapping[str, Any] = {"background": 0, "liver": 1, "lung tumour": 2}
_RESAMPLING = {"is_seg": False, "order_z": 0, "force_separate_z": None}
PLAIN: Mapping[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def residual() -> dict[str, Any]:
    """The architecture of the residual presets."""
    made = copy.deepcopy(dict(PLAIN))
    made["network_class_name"] = made["network_class_name"].replace("PlainConvUNet", "ResidualEncoderUNet")
    arguments = made["arch_kwargs"]
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    arguments["n_conv_per_stage_decoder"] = [1, 1]
    return made


def plans(architecture: Mapping[str, Any] = PLAIN, **changed: Any) -> dict[str, Any]:
    """A plans.json as nnU-Net's planner writes it; `changed` replaces keys of the configuration."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 24, 24],
        "median_image_size_in_voxels": [40.0, 60.0, 60.0],
        "spacing": [3.0, 2.0, 2.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**_RESAMPLING, "order": 3},
        "resampling_fn_seg_kwargs": {**_RESAMPLING, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**_RESAMPLING, "order": 1},
        "architecture": copy.deepcopy(dict(architecture)),
        "batch_dice": False,
        **changed,
    }
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 2.0, 2.0],
        "original_median_shape_after_transp": [40, 60, 60],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": 1500.0, "mean": -300.0, "median": -500.0, "min": -1024.0,
                "percentile_00_5": -1000.0, "percentile_99_5": 400.0, "std": 400.0,
            }
        },
    }  # fmt: skip


def dataset(labels: Mapping[str, Any] = LABELS, **changed: Any) -> dict[str, Any]:
    """A dataset.json."""
    return {"channel_names": {"0": "CT"}, "labels": dict(labels), "numTraining": 1, "file_ending": ".nii.gz", **changed}


def untrained(
    folder: Path, given_plans: Mapping[str, Any], given_dataset: Mapping[str, Any], folds: int = 1, **changed: Any
) -> Path:
    """A trained-model folder with random weights, made without nnU-Net in a moment.

    Args:
        folder: Where it is made.
        given_plans: plans.json.
        given_dataset: dataset.json.
        folds: How many.
        changed: Entries of the checkpoint that replace nnU-Net's.
    """
    from ctflow.core.model import NetworkSpec  # noqa: PLC0415
    from ctflow.networks.build import network_from_spec  # noqa: PLC0415

    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(given_plans))
    (folder / "dataset.json").write_text(json.dumps(given_dataset))
    made = given_plans["configurations"][CONFIGURATION]["architecture"]
    labels = {name: value for name, value in given_dataset["labels"].items() if name != "ignore"}
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    arguments = {**made["arch_kwargs"], "input_channels": 1, "num_classes": len(labels) - has_regions}
    for fold in range(folds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold)
            network = network_from_spec(NetworkSpec(made["network_class_name"], arguments))
            for tensor in network.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
        entries = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float32(0.4)], "lrs": [np.float64(0.01)], "train_losses": [0.9]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {"configuration": CONFIGURATION, "fold": fold, "device": torch.device("cpu")},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
            **changed,
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(entries, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def train(
    folder: Path,
    given_plans: Mapping[str, Any],
    given_dataset: Mapping[str, Any],
    folds: int = 1,
    trainer: str = "nnUNetTrainer",
) -> Path:
    """Make a trained-model folder with nnU-Net's own trainer.

    Ten large steps each, not one: in nnU-Net's half precision logits of classes that hardly differ fall to either.

    Returns:
        The folder that `nnUNetv2_predict_from_modelfolder` takes.
    """
    _use_folders(folder / "unused")
    kind = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    if trainer != "nnUNetTrainer":
        kind = type(trainer, (kind,), {})
    made = folder / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    made.mkdir(parents=True)
    (made / "plans.json").write_text(json.dumps(given_plans))
    (made / "dataset.json").write_text(json.dumps(given_dataset))
    for fold in range(folds):
        torch.manual_seed(fold)
        with contextlib.redirect_stdout(io.StringIO()):
            one = kind(
                {**copy.deepcopy(dict(given_plans)), "continue_training": False},
                CONFIGURATION,
                fold,
                dict(given_dataset),
                device=torch.device("cpu"),
            )
            cases = Path(one.preprocessed_dataset_folder)
            cases.mkdir(parents=True, exist_ok=True)
            (cases / "case.b2nd").touch()  # the trainer wants to know the kind of its training cases
            one.initialize()
            one.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            one.optimizer.param_groups[0]["lr"] = _RATE
            for _ in range(_STEPS):
                _train_one_step(one)
            one._best_ema = np.float64(0.5)
            (made / f"fold_{fold}").mkdir()
            one.save_checkpoint(str(made / f"fold_{fold}" / "checkpoint_final.pth"))
    shutil.rmtree(folder / "unused")
    return made


def _train_one_step(trainer: Any) -> None:
    """One step towards labels that follow the intensity: the logits then differ clearly from voxel to voxel."""
    shape = trainer.configuration_manager.patch_size
    images = torch.nn.functional.interpolate(torch.randn(2, 1, 4, 4, 4), size=tuple(shape), mode="trilinear") * 2
    heads = trainer.label_manager.num_segmentation_heads
    marks = (images > 0).float() + (images > 1).float()
    if not trainer.label_manager.has_regions:
        marks = marks.clamp(max=heads - 1)
    targets = []
    for scale in trainer._get_deep_supervision_scales():
        size = tuple(round(n * s) for n, s in zip(shape, scale, strict=True))
        target = torch.nn.functional.interpolate(marks, size=size, mode="nearest")
        targets.append(
            torch.cat([target > n for n in range(heads)], dim=1).float()
            if trainer.label_manager.has_regions
            else target
        )
    trainer.network.train()
    trainer.train_step({"data": images, "target": targets})


def _use_folders(folder: Path) -> None:
    """nnU-Net reads its folders from the environment whenever it needs them."""
    folders = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    os.environ.update({**folders, "nnUNet_compile": "f"})


def predict(
    folder: Path,
    array: npt.NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    mirror: bool = True,
    in_full_precision: bool = False,
) -> npt.NDArray[np.uint8]:
    """Labels of nnU-Net's own predictor.

    Args:
        folder: A trained-model folder.
        array: Slices, rows and columns in HU.
        spacing_mm: Of these.
        mirror: Whether it mirrors as the folder was trained.
        in_full_precision: Whether it adds logits in fp32 instead of half precision.
    """
    module = importlib.import_module("nnunetv2.inference.predict_from_raw_data")
    full = mock.patch.object(torch, "half", torch.float32) if in_full_precision else contextlib.nullcontext()
    with contextlib.redirect_stdout(io.StringIO()), full:
        predictor = module.nnUNetPredictor(
            tile_step_size=0.5,
            use_gaussian=True,
            use_mirroring=mirror,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(str(folder), None)
        properties = {"spacing": [float(mm) for mm in spacing_mm]}
        labels = predictor.predict_single_npy_array(array[None].astype(np.float32), properties)
    return np.asarray(labels).astype(np.uint8)


def zipped(folder: Path, target: Path) -> Path:
    """A zip as `nnUNetv2_export_model_to_zip` makes it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, Path("Dataset001_Test") / folder.name / path.relative_to(folder))
    return target
