"""Segment a CT of 512 x 512 x 300 voxels with 105 classes: peak memory, seconds of each stage, and of writing the SEG.

    python benchmarks/whole_body.py [--device cuda:0] [--restored labels] [--out FILE] [--cache DIR]

The CT is a phantom of 500 x 500 x 450 mm. The network is a SegResNet of few filters with random weights: what 105
classes take does not depend on filters. `--restored` says how labels come back to the CT's grid: `labels` as in
wholeBody_ct_segmentation (the nearest label), `probabilities` as in most bundles of MONAI, `logits` as in models of
nnU-Net (windows overlap by half); default is all three, each in a process of its own. Then two label maps are written
as SEG, binary and labelmap: the model's, and 104 drawn structures. Each SEG is read back with highdicom and compared.
The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
import torch

from ctflow.compat.monai import import_lean
from ctflow.core.model import Code, Model, ModelSpec, NetworkSpec, Segment
from ctflow.core.processes import usable_cpus
from ctflow.core.steps import (
    ClipNormalize,
    CropNonzero,
    Normalize,
    Orient,
    Resample,
    ResampleSpline,
    ScaleMinMax,
    Spline,
)
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import SegForm, segmentation_from_labels
from ctflow.dicom.write.source import Sources, sources_from_headers
from ctflow.networks.build import network_from_spec
from ctflow.phantom import phantom_from_seed
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings

CLASSES = 105
RESTORED = ("labels", "probabilities", "logits")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
Labels = npt.NDArray[np.uint8]
Kind = Literal["binary", "labelmap"]


def main() -> int:
    """Measure, print and keep."""
    given = _arguments()
    if given.one:
        sys.stdout.write(json.dumps(measure(given)) + "\n")
        return 0
    rows = [_in_own_process(restored) for restored in given.restored or RESTORED]
    document = {
        "benchmark": "whole body",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
        "device": given.device,
        "gpu": torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else None,
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "highdicom": hd.__version__,
        "load": [round(each, 1) for each in os.getloadavg()],
        "note": given.note,
        "rows": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _in_own_process(restored: str) -> dict[str, Any]:
    """A variant's row: the peak of a process' memory never falls again."""
    given = [each for each in sys.argv[1:] if each not in ("--restored", *RESTORED)]
    command = [sys.executable, __file__, *given, "--one", "--restored", restored]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    sys.stderr.write(f"{row}\n")
    return row


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Segment, write, read back."""
    import_lean()
    (restored,) = given.restored
    volume = ct_of(tuple(given.shape))
    model = random_model(restored, given.spacing_mm)
    before_gib = _peak_gib()
    settings = Settings(
        engine=given.engine, precision=given.precision, device=given.device, cache=given.cache,
        constant_windows="compute",
    )  # fmt: skip
    with Segmenter(model, settings, logits_only=True) as segmenter:
        start = time.perf_counter()
        found, seconds = segmenter.segment(volume)
        whole_s = time.perf_counter() - start
    row: dict[str, Any] = {
        "restored": restored,
        "shape": list(volume.array.shape),
        "spacing_mm": given.spacing_mm,
        "engine": f"{found.engine.backend} {found.engine.precision}",
        "window": dict(found.window),
        "seconds": {stage: round(each, 2) for stage, each in seconds.items()} | {"whole": round(whole_s, 2)},
        "peak_gib_before": before_gib,
        "peak_gib": _peak_gib(),
        "classes_marked": len(np.unique(found.labels)),
    }
    if given.device.startswith("cuda"):
        row["peak_gib_of_gpu"] = round(torch.cuda.max_memory_allocated(given.device) / 2**30, 2)
        row["peak_gib_reserved"] = round(torch.cuda.max_memory_reserved(given.device) / 2**30, 2)
    if given.no_seg:
        return row
    with tempfile.TemporaryDirectory() as scratch:
        sources = _sources(volume, Path(scratch) / "ct")
        row["seg"] = [
            written(labels, name, kind, sources, model.spec, Path(scratch) / "seg.dcm")
            for name, labels in (("model", found.labels), ("drawn", drawn_structures(volume.array.shape)))
            for kind in cast("tuple[Kind, ...]", ("binary", "labelmap"))
        ]
    return row | {"peak_gib_with_seg": _peak_gib()}


