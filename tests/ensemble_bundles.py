"""Bundles of several networks (MONAI's EnsembleEvaluator) as people write them: small networks, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctflow.core.model import NetworkSpec
from ctflow.networks.build import network_from_spec
from zoo_bundles import WINDOWS, ZooBundle, spleen_ct, written_bundle

Json = Any
KEYS = ["pred_0", "pred_1", "pred_2"]


def _of(target: str, keys: Json = "pred", **arguments: Json) -> dict[str, Json]:
    return {"_target_": target, "keys": keys, **arguments}


def _invert(keys: Json, *, nearest: bool = False) -> dict[str, Json]:
    return _of("Invertd", keys, transform="@preprocessing", orig_keys="@image_key", nearest_interp=nearest)


def _mean(keys: Json = KEYS, **arguments: Json) -> dict[str, Json]:
    return _of("MeanEnsembled", keys, output_key="pred", **arguments)


def _vote(keys: Json = KEYS, **arguments: Json) -> dict[str, Json]:
    return _of("VoteEnsembled", keys, output_key="pred", **arguments)


def ensemble(after: list[dict[str, Json]], *, channels: int, count: int = 3, **evaluator: Json) -> dict[str, Json]:
    """A configuration of networks that are copies of one definition, each with a file of its own."""
    found = {key: value for key, value in spleen_ct().items() if key not in ("network", "checkpointloader")}
    found["network_def"] |= {"out_channels": channels}
    found["inferer"] = {**WINDOWS, "mode": "gaussian"}
    found["postprocessing"] = {"_target_": "Compose", "transforms": after}
    handlers = []
    for number in range(count):
        found[f"network_{number}"] = "$copy.deepcopy(@network_def).to(@device)"
        path = f"$@bundle_root + '/models/fold{number}.pt'"
        names = {"model": f"@network_{number}"}
        handlers.append({"_target_": "CheckpointLoader", "load_path": path, "load_dict": names})
    found["imports"] = [*found["imports"], "$import copy"]
    found["handlers"] = handlers
    found["dataloader"] = {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0}
    found["evaluator"] = {
        "_target_": "EnsembleEvaluator", "device": "@device", "val_data_loader": "@dataloader",
        "networks": [f"@network_{number}" for number in range(count)], "inferer": "@inferer",
        "postprocessing": "@postprocessing", "val_handlers": "@handlers", **evaluator,
    }  # fmt: skip
    return found


def mean_of_logits() -> dict[str, Json]:
    after = [_of("EnsureTyped", KEYS), _mean(), _of("Activationsd", softmax=True), _invert("pred"),
             _of("AsDiscreted", argmax=True)]  # fmt: skip
    return ensemble(after, channels=4)


def weighted_mean_of_logits() -> dict[str, Json]:
    """MONAI's tutorial on ensembles: weights from validation, a sigmoid and a threshold."""
    mean = _mean(["pred_2", "pred_0", "pred_1"], weights=[0.95, 0.1, 0.6])
    after = [mean, _of("Activationsd", sigmoid=True), _invert("pred"), _of("AsDiscreted", threshold=0.5)]
    return ensemble(after, channels=1)


def mean_of_probabilities() -> dict[str, Json]:
    after = [_of("Activationsd", KEYS, softmax=True), _mean(weights=[3, 1, 2]), _invert("pred"),
             _of("AsDiscreted", argmax=True)]  # fmt: skip
    found = ensemble(after, channels=4, pred_keys=KEYS)
    del found["network_def"]
    for number in range(3):  # each with a definition of its own
        found[f"network_def_{number}"] = ensemble(after, channels=4)["network_def"]
        found[f"network_{number}"] = f"$@network_def_{number}.to(@device)"
    return found


def mean_of_restored() -> dict[str, Json]:
    """Two classes, each network's probabilities restored by themselves, after a crop."""
    keys = ["a", "b"]
    after = [_of("Activationsd", keys, softmax=True), _invert(keys), _mean(keys), _of("DeleteItemsd", keys),
             _of("AsDiscreted", argmax=True)]  # fmt: skip
    found = ensemble(after, channels=2, count=2, pred_keys=keys)
    crop = {"_target_": "CropForegroundd", "keys": "@image_key", "source_key": "@image_key"}
    found["preprocessing"]["transforms"].append(crop)
    return found


