"""Random small bundles: ctflow against MONAI's own parser, transforms, inferer and post-processing.

`python tests/fuzz_bundles.py [COUNT [SEED]]` prints one line for each bundle that is not as it ought to be, and one
JSON document at the end; the same seed gives the same bundles. The tests run a small share.

A bundle is made of what ctflow accepts, written in one of the many ways that mean the same to MONAI: references,
overrides, merged lists, values for each key, disabled items, long names (`random_bundles`). Half of the bundles are
spoilt in one way (`bundle_faults`); ctflow must reject them with the key and the reason. The others it must accept,
and their results must equal MONAI's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser

from bundle_faults import FAULTS
from ctflow.bundle.config.documents import document_from_bytes
from ctflow.bundle.locate import INFERENCE
from ctflow.bundle.read import spec_from_documents
from ctflow.core.errors import BundleInvalid, UnsupportedPixels
from ctflow.core.model import Model, ModelSpec
from ctflow.core.volume import Geometry, Volume
from ctflow.networks.build import network_from_model
from ctflow.transforms.postprocess import labels_from_probabilities, probabilities_from_logits
from ctflow.transforms.prepare import prepare_volume
from ctflow.transforms.restore import restore_slabs
from ctflow.window.predict import predict_volume
from random_bundles import Json, ensembled, lengthen, rewritten, sound_bundle

TOLERANCE = 1e-4  # of the range of the network's input, and of a probability: both sides compute in float32
Weights = dict[str, torch.Tensor]
FINE = ("equal", "rejected", "nothing left")


# ------------------------------------------------------------------------------------------------------------ oracles


class Monai:
    """MONAI's own reading of a configuration file; the table of its components is made once."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "inference.json"
        self._locator = ConfigParser({}).locator

    def parser(self, text: str) -> ConfigParser:
        self._file.write_text(text)
        parser = ConfigParser()
        parser.locator = self._locator
        parser.read_config(self._file)
        return parser


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume as a file for MONAI, and as ctflow has it."""

    path: Path
    volume: Volume


# Shape (D, H, W), spacing in mm, and for each axis the one of the patient and its sign.
GRIDS = (
    ((20, 24, 22), (2.5, 1.75, 1.875), (2, 1, 0), (1, 1, 1)),
    ((16, 28, 18), (3.0, 1.5, 1.5), (2, 1, 0), (-1, 1, -1)),
    ((24, 18, 20), (2.0, 2.0, 2.0), (1, 2, 0), (1, -1, 1)),
)


def written_scans(folder: Path) -> list[Scan]:
    """Small volumes of unlike axes: a body with air around it.

    One has whole numbers of HU; none of them is 0 after common interpolations. At exactly 0, `nonzero` of
    NormalizeIntensityd and CropForegroundd depend on the last bit of MONAI's interpolation.
    """
    rng = np.random.default_rng(5)
    scans = []
    for number, (shape, spacing_mm, axes, signs) in enumerate(GRIDS):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, axes] * np.array(spacing_mm) * np.array(signs)
        affine[:3, 3] = (-40.5, 12.25, 100)
        d, h, w = np.indices(shape)
        from_centre = [(index - size / 2) / (size / 2.6) for index, size in zip((d, h, w), shape, strict=True)]
        hu = 40 + 300 * np.sin(d / 3) * np.cos(h / 4) * np.sin(w / 5 + 1) + rng.normal(0, 60, shape)
        hu = np.where(sum(x**2 for x in from_centre) < 1, hu, rng.normal(-1000, 4, shape)).astype(np.float32)
        if number == 1:
            hu = np.where(hu > -900, np.abs(hu) + 7, hu).round().astype(np.int16)
        ras = np.diag([-1.0, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]]
        path = folder / f"scan{number}.nii"
        nibabel.save(nibabel.Nifti1Image(hu.transpose(2, 1, 0), ras), path)
        scans.append(Scan(path, Volume(hu, Geometry(shape, affine))))
    return scans


def metadata_of(channels: int) -> dict[str, Json]:
    names = {str(channel): f"channel {channel}" for channel in range(channels)}
    return {"version": "1", "network_data_format": {"outputs": {"pred": {"channel_def": names}}}}


@dataclass(frozen=True, eq=False)
class Result:
    """The network's input (X, Y, Z), and on the source's grid (W, H, D) the probabilities (C, ...) and labels."""

    tensor: torch.Tensor
    probabilities: torch.Tensor
    labels: torch.Tensor


def predictions_by_monai(parser: ConfigParser, image: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """What the evaluator stores of its network, or of each of several."""
    evaluator = parser.get("evaluator") or {}
    count = len(evaluator.get("networks", [0]))
    keys = evaluator.get("pred_keys", [f"pred_{number}" for number in range(count)] if count > 1 else ["pred"])
    found = {}
    for number, key in enumerate(keys):
        network = copy.deepcopy(parser.get_parsed_content("network_def"))
        start = f"{number}." if count > 1 else ""
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        network.load_state_dict(own)
        network.eval()
        found[key] = parser.get_parsed_content("inferer")(image[None], network)[0]
    return found


def result_by_monai(parser: ConfigParser, scan: Scan, weights: Weights) -> Result | None:
    """What MONAI makes of the bundle, step by step as its evaluator does; None where preprocessing leaves nothing."""
    data = parser.get_parsed_content("preprocessing")({"image": str(scan.path)})
    if not data["image"].numel():
        return None
    predictions = predictions_by_monai(parser, data["image"], weights)
    data |= predictions
    after = parser.get_parsed_content("postprocessing")
    seen = dict(data)
    probabilities = None
    for transform in after.transforms:
        seen = transform(seen)
        if type(transform).__name__ in ("Invertd", "MeanEnsembled"):
            keys = ["pred"] if "pred" in seen else predictions
            probabilities = torch.cat([torch.as_tensor(seen[key]) for key in keys])
    assert probabilities is not None
    labels = torch.as_tensor(seen["pred"])[0]
    return Result(torch.as_tensor(data["image"])[0], probabilities, labels)


def result_by_ctflow(spec: ModelSpec, scan: Scan, weights: Weights) -> Result:
    network = network_from_model(Model(spec, weights, ""))
    prepared = prepare_volume(scan.volume, spec.preprocessing, "cpu")
    logits = predict_volume(
        prepared.tensor, network, roi=spec.roi, overlap=spec.overlap, blend=spec.blend, batch_size=spec.batch_size,
        sigma_scale=spec.sigma_scale, padding=spec.window_padding,
    )  # fmt: skip
    found = probabilities_from_logits(logits, spec)
    slabs = [slab for _, slab in restore_slabs(prepared, found)]
    probabilities = torch.cat(slabs, dim=1)
    labels = labels_from_probabilities(probabilities, spec)
    return Result(prepared.tensor[0, 0], probabilities.permute(0, 3, 2, 1), labels.permute(2, 1, 0))


def difference(ours: Result, theirs: Result, spec: ModelSpec) -> str:
    """What differs by more than the tolerance; "" if nothing does."""
    if ours.tensor.shape != theirs.tensor.shape:
        return f"the network's input has {tuple(ours.tensor.shape)} voxels, MONAI's {tuple(theirs.tensor.shape)}"
    width = max(float(theirs.tensor.max() - theirs.tensor.min()), float(theirs.tensor.abs().max()), 1e-6)
    off = float((ours.tensor - theirs.tensor).abs().max()) / width
    if not off <= TOLERANCE:
        return f"the network's input differs by {off:.1e} of its range"
    if ours.labels.shape != theirs.labels.shape:
        return f"the labels have {tuple(ours.labels.shape)} voxels, MONAI's {tuple(theirs.labels.shape)}"
    probabilities = theirs.probabilities[-len(ours.probabilities) :]  # of two classes ctflow may keep the second
    off = float((ours.probabilities - probabilities).abs().max())
    # A large offset takes bits from what differs: float32 has 24 of them.
    if not off <= TOLERANCE * max(width / max(float(theirs.tensor.std()), width / 1000), 10) / 10:
        return f"a probability differs by {off:.1e}"
    voters = spec.network.members if spec.network.combined == "votes" else 1
    margin = torch.stack([_margin(one, spec) for one in theirs.probabilities.chunk(voters)]).amin(0)
    wrong = (ours.labels.long() != theirs.labels.long()) & (margin > 2 * TOLERANCE)
    return f"{int(wrong.sum())} labels differ" if bool(wrong.any()) else ""


def _margin(probabilities: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """By how much each voxel is decided."""
    if spec.threshold is not None:
        return (probabilities[0] - spec.threshold).abs()
    best = probabilities.topk(2, dim=0).values
    return best[0] - best[1]


# ------------------------------------------------------------------------------------------------------------- driver


@dataclass(frozen=True)
class Case:
    """A bundle's text, what is wrong with it, and what ctflow must say: (part of the message, reason), or None."""

    text: str
    channels: int
    fault: str
    expected: tuple[str, str] | None


