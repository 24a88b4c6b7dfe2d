"""Logits to a label map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import ModelSpec
from ctflow.core.steps import CropCenter, CropForeground
from ctflow.core.volume import Labels
from ctflow.networks.head import is_two_class

_WHOLE = 255  # the fraction for a probability of 1


def probabilities_from_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """Turn blended logits into probabilities on the network's grid.

    Args:
        logits: (1, C, X, Y, Z) float32; for two-class softmax also (1, 1, X, Y, Z), logit 1 minus logit 0.
        spec: The model's activation and channels.

    Returns:
        (C, X, Y, Z) float32, of an ensemble as `combined_probabilities`; logits if these are to be restored; for
        two-class softmax (1, X, Y, Z), the probability of class 1, which is equivalent. Both classes if preprocessing
        crops: restored to the source grid they no longer sum to 1 at the cropped region's edge.

    Raises:
        BundleInvalid: The network returned NaN or infinity, or a number of channels other than the bundle's.
    """
    folded = _check(logits, spec)
    if spec.network.is_stacked:
        return combined_probabilities(logits[0], spec)
    if spec.activation == "softmax":
        if is_two_class(spec):
            marked = torch.sigmoid(logits[0] if folded else logits[0, 1:2] - logits[0, 0:1])
            return torch.cat([1 - marked, marked]) if _is_cropped(spec) else marked
        return torch.softmax(logits[0], dim=0)
    return torch.sigmoid(logits[0]) if spec.activation == "sigmoid" else logits[0]


def values_to_restore(logits: Tensor, spec: ModelSpec, *, fractional: bool) -> Tensor:
    """What is interpolated on the source grid: probabilities, or the logits of a model of nnU-Net.

    Args:
        logits: (1, C, X, Y, Z) float32, as in `probabilities_from_logits`.
        spec: The model.
        fractional: Whether `fractions_from_restored` is wanted. Logits are then followed by a channel of ones: it is 0
            where a crop removed the volume, and logits of 0 would mean that all classes are equally likely.

    Raises:
        BundleInvalid: As `probabilities_from_logits`.
    """
    if spec.restored == "probabilities":
        return probabilities_from_logits(logits, spec)
    _check(logits, spec)
    return torch.cat([logits[0], torch.ones_like(logits[0, :1])]) if fractional else logits[0]


def count_of_values(channels: int, spec: ModelSpec, *, fractional: bool) -> int:
    """How many channels `values_to_restore` makes of logits with some."""
    if spec.restored == "probabilities" and is_two_class(spec):
        return 2 if _is_cropped(spec) else 1
    if spec.restored == "probabilities" and spec.network.is_stacked and spec.network.combined == "probabilities":
        return channels // spec.network.members
    return channels + (fractional and spec.restored == "logits")


def labels_from_restored(values: Tensor, spec: ModelSpec) -> Tensor:
    """Mark voxels.

    Args:
        values: (C, D, H, W), restored from `values_to_restore`, without the channel of ones.
        spec: The model.

    Returns:
        (D, H, W) uint8 on the same device; 0 is background.

    Source: nnU-Net 2.8.1 `LabelManager.convert_logits_to_segmentation`.
    """
    if spec.restored == "probabilities":
        return labels_from_probabilities(values, spec)
    if spec.network.is_stacked:
        return labels_from_probabilities(combined_probabilities(values, spec), spec)
    if spec.painted and spec.activation == "sigmoid":
        return _painted(torch.sigmoid(values) > 0.5, spec.painted)
    if is_two_class(spec) and len(values) == 1:
        return (values[0] > 0).to(torch.uint8)
    if spec.threshold is not None:
        probabilities = torch.sigmoid(values) if spec.activation == "sigmoid" else values
        return labels_from_probabilities(probabilities, spec)
    return values.argmax(dim=0).to(torch.uint8)


def fractions_from_restored(values: Tensor, labels: Tensor, spec: ModelSpec) -> Tensor:
    """Each segment's probability in 255ths: `fractions_from_probabilities` of restored values.

    Args:
        values: (C, D, H, W), restored from `values_to_restore`.
        labels: The result of `labels_from_restored`.
        spec: The model.
    """
    if spec.restored == "probabilities":
        return fractions_from_probabilities(values, labels, spec)
    logits, inside = values[:-1], values[-1] > 0.5
    if spec.network.is_stacked:
        probabilities = combined_probabilities(logits, spec)
    else:
        probabilities = torch.sigmoid(logits) if len(logits) == 1 else torch.softmax(logits, dim=0)
    return fractions_from_probabilities(probabilities, labels, spec) * inside


def _check(logits: Tensor, spec: ModelSpec) -> bool:
    """Whether the logits are one channel that stands for two classes; see `probabilities_from_logits`."""
    folded = is_two_class(spec) and logits.shape[1] == 1
    if logits.shape[1] != spec.out_channels and not folded:
        raise BundleInvalid(
            f"the network returned {logits.shape[1]} channels; the bundle says {spec.out_channels}",
            reason="output-channels",
        )
    if not bool(torch.isfinite(logits).all()):
        raise BundleInvalid(
            "the network returned non-finite values: its weights or the precision do not suit it",
            reason="output-not-finite",
        )
    return folded


def _is_cropped(spec: ModelSpec) -> bool:
    return any(isinstance(step, CropForeground | CropCenter) for step in spec.preprocessing)


def combined_probabilities(logits: Tensor, spec: ModelSpec) -> Tensor:
    """The members' logits of an ensemble, activated, and their mean (MONAI's MeanEnsemble).

    Args:
        logits: (members * C, X, Y, Z), on any grid.
        spec: The model; its network's output is stacked.

    Returns:
        (C, X, Y, Z), the members' mean; of members that vote, (members * C, X, Y, Z).
    """
    network = spec.network
    members = [_activated(one, spec) for one in logits.chunk(network.members)]
    if network.combined == "votes":
        return torch.cat(members)
    shares = network.shares or (1 / network.members,) * network.members
    mean = members[0] * shares[0]
    for member, share in zip(members[1:], shares[1:], strict=True):
        mean += member * share
    return mean


def channels_marked(probabilities: Tensor, spec: ModelSpec, threshold: float) -> Tensor:
    """What reaches the threshold, or does so for more than half of the members.

    Args:
        probabilities: From `combined_probabilities`, on any grid.
        spec: The model.
        threshold: Its threshold.

    Returns:
        (C, D, H, W) bool.
    """
    marked = probabilities >= threshold  # MONAI's AsDiscrete marks a voxel at the threshold
    if spec.network.combined != "votes":
        return marked
    votes = torch.stack(marked.chunk(spec.network.members)).sum(0, dtype=torch.uint8)
    most: Tensor = 2 * votes > spec.network.members
    return most


def class_given(probabilities: Tensor, spec: ModelSpec) -> Tensor:
    """The class of the largest probability, or the one that most members give; the first of several.

    Args:
        probabilities: From `combined_probabilities`, on any grid.
        spec: The model; it takes the argmax.

    Returns:
        (D, H, W) uint8.
    """
    if spec.network.combined != "votes":
        return probabilities.argmax(0).to(torch.uint8)
    labels = torch.stack([one.argmax(0).to(torch.uint8) for one in probabilities.chunk(spec.network.members)])
    found, most = torch.zeros_like(labels[0]), torch.zeros_like(labels[0])
    for label in range(len(probabilities) // spec.network.members):  # one class at a time: there may be 105
        votes = (labels == label).sum(0, dtype=torch.uint8)
        found[votes > most] = label
        most = torch.maximum(most, votes)
    return found


def _activated(logits: Tensor, spec: ModelSpec) -> Tensor:
    if spec.activation == "softmax":
        return torch.softmax(logits, dim=0)
    return torch.sigmoid(logits) if spec.activation == "sigmoid" else logits


def labels_from_probabilities(probabilities: Tensor, spec: ModelSpec) -> Tensor:
    """Mark voxels.

    Args:
        probabilities: (C, D, H, W) from `probabilities_from_logits`, on any grid.
        spec: The model's threshold.

    Returns:
        (D, H, W) uint8 on the same device; 0 is background.
    """
    if is_two_class(spec) and len(probabilities) == 1:
        labels = probabilities[0] > 0.5
    elif spec.threshold is None:
        labels = class_given(probabilities, spec)
    else:
        marked = channels_marked(probabilities, spec, spec.threshold)
        labels = _painted(marked, spec.painted) if spec.painted else marked[0]
    return labels.to(torch.uint8)


def _painted(marked: Tensor, labels: Sequence[int]) -> Tensor:
    """The labels of channels, each over those before it."""
    found = torch.zeros(marked.shape[1:], dtype=torch.uint8, device=marked.device)
    for channel, label in zip(marked, labels, strict=True):
        found[channel] = label
    return found


def fractions_from_probabilities(probabilities: Tensor, labels: Tensor, spec: ModelSpec) -> Tensor:
    """Each segment's probability in 255ths.

    Args:
        probabilities: (C, D, H, W) from `probabilities_from_logits`, on any grid.
        labels: (D, H, W), the result of `labels_from_probabilities`.
        spec: The model's activation and threshold.

    Returns:
        (S, D, H, W) uint8 on the same device, one channel per segment, rounded so that the mask can be read from it: in
        a marked voxel its segment's fraction exceeds every other and the background's remainder; in any other voxel
        the background has the most. This does not hold if the threshold is not one half.
    """
    background = 1 if spec.activation == "softmax" and len(probabilities) > 1 else 0
    fractions = (probabilities[background:] * _WHOLE).round().clamp(0, _WHOLE).to(torch.int16)
    if spec.threshold in (None, 0.5):
        _agree(fractions.flatten(1), labels.flatten().long())
    return fractions.to(torch.uint8)


def _agree(fractions: Tensor, labels: Tensor) -> None:
    """Adjust fractions (S, n) by single 255ths, in place, until they give the labels (n,); rounding makes ties."""
    open_ones = torch.arange(len(labels), device=labels.device)
    for _ in range(_WHOLE):
        values, wanted = fractions[:, open_ones], labels[open_ones]
        marked = wanted > 0
        own_row = (wanted - 1).clamp(min=0).unsqueeze(0)
        own = values.gather(0, own_row)[0]
        others = values.scatter(0, own_row, torch.where(marked, -1, own).unsqueeze(0).to(values.dtype))
        largest, row = others.max(dim=0)
        rest = _WHOLE - values.sum(dim=0)
        wrong = torch.where(marked, (own <= largest) | (own <= rest), largest > rest)
        if not bool(wrong.any()):
            return
        open_ones, marked, row, own_row = open_ones[wrong], marked[wrong], row[wrong], own_row[0, wrong]
        lower = ~marked | (own <= largest)[wrong]
        fractions[row[lower], open_ones[lower]] -= 1
        fractions[own_row[marked], open_ones[marked]] += 1


def bytes_on_host(values: Tensor) -> Labels:
    """Bring uint8 of any shape to the CPU; data already there share their memory.

    A byte per voxel, even for a mask: a CPU unpacks bits more slowly than a GPU's link transfers eight times as many.
    """
    host = values.to("cpu", non_blocking=True)  # torch uses pinned memory for it
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    copied: Labels = host.numpy()
    return copied
