"""Combining an ensemble's members, against MONAI's transforms on the same logits."""

from __future__ import annotations

import pytest
import torch
from monai.transforms import Activations, AsDiscrete, MeanEnsemble, VoteEnsemble

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.export.parity import marked
from ctflow.transforms.postprocess import (
    fractions_from_probabilities,
    labels_from_probabilities,
    labels_from_restored,
    probabilities_from_logits,
)

SHAPE = (6, 5, 7)


def spec_of(combined, members, channels, activation, threshold, shares=(), restored="probabilities"):
    network = NetworkSpec("UNet", {}, members=members, combined=combined, shares=shares)
    painted = tuple(range(1, channels + 1)) if threshold is not None and channels > 1 else ()
    return ModelSpec(
        "m", "1", network, 1, members * channels, (), (8, 8, 8), 0.25, "gaussian", 1, activation, threshold,
        (), "", False, painted=painted, restored=restored,
    )  # fmt: skip


def logits_of(members, channels, *, coarse):
    """With few different values, so that votes and probabilities tie."""
    given = torch.randn((members, channels, *SHAPE), generator=torch.Generator().manual_seed(members * channels))
    return given.round() if coarse else given


def by_monai(logits, spec, weights):
    """MONAI's chain of array transforms, (1, ...) or (C, ...) labels."""
    activate = Activations(softmax=spec.activation == "softmax", sigmoid=spec.activation == "sigmoid")
    discrete = AsDiscrete(argmax=spec.threshold is None, threshold=spec.threshold)
    activated = [activate(one) for one in logits]
    if spec.network.combined == "probabilities":
        return discrete(MeanEnsemble(weights)(activated))
    classes = len(logits[0]) if spec.threshold is None else None
    return VoteEnsemble(num_classes=classes)([discrete(one) for one in activated])


CASES = [
    ("probabilities", 3, 4, "softmax", None, ()),
    ("probabilities", 3, 4, "softmax", None, (3, 1, 2)),
    ("probabilities", 2, 2, "softmax", None, (0.7, 0.3)),
    ("probabilities", 3, 1, "sigmoid", 0.5, (1, 1, 2)),
    ("probabilities", 4, 3, "sigmoid", 0.4, ()),
    ("votes", 3, 4, "softmax", None, ()),
    ("votes", 4, 5, "none", None, ()),
    ("votes", 50, 2, "softmax", None, ()),
    ("votes", 4, 1, "sigmoid", 0.5, ()),
    ("votes", 4, 3, "sigmoid", 0.5, ()),
    ("votes", 5, 3, "sigmoid", 0.3, ()),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("coarse", [False, True])
def test_labels_are_monais(case, coarse):
    combined, members, channels, activation, threshold, weights = case
    shares = tuple(weight / sum(weights) for weight in weights)
    spec = spec_of(combined, members, channels, activation, threshold, shares)
    logits = logits_of(members, channels, coarse=coarse and combined == "votes")
    expected = by_monai(logits, spec, weights or None)
    if spec.painted:
        painted = torch.zeros(SHAPE)
        for number, mask in enumerate(expected, start=1):
            painted[mask > 0.5] = number
        expected = painted[None]
    stacked = logits.flatten(0, 1)
    found = labels_from_probabilities(probabilities_from_logits(stacked[None], spec), spec)
    assert torch.equal(found.long(), expected[0].long())
    assert len(found.unique()) > 1
    restored = spec_of(combined, members, channels, activation, threshold, shares, restored="logits")
    assert torch.equal(labels_from_restored(stacked, restored), found)


def test_what_an_engine_marks_is_what_is_marked_in_the_end():
    for combined, members, channels, activation, threshold, _ in CASES:
        spec = spec_of(combined, members, channels, activation, threshold)
        logits = logits_of(members, channels, coarse=False).flatten(0, 1)
        labels = labels_from_probabilities(probabilities_from_logits(logits[None], spec), spec)
        masks = marked(logits, Model(spec, {}, "d" * 64))
        assert len(masks) == (channels if threshold is not None else channels - 1)
        assert torch.equal(masks.any(0), labels > 0)


def test_probabilities_of_a_mean_are_the_fractions():
    spec = spec_of("probabilities", 3, 3, "softmax", None)
    logits = logits_of(3, 3, coarse=False)
    probabilities = probabilities_from_logits(logits.flatten(0, 1)[None], spec)
    labels = labels_from_probabilities(probabilities, spec)
    fractions = fractions_from_probabilities(probabilities, labels, spec)
    assert fractions.shape == (2, *SHAPE)
    expected = logits.softmax(1).mean(0)[1:] * 255
    assert (fractions.float() - expected).abs().max() <= 1.5