def case_of(number: int, seed: int) -> Case:
    rng = np.random.default_rng([seed, number])
    bundle = sound_bundle(rng)
    fault, expected = "", None
    if bundle.often(0.5):
        fault = list(FAULTS)[int(rng.integers(len(FAULTS)))]
        expected = FAULTS[fault](bundle)
    else:
        if bundle.often(0.4):
            lengthen(bundle)
        if bundle.often(0.2):
            ensembled(bundle)
    if not fault.startswith("written"):
        rewritten(bundle)
    return Case(json.dumps(bundle.document), bundle.channels, fault, expected)


def verdict_of(case: Case, monai: Monai, scan: Scan) -> str:
    """What became of a bundle: one of `FINE`, or what is wrong."""
    try:
        document = document_from_bytes(case.text.encode(), INFERENCE)
        spec = spec_from_documents(document, metadata_of(case.channels), folder_name="fuzz")
    except BundleInvalid as error:
        if case.expected is None:
            return f"rejected, though sound: {error}"
        key, reason = case.expected
        if key not in str(error) or reason != error.reason:
            return f"rejected for another reason ({error.reason}): {error}"
        return "rejected"
    if case.expected is not None:
        return f"accepted, though it must be rejected for {case.expected}"
    torch.manual_seed(3)
    parser = monai.parser(case.text)
    made = parser.get_parsed_content("network_def").state_dict()
    weights: Weights = {}
    for number in range(spec.network.members):
        start = f"{number}." if spec.network.members > 1 else ""
        weights |= {start + name: _varied(value) for name, value in made.items()}
    with torch.inference_mode():
        theirs = result_by_monai(monai.parser(case.text), scan, weights)
        try:
            ours = result_by_ctflow(spec, scan, weights)
        except UnsupportedPixels:
            return "nothing left" if theirs is None else "unsupported, though MONAI computes it"
    if theirs is None:
        return "computed, though MONAI has nothing left"
    return difference(ours, theirs, spec) or "equal"


