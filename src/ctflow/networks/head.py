"""One output channel instead of two, exactly: softmax over two logits is the sigmoid of their difference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ctflow.core.model import ModelSpec

_PROBES = (32, 64)  # voxels per side: enough for MONAI's networks, and faster than a whole window
_SAME = 1e-5  # largest difference of the probe, relative to the largest logit


def is_two_class(spec: ModelSpec) -> bool:
    """Whether softmax and argmax over two channels need only the difference of the two."""
    return spec.activation == "softmax" and spec.out_channels == 2 and spec.threshold is None


def fold_two_class_head(network: nn.Module, spec: ModelSpec, *, probe: bool = True) -> tuple[nn.Module, bool]:
    """Replace the last convolution of a two-class network by one that gives the difference of its two logits.

    Args:
        network: In evaluation mode; is not changed.
        spec: The model's activation, threshold and channels.
        probe: Whether a small window is computed, on the CPU, to check that nothing follows the convolution. A caller
            that skips it compares with `network` later.

    Returns:
        A copy of the network that gives (B, 1, D, H, W), logit 1 minus logit 0, and True; or `network` itself and
        False if the model is not two-class softmax, or if the network's output is not that of a plain convolution.
    """
    if not is_two_class(spec):
        return network, False
    name = _last_convolution(network)
    if name is None:
        return network, False
    convolution = network.get_submodule(name)
    one = _difference(convolution)  # type: ignore[arg-type]  # _last_convolution has checked the class
    if probe and not _agrees(network, convolution, one, spec):
        return network, False
    folded = copy.deepcopy(network)
    folded.set_submodule(name, one)
    return folded, True


def _last_convolution(network: nn.Module) -> str | None:
    """Name of the 1x1x1 convolution to two channels at the end of the network."""
    with_weights = [
        (name, module) for name, module in network.named_modules() if list(module.parameters(recurse=False))
    ]
    if not with_weights:
        return None
    name, last = with_weights[-1]
    if not name or type(last) is not nn.Conv3d:
        return None
    plain = last.out_channels == 2 and set(last.kernel_size) == set(last.stride) == {1} and last.groups == 1
    return name if plain else None


def _difference(convolution: nn.Conv3d) -> nn.Conv3d:
    """The convolution with weights w1 - w0 and bias b1 - b0."""
    one = copy.deepcopy(convolution)
    one.out_channels = 1
    weight, bias = convolution.weight.detach(), convolution.bias
    one.weight = nn.Parameter(weight[1:2] - weight[0:1], requires_grad=False)
    if bias is not None:
        one.bias = nn.Parameter(bias.detach()[1:2] - bias.detach()[0:1], requires_grad=False)
    return one


def _agrees(network: nn.Module, convolution: nn.Module, one: nn.Module, spec: ModelSpec) -> bool:
    """Whether the network's output is the convolution's, untouched, and `one` gives the difference of its channels."""
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, given: tuple[Any, ...], answer: Tensor) -> None:
        seen.append((given[0], answer))

    for size in (*((side,) * 3 for side in _PROBES), spec.roi):
        noise = torch.rand((1, spec.in_channels, *size), generator=torch.Generator().manual_seed(0))
        seen.clear()
        handle = convolution.register_forward_hook(remember)
        try:
            with torch.inference_mode():
                output = network(noise)
        except (RuntimeError, ValueError, IndexError):
            continue  # too small for this network
        finally:
            handle.remove()
        # The very tensor that the convolution made: nothing follows it.
        if len(seen) != 1 or output is not seen[0][1]:
            return False
        with torch.inference_mode():
            error = (one(seen[0][0]) - (output[:, 1:2] - output[:, 0:1])).abs().max()
        return bool(error <= _SAME * output.abs().max())
    return False