def mean_after_restored_logits() -> dict[str, Json]:
    after = [_invert(KEYS), _of("Activationsd", KEYS, softmax=True), _mean(), _of("AsDiscreted", argmax=True)]
    return ensemble(after, channels=3)


def mean_of_masks() -> dict[str, Json]:
    """One channel, restored from the nearest voxel."""
    keys = ["pred_0", "pred_1"]
    after = [_of("Activationsd", keys, sigmoid=True), _mean(keys), _invert("pred", nearest=True),
             _of("AsDiscreted", threshold=0.4)]  # fmt: skip
    return ensemble(after, channels=1, count=2)


def vote_of_labels() -> dict[str, Json]:
    after = [_of("Activationsd", KEYS, softmax=True), _of("AsDiscreted", KEYS, argmax=True), _vote(num_classes=4),
             _of("KeepLargestConnectedComponentd", applied_labels=[1]), _invert("pred", nearest=True)]  # fmt: skip
    found = ensemble(after, channels=4)
    found["networks"] = "$[@network_0, @network_1, @network_2.to(@device)]"
    found["evaluator"]["networks"] = "@networks"
    return found


def vote_of_restored() -> dict[str, Json]:
    keys = [f"p{number}" for number in range(4)]
    after = [_of("Activationsd", keys, softmax=True), _invert(keys), _of("AsDiscreted", keys, argmax=True),
             _vote(keys, num_classes=4)]  # fmt: skip
    return ensemble(after, channels=4, count=4, pred_keys=keys)


def vote_of_masks() -> dict[str, Json]:
    """MONAI's tutorial on ensembles; of four networks two are no majority. All weights in one file."""
    keys = [f"pred_{number}" for number in range(4)]
    after = [_of("Activationsd", keys, sigmoid=True), _of("AsDiscreted", keys, threshold=0.5), _vote(keys),
             _invert("pred", nearest=True)]  # fmt: skip
    found = ensemble(after, channels=1, count=4)
    found["evaluator"]["networks"] = ["$copy.deepcopy(@network_def).to(@device).eval()" for _ in keys]
    names = {f"net{number}": f"@evaluator::networks::{number}" for number in range(4)}
    path = "$@bundle_root + '/models/all.pt'"
    del found["handlers"]
    found["evaluator"]["val_handlers"] = [{"_target_": "CheckpointLoader", "load_path": path, "load_dict": names}]
    return found


@dataclass(frozen=True)
class EnsembleBundle:
    """A bundle of several networks: its content, and how many channels and networks it has."""

    make: Callable[[], dict[str, Json]]
    channels: int
    count: int = 3
    is_one_file: bool = False

    @property
    def name(self) -> str:
        return self.make.__name__


ENSEMBLES = (
    EnsembleBundle(mean_of_logits, 4),
    EnsembleBundle(weighted_mean_of_logits, 1),
    EnsembleBundle(mean_of_probabilities, 4),
    EnsembleBundle(mean_of_restored, 2, 2),
    EnsembleBundle(mean_after_restored_logits, 3),
    EnsembleBundle(mean_of_masks, 1, 2),
    EnsembleBundle(vote_of_labels, 4),
    EnsembleBundle(vote_of_restored, 4, 4),
    EnsembleBundle(vote_of_masks, 1, 4, is_one_file=True),
)


def written_ensemble(folder: Path, bundle: EnsembleBundle) -> Path:
    """Write a bundle with its weights."""
    file = "inference.yaml" if bundle.name == "mean_of_logits" else "inference.json"
    written_bundle(folder, ZooBundle(bundle.name, file, bundle.make, "", bundle.channels, (1.5, 1.5, 2.0)))
    saved = [_weights(bundle, number) for number in range(bundle.count)]
    if bundle.is_one_file:
        torch.save({f"net{number}": weights for number, weights in enumerate(saved)}, folder / "models" / "all.pt")
    else:
        for number, weights in enumerate(saved):
            torch.save({"model": weights}, folder / "models" / f"fold{number}.pt")
    return folder


def _weights(bundle: EnsembleBundle, seed: int) -> dict[str, torch.Tensor]:
    """Of one network: no class wins everywhere, and no probability is so close to 1 that two networks tie."""
    arguments = dict(ensemble([], channels=bundle.channels)["network_def"])
    network = network_from_spec(NetworkSpec(arguments.pop("_target_"), arguments))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
    return network.state_dict()