def written(labels: Labels, name: str, kind: Kind, sources: Sources, spec: ModelSpec, path: Path) -> dict[str, Any]:
    """Write a SEG, and check that highdicom reads the same labels back."""
    start = time.perf_counter()
    seg = segmentation_from_labels(labels, sources, spec, Provenance("0", "ab" * 32, {}), form=SegForm(kind))
    write_dataset(seg, path)
    seconds = time.perf_counter() - start
    frames = int(seg.NumberOfFrames)
    del seg
    some = np.linspace(0, len(labels) - 1, 12).astype(int)
    read = hd.seg.segread(path, lazy_frame_retrieval=True)
    found = read.get_pixels_by_source_instance(
        [sources.uids[d] for d in some], combine_segments=True, ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )  # fmt: skip
    if not np.array_equal(found, labels[some]):
        raise ValueError(f"highdicom reads other labels from the {kind} SEG of {name}")
    megabytes = round(path.stat().st_size / 2**20)
    return {"labels": name, "kind": kind, "frames": frames, "seconds": round(seconds, 2), "megabytes": megabytes}


def ct_of(shape: tuple[int, ...]) -> Volume:
    """A phantom of half as many voxels along each axis, each of them twice, in a field of view of 500 mm."""
    half = phantom_from_seed(3, (max(shape[0] // 2, 32), max(shape[1] // 2, 64), max(shape[2] // 2, 64)))
    array = half.volume.array
    for axis in range(3):
        array = np.repeat(array, 2, axis)
    array = np.ascontiguousarray(array[: shape[0], : shape[1], : shape[2]])
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 450 / shape[0], 500 / shape[1], 500 / shape[2], 1
    return Volume(array, Geometry((array.shape[0], array.shape[1], array.shape[2]), affine))


def random_model(restored: str, spacing_mm: float) -> Model:
    """A SegResNet with random weights, restored as a bundle of MONAI or a model of nnU-Net."""
    torch.manual_seed(0)
    network = NetworkSpec(
        "SegResNet",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": CLASSES, "init_filters": 8, "blocks_down": [1, 1],
         "blocks_up": [1]},
    )  # fmt: skip
    grid = (spacing_mm, spacing_mm, spacing_mm)
    spec = ModelSpec(
        name="whole_body", version="1", network=network, in_channels=1, out_channels=CLASSES,
        preprocessing=(Orient("RAS"), Resample(grid), Normalize(None, None, nonzero=True), ScaleMinMax(-1.0, 1.0)),
        roi=(96, 96, 96), overlap=0.25, blend="gaussian", batch_size=1, activation="softmax", threshold=None,
        segments=tuple(Segment(n, f"structure {n}", ORGAN, ORGAN) for n in range(1, CLASSES)),
        intended_use="", demonstration=True, restored="labels" if restored == "labels" else "probabilities",
    )  # fmt: skip
    if restored == "logits":
        resampling = ResampleSpline(grid, Spline(3, 0, apart=None), Spline(1, 0, apart=None))
        steps = (CropNonzero(), ClipNormalize(-1000, 1000, 0, 300), resampling)
        spec = replace(spec, preprocessing=steps, overlap=0.5, blend="nnunet", placement="even", restored="logits")
    return Model(spec, network_from_spec(network).state_dict(), "d" * 64)


def drawn_structures(shape: tuple[int, ...]) -> Labels:
    """104 ellipsoids of the sizes of organs, vessels and bones."""
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.uint8)
    for number in range(1, CLASSES):
        middle = rng.uniform(0.15, 0.85, 3) * shape
        radius = rng.uniform([0.03, 0.02, 0.02], [0.17, 0.12, 0.12]) * shape
        low = np.maximum((middle - radius).astype(int), 0)
        high = np.minimum((middle + radius).astype(int) + 1, shape)
        box = tuple(slice(*ends) for ends in zip(low, high, strict=True))
        places = np.ogrid[box]
        inside = sum(((at - m) / r) ** 2 for at, m, r in zip(places, middle, radius, strict=True)) < 1
        labels[box][inside] = number
    return labels


def _sources(volume: Volume, folder: Path) -> Sources:
    paths = write_ct_series(volume, folder)
    return sources_from_headers([pydicom.dcmread(path, stop_before_pixels=True) for path in paths])


def _peak_gib() -> float:
    """Most memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--cache", type=Path, default=None, help="folder of stored engines (default: none)")
    parser.add_argument("--restored", choices=RESTORED, action="append")
    parser.add_argument("--spacing-mm", type=float, default=1.5)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--no-seg", action="store_true", help="write no SEG")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
