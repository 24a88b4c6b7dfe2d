"""A trained-model folder of nnU-Net, or a zip of it -> `Model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ctflow.bundle.config import short
from ctflow.bundle.config.documents import document_from_bytes
from ctflow.bundle.metadata import metadata_of_labels, notes_on_codes
from ctflow.bundle.nnunet.checkpoint import FoldCheckpoint, read_checkpoint
from ctflow.bundle.nnunet.folder import CHECKPOINT, DATASET, PLANS, SIDECAR, TrainedFolder
from ctflow.bundle.nnunet.labels import invalid_dataset, labels_from_dataset
from ctflow.bundle.nnunet.plans import configuration_from_plans, invalid_plans
from ctflow.bundle.nnunet.steps import steps_of_folder
from ctflow.bundle.weights import weights_digest
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Model, ModelSpec

OVERLAP = 0.5  # nnU-Net's tile_step_size, which no folder states
_LONGEST = 64  # of a name (DICOM VR LO)
_MOST_FOLDS = 20
_OTHER_MODALITY = re.compile(r"mri?\b|t[12]|flair|adc\b|dwi\b|pet\b|suv\b|us\b|ultrasound|rgb|x-?ray", re.IGNORECASE)
# Trainers of nnU-Net that build a network from other parts than plans.json says.
_OTHER_NETWORKS = re.compile(r"nnUNetTrainerBN|.*(Primus|Mamba|UMamba)", re.IGNORECASE)


def read_nnunet(path: Path) -> Model:
    """Read a model without executing any of it.

    Args:
        path: A trained-model folder, or a zip that holds one.

    Returns:
        The model; its network averages all folds. Its weights are on the CPU.

    Raises:
        BundleInvalid: A part is missing or is one that ctflow does not support; the message names file and key.
        BackendUnavailable: The package of nnU-Net's networks is not installed.
    """
    folder = TrainedFolder(path)
    spec, first = _spec(folder)
    several = len(folder.folds) > 1
    weights: dict[str, Tensor] = {}
    for number, fold in enumerate(folder.folds):
        checkpoint = read_checkpoint(folder, fold) if number else first
        if (checkpoint.configuration, checkpoint.trainer) != (first.configuration, first.trainer):
            raise BundleInvalid(
                f"{fold}/{CHECKPOINT} was trained with {checkpoint.trainer}, {checkpoint.configuration}, the first "
                f"fold with {first.trainer}, {first.configuration}: two models",
                reason="weights-mismatch",
            )
        prefix = f"{number}." if several else ""
        weights |= {f"{prefix}{name}": tensor for name, tensor in checkpoint.weights.items()}
    return Model(spec, weights, weights_digest(weights))


def read_nnunet_spec(path: Path) -> ModelSpec:
    """Read all that `read_nnunet` reads except the weights of further folds.

    Raises:
        BundleInvalid: As `read_nnunet`.
        BackendUnavailable: As `read_nnunet`.
    """
    return _spec(TrainedFolder(path))[0]


def _spec(folder: TrainedFolder) -> tuple[ModelSpec, FoldCheckpoint]:
    dataset = document_from_bytes(folder.document(DATASET), DATASET)
    plans = document_from_bytes(folder.document(PLANS), PLANS)
    _check_modality(dataset)
    labels = labels_from_dataset(dataset)
    folds = folder.folds
    if not 0 < len(folds) <= _MOST_FOLDS:
        raise BundleInvalid(
            f"fold_*/{CHECKPOINT} is missing: the training has not finished, or the folder was copied without it"
            if not folds
            else f"{len(folds)} folds; ctflow averages at most {_MOST_FOLDS}",
            reason="missing-file",
        )
    first = read_checkpoint(folder, folds[0])
    if _OTHER_NETWORKS.match(first.trainer):
        raise BundleInvalid(
            f"{folds[0]}/{CHECKPOINT}: {first.trainer} builds another network than plans.json says", reason="target"
        )
    configuration = configuration_from_plans(plans, first.configuration, labels.out_channels)
    trained = f"{first.trainer}__{_plans_name(plans)}__{first.configuration}"
    averaged = f"folds averaged: {', '.join(fold.removeprefix('fold_') for fold in folds)}"
    sidecar = document_from_bytes(folder.document(SIDECAR), SIDECAR) if SIDECAR in folder.files else {}
    name = _name(plans.get("dataset_name"), folder.name)
    about = metadata_of_labels(sidecar, name, trained[:_LONGEST], labels.segments)
    uncoded = notes_on_codes(about.segments, "no codes are known for the labels")
    steps, steps_notes = steps_of_folder(folder, [segment.number for segment in labels.segments])
    spec = ModelSpec(
        name=about.name,
        version=about.version,
        network=replace(configuration.network, members=len(folds)),
        in_channels=1,
        out_channels=labels.out_channels,
        preprocessing=configuration.steps,
        roi=configuration.roi,
        overlap=OVERLAP,
        blend="nnunet",
        batch_size=1,
        activation="sigmoid" if labels.painted else "softmax",
        threshold=0.5 if labels.painted else None,
        segments=about.segments,
        intended_use=about.intended_use,
        demonstration=about.demonstration,
        body_parts=about.body_parts,
        notes=(averaged, *configuration.notes, *labels.notes, *uncoded, *steps_notes, *about.notes),
        label_steps=steps,
        placement="even",
        mirror_axes=first.mirror_axes,
        restored="logits",
        painted=labels.painted,
    )
    return spec, first


def _plans_name(plans: Mapping[str, Any]) -> str:
    name = plans.get("plans_name", "nnUNetPlans")
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        raise invalid_plans("plans_name", f"must be a name, not {short(name)}")
    return name


def _name(given: Any, otherwise: str) -> str:
    name = given if isinstance(given, str) and given.strip() else otherwise
    name = "".join(letter for letter in name if letter.isprintable() and letter != "\\").strip()
    return name[:_LONGEST].strip() or "nnU-Net"


def _check_modality(dataset: Mapping[str, Any]) -> None:
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not isinstance(channels, Mapping) or not channels:
        raise invalid_dataset("channel_names", f"must name the input, not {short(channels)}")
    if len(channels) > 1:
        raise invalid_dataset(
            "channel_names",
            f"names {len(channels)} inputs ({', '.join(str(each)[:40] for each in list(channels.values())[:4])}); "
            "ctflow gives a model one CT: nnUNetv2_predict runs models of several images",
            "inputs",
        )
    (name,) = channels.values()
    if _OTHER_MODALITY.match(str(name).strip()):
        raise invalid_dataset(
            "channel_names",
            f"is {short(name)}: ctflow segments CT; nnUNetv2_predict runs models of other images",
            "inputs",
        )