def _varied(value: torch.Tensor) -> torch.Tensor:
    return value + 0.3 * torch.randn_like(value) if value.is_floating_point() and value.ndim > 1 else value


def fuzz(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try bundles.

    Returns:
        Counts of verdicts and of the faults that were rejected, and (number, fault, verdict) of each that is not fine.
    """
    scans, monai = written_scans(folder), Monai(folder)
    verdicts: Counter[str] = Counter()
    faults: set[str] = set()
    bad, slowest = [], 0.0
    for number in range(count):
        case = case_of(number, seed)
        began = time.monotonic()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                verdict = verdict_of(case, monai, scans[number % len(scans)])
        except Exception as error:
            verdict = f"crash: {type(error).__name__}: {str(error)[:200]}"
        slowest = max(slowest, time.monotonic() - began)
        verdicts[verdict if verdict in FINE else "bad"] += 1
        if verdict == "rejected":
            faults.add(case.fault)
        if verdict not in FINE:
            bad.append((number, case.fault, verdict))
    return {
        "bundles": count,
        "seed": seed,
        **verdicts,
        "faults": len(faults),
        "slowest_s": round(slowest, 2),
        "bad": bad,
    }


def main(words: list[str]) -> int:
    count, seed = (int(word) for word in [*words, *("2000", "7")[len(words) :]][:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(count, seed, Path(folder))
    for number, fault, verdict in result["bad"]:
        sys.stdout.write(f"{number}: {fault or 'sound'}: {verdict}\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "bad"}) + "\n")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
