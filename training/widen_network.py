"""Make the weights of a wider SwinUNETR that computes the same as a trained narrow one.

    python training/widen_network.py OUT.pt [--feature-size 48] [--noise 0.01]

Every channel of the demonstration network becomes several equal ones, and the layers that read them take their mean
(Net2Net, Chen, Goodfellow and Shlens, 2016). Training, or a benchmark, then starts from meaningful masks. A little
noise lets training separate the copies.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import network_from_spec

_QUERY_KEY_VALUE = "attn.qkv."


def widen_weights(
    narrow: Mapping[str, Tensor], wide: nn.Module, *, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of a wider SwinUNETR with the same result.

    Args:
        narrow: State dict of the same network at a feature_size that divides the wide one's.
        wide: The network to fill; only the shapes of its weights are read. It has as many heads, and wider ones.
        noise: Standard deviation of the noise on each weight, relative to that of its tensor.
        seed: Of the noise.

    Returns:
        State dict of `wide`.
    """
    generator = torch.Generator().manual_seed(seed)
    transposed = {name for name, module in wide.named_modules() if isinstance(module, nn.ConvTranspose3d)}
    widened = {}
    for name, like in wide.state_dict().items():
        value = narrow[name]
        module = name.rpartition(".")[0]
        reads = 0 if module in transposed else 1
        for axis, (size, wanted) in enumerate(zip(value.shape, like.shape, strict=True)):
            times = wanted // size
            if times == 1:
                continue
            value = value.repeat_interleave(times, dim=axis)
            if axis == reads and like.ndim > 1:
                value = value / times
        if _QUERY_KEY_VALUE in name:
            value = _scaled_queries(value, like.shape[0] // narrow[name].shape[0])
        if noise and value.is_floating_point() and value.ndim > 1:
            value = value + noise * value.std() * torch.randn(value.shape, generator=generator)
        widened[name] = value
    return widened


def _scaled_queries(value: Tensor, times: int) -> Tensor:
    """A query-key product has `times` as many equal terms, but attention divides only by the root of that."""
    value = value.clone()
    value[: len(value) // 3] /= math.sqrt(times)
    return value


def main() -> None:
    """Write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--noise", type=float, default=0.01)
    words = parser.parse_args()
    model = read_bundle(demonstration_bundle())
    arguments = dict(model.spec.network.arguments)
    if words.feature_size <= 0 or words.feature_size % arguments["feature_size"]:
        parser.error(f"--feature-size: a multiple of {arguments['feature_size']}")
    wide = network_from_spec(NetworkSpec(model.spec.network.name, {**arguments, "feature_size": words.feature_size}))
    torch.save(widen_weights(model.weights, wide, noise=words.noise), words.out)


if __name__ == "__main__":
    main()
