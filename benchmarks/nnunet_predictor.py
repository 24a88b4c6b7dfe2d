"""Time a model of nnU-Net with nnU-Net's own predictor and with ctflow, on the same CT and in one run; prints JSON.

    python benchmarks/nnunet_predictor.py [--model FOLDER] [--ct DIR] [--device cuda:0] [--engine E] [--precision fp16]

Both start with the CT in memory and end with labels on its grid: preprocessing, windows, blending, resampling. nnU-Net
computes in autocast fp16 on a GPU and in fp32 on a CPU, one window after another; give ctflow the same precision.
Without --model a PlainConvUNet as nnU-Net plans it for 8 GB of GPU memory gets random weights (31 million; --small is
tiny), without --ct a phantom is drawn. Seconds are medians of --repeats after one that is not counted: it compiles,
tunes and compares.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctflow.api import read_series
from ctflow.bundle.locate import find_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.model import NetworkSpec
from ctflow.core.processes import usable_cpus
from ctflow.core.volume import Geometry, Volume
from ctflow.networks.build import network_from_spec
from ctflow.phantom import phantom_from_seed
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings

CLASSES = 25  # as many as each of TotalSegmentator's five models has
RESAMPLING = {"is_seg": False, "order_z": 0, "force_separate_z": None}


def main() -> int:
    """Measure and print; 1 if the labels differ."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("raw", "preprocessed", "results"):  # nnU-Net wants them, whatever it does
            os.environ.setdefault(f"nnUNet_{name}", scratch)
        folder = given.model or random_model(Path(scratch) / "random", small=given.small)
        document = measure(find_bundle(folder), _volume(given.ct, given.size), given)
    text = json.dumps(document, indent=2)
    sys.stdout.write(f"{text}\n")
    if given.out:
        given.out.write_text(f"{text}\n")
    return 0 if document["equal_voxels"] >= given.least else 1


def measure(folder: Path, volume: Volume, given: argparse.Namespace) -> dict[str, Any]:
    """The document of one comparison."""
    model = read_bundle(folder)
    settings = Settings(
        engine=given.engine,
        precision=given.precision,
        device=given.device,
        mirror=given.mirror,
        constant_windows="compute",
    )
    with Segmenter(model, settings, logits_only=given.model is None) as segmenter:
        found, ours = _timed(lambda: segmenter.segment(volume), given.repeats)
        segmentation, stages = found
        engine = segmentation.engine
    predictor = _predictor(folder, given)
    properties = {"spacing": [float(mm) for mm in volume.geometry.spacing_mm]}
    array = volume.array[None].astype(np.float32)
    labels, theirs = _timed(
        lambda: _quietly(lambda: predictor.predict_single_npy_array(array, dict(properties))), given.repeats
    )
    return {
        "model": {"name": model.spec.name, "version": model.spec.version, "network": model.spec.network.name,
                  "members": model.spec.network.members, "classes": model.spec.out_channels, "roi": model.spec.roi,
                  "parameters": sum(weight.numel() for weight in network_from_spec(model.spec.network).parameters())},
        "ct": {"shape": volume.array.shape, "spacing_mm": [round(mm, 4) for mm in volume.geometry.spacing_mm]},
        "mirror": segmentation.window.get("mirror", []),
        "nnunet": {"version": _version("nnunetv2"), "seconds": theirs, "median_s": statistics.median(theirs),
                   "precision": "autocast fp16" if given.device.startswith("cuda") else "fp32"},
        "ctflow": {"engine": engine.backend, "precision": engine.precision, "seconds": ours,
                   "median_s": statistics.median(ours), "stages_s": {key: round(s, 4) for key, s in stages.items()},
                   "batch": segmentation.window["batch_size"], "warnings": segmentation.warnings},
        "ratio": round(statistics.median(theirs) / statistics.median(ours), 3),
        "equal_voxels": float((np.asarray(labels).astype(np.uint8) == segmentation.labels).mean()),
        "machine": {"device": given.device, "gpu": _gpu(given.device), "cpus": usable_cpus(),
                    "python": platform.python_version(), "torch": str(torch.__version__),
                    "threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def random_model(folder: Path, *, small: bool) -> Path:
    """A trained-model folder with random weights, of the sizes that nnU-Net plans for a CT at 1.5 mm."""
    stages = 3 if small else 6
    arguments: dict[str, Any] = {
        "n_stages": stages,
        "features_per_stage": [min((4 if small else 32) * 2**stage, 320) for stage in range(stages)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    classes = 3 if small else CLASSES
    labels = {"background": 0, **{f"class {number}": number for number in range(1, classes)}}
    configuration = {
        "data_identifier": "random", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [32] * 3 if small else [128] * 3, "spacing": [3.0] * 3 if small else [1.5] * 3,
        "median_image_size_in_voxels": [200.0] * 3, "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False], "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": {**RESAMPLING, "order": 3},
        "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**RESAMPLING, "order": 1},
        "architecture": {"network_class_name": name, "arch_kwargs": arguments,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
    }  # fmt: skip
    figures = {"mean": -300.0, "std": 400.0, "percentile_00_5": -1000.0, "percentile_99_5": 400.0}
    plans = {
        "dataset_name": "Dataset000_Random", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration}, "foreground_intensity_properties_per_channel": {"0": figures},
    }  # fmt: skip
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.manual_seed(0)
    network = network_from_spec(NetworkSpec(name, {**arguments, "input_channels": 1, "num_classes": classes}))
    checkpoint = {
        "network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"}, "inference_allowed_mirroring_axes": (0, 1, 2),
    }  # fmt: skip
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def _predictor(folder: Path, given: argparse.Namespace) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: PLC0415  # after its folders are set

    def ready() -> Any:
        predictor = nnUNetPredictor(
            tile_step_size=0.5, use_gaussian=True, use_mirroring=given.mirror == "plans",
            perform_everything_on_device=True, device=torch.device(given.device), allow_tqdm=False,
        )  # fmt: skip
        predictor.initialize_from_trained_model_folder(str(folder), None)
        return predictor

    return _quietly(ready)


def _timed(segment: Callable[[], Any], repeats: int) -> tuple[Any, list[float]]:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        found = segment()
        seconds.append(round(time.perf_counter() - start, 4))
    return found, seconds[1:]


def _quietly(call: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return call()


def _volume(ct: Path | None, size: int) -> Volume:
    """The CT, or a phantom; straight axes, as nnU-Net sees none."""
    source = read_series(ct) if ct else phantom_from_seed(7, (size, size, size)).volume
    array: npt.NDArray[Any] = np.ascontiguousarray(source.array)
    d, h, w = source.geometry.spacing_mm
    affine = np.array([[0, 0, w, 0], [0, h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1.0]])
    return Volume(array, Geometry(source.geometry.shape, affine))


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _version(package: str) -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return version(package)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a trained-model folder of nnU-Net, unpacked")
    parser.add_argument("--small", action="store_true", help="random weights of a tiny network, to try this script")
    parser.add_argument("--ct", type=Path, help="a folder with one CT series")
    parser.add_argument("--size", type=int, default=160, help="voxels of the phantom's sides")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--mirror", choices=("none", "plans"), default="plans")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--least", type=float, default=0.98, help="least share of equal voxels")
    parser.add_argument("--out", type=Path, help="also write the document there")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
