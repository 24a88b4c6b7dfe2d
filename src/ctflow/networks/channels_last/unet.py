"""nnU-Net's PlainConvUNet and ResidualEncoderUNet with channels last, from the operations of a SwinUNETR.

Volumes are (B, D, H, W, C). A convolution leaves its volume as it is, and gives the instance norm of it as scale and
shift: the next convolution applies them, with the leaky ReLU, while it reads. Only what several read is stored after
its norm: skips, and what is upsampled. The decoder reads an upsampled volume and a skip as two shares of the channels,
without a concatenation. A bias before an instance norm does not change its result, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ctflow.core.volume import Size3
from ctflow.networks.nnunet import PACKAGE, PLAIN, RESIDUAL
from ctflow.networks.operations import CHANNEL_STEP, EPS, SLOPE, Affine, filled_weight, spread_weight

_MODULE = f"{PACKAGE}.architectures.unet"


class _NormedConvolution:
    """A convolution with the norm of its result, which is not applied.

    Args:
        block: The package's `ConvDropoutNormReLU`.
        shares: Channels of each share of its input.
        size: (D, H, W) of its input.
        ops: The operations.
        spread: Whether its one input channel is given as `Operations.spread` does.
    """

    def __init__(self, block: Any, shares: Sequence[int], size: Size3, ops: Any, *, spread: bool = False) -> None:
        self.ops = ops
        weight, stride = block.conv.weight.detach(), tuple(block.conv.stride)
        weight = spread_weight(weight) if spread else filled_weight(weight, sum(shares))
        self.size = _divided(size, stride)
        self.run = ops.convolution(weight, shares, size, stride)
        self.normalizes = ops.normalizes(weight.shape, shares, size, stride)
        self.affine = _affine_of(block.norm, ops)

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        y, sums = self.run(shares, norm)
        return y, self.ops.norm_of(sums, math.prod(self.size), self.affine)


class _ConvolutionStack:
    """The package's `StackedConvBlocks`, without its last norm.

    Args:
        blocks: The module.
        shares: Channels of each share of its input.
        size: (D, H, W) of its input.
        ops: The operations.
        spread: As in `_NormedConvolution`.
    """

    def __init__(self, blocks: Any, shares: Sequence[int], size: Size3, ops: Any, *, spread: bool = False) -> None:
        self.ops = ops
        first, *others = blocks.convs
        self.convolutions = [_NormedConvolution(first, shares, size, ops, spread=spread)]
        self.size, self.width = self.convolutions[0].size, int(first.conv.out_channels)
        for block in others:
            self.convolutions.append(_NormedConvolution(block, (self.width,), self.size, ops))
            self.width = int(block.conv.out_channels)

    def pending(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last convolution's volume and the norm that is to be applied to it.

        Args:
            shares: Of the input.
            norm: That is to be applied to the last of them, or None.
        """
        y, pending = self.convolutions[0](shares, norm)
        for convolution in self.convolutions[1:]:
            y, pending = convolution((y,), pending)
        return y, pending

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.ops.activated(*self.pending(shares, norm)))


class _BasicBlock:
    """The package's `BasicBlockD`.

    Args:
        block: The module.
        size: (D, H, W) of its input.
        ops: The operations.
    """

    def __init__(self, block: Any, size: Size3, ops: Any) -> None:
        width = int(block.conv1.conv.in_channels)
        self.ops, self.stride = ops, tuple(block.conv1.conv.stride)
        self.first = _NormedConvolution(block.conv1, (width,), size, ops)
        self.size, self.width = self.first.size, int(block.conv1.conv.out_channels)
        self.second = _NormedConvolution(block.conv2, (self.width,), self.size, ops)
        self.beside: list[Tensor] | None = None
        if width != self.width:
            beside = block.skip[-1]
            self.beside = [beside.conv.weight.detach().flatten(1).t().contiguous().to(ops.device, ops.dtype)]
            self.affine = _affine_of(beside.norm, ops)

    def __call__(self, x: Tensor) -> Tensor:
        ops = self.ops
        y, norm = self.first([x], None)
        y, norm = self.second([y], norm)
        other = _pooled(x, self.stride)
        if self.beside is None:
            return cast(Tensor, ops.residual(y, norm, other))
        sums = ops.pointwise_sums([other], self.beside)
        beside = ops.norm_of(sums, math.prod(self.size), self.affine)
        return cast(Tensor, ops.pointwise_residual(y, norm, [other], self.beside, beside, None))


class _BasicStage:
    """The package's `StackedResidualBlocks`: arguments as of `_BasicBlock`."""

    def __init__(self, blocks: Any, size: Size3, ops: Any) -> None:
        self.blocks: list[_BasicBlock] = []
        self.size = size
        for block in blocks.blocks:
            self.blocks.append(_BasicBlock(block, self.size, ops))
            self.size = self.blocks[-1].size
        self.width = self.blocks[-1].width

    def pending(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, None]:
        """The last block's volume, to which no norm is left to be applied.

        Args:
            shares: The input alone.
            norm: None: blocks add what they read.
        """
        (x,) = shares
        for block in self.blocks:
            x = block(x)
        return x, None


class _DecoderStage:
    """A stage of the decoder.

    Args:
        up: Its transposed convolution.
        blocks: Its `StackedConvBlocks`.
        size: (D, H, W) of its output.
        ops: The operations.
    """

    def __init__(self, up: nn.ConvTranspose3d, blocks: Any, size: Size3, ops: Any) -> None:
        self.up = ops.upsampling(up.weight.detach(), None if up.bias is None else up.bias.detach())
        self.stack = _ConvolutionStack(blocks, (up.out_channels,) * 2, size, ops)

    def pending(self, x: Tensor, skip: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `_ConvolutionStack.pending`; the norm is the skip's."""
        return self.stack.pending((self.up(x), skip), norm)

    def __call__(self, x: Tensor, skip: Tensor, norm: Tensor | None) -> Tensor:
        return self.stack((self.up(x), skip), norm)


class ChannelsLastUNet:
    """One of nnU-Net's networks for windows of one size.

    Args:
        network: Of the package, in evaluation mode; `problem_of_unet` says which are supported. Is not changed.
        roi: Window size in voxels.
        ops: The operations; have the attributes `dtype` and `device`.

    Raises:
        ValueError: It is not supported.
    """

    def __init__(self, network: nn.Module, roi: Size3, ops: Any) -> None:
        problem = problem_of_unet(network, roi)
        if problem is not None:
            raise ValueError(f"this network cannot be computed with channels last: {problem}")
        net: Any = network
        self.ops, encoder, decoder = ops, net.encoder, net.decoder
        stem = getattr(encoder, "stem", None)
        first = (encoder.stages[0][0] if stem is None else stem).convs[0].conv
        cin = int(first.in_channels)
        self.spread = cin == 1 and tuple(first.kernel_size) == (3, 3, 3)
        self.channels = cin + -cin % CHANNEL_STEP
        self.encoders: list[_ConvolutionStack | _BasicStage] = []
        size, shares = roi, (self.channels,)
        self.stem = None if stem is None else _ConvolutionStack(stem, shares, size, ops, spread=self.spread)
        for number, stage in enumerate(encoder.stages):
            made: _ConvolutionStack | _BasicStage
            if stem is None:
                made = _ConvolutionStack(stage[0], shares, size, ops, spread=self.spread and number == 0)
            else:
                made = _BasicStage(stage, size, ops)
            self.encoders.append(made)
            size, shares = made.size, (made.width,)
        sizes = [stage.size for stage in reversed(self.encoders[:-1])]
        self.decoders = [
            _DecoderStage(up, blocks, target, ops)
            for up, blocks, target in zip(decoder.transpconvs, decoder.stages, sizes, strict=True)
        ]
        self.kept = [*map(_keeps_norm, self.encoders, self.encoders[1:], reversed(self.decoders)), False]
        head = decoder.seg_layers[-1]
        self.head = (
            head.weight.detach().flatten(1).float().contiguous().to(ops.device),
            head.bias.detach().float().to(ops.device),
        )

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) float32 -> (B, C_out, D, H, W) float32 logits."""
        x = self.ops.spread(windows) if self.spread else self.ops.filled(windows, self.channels)
        if self.stem is not None:
            x = self.stem((x,))
        norm: Tensor | None = None
        skips = []
        for stage, kept in zip(self.encoders, self.kept, strict=True):
            x, norm = stage.pending((x,), norm)
            if norm is not None and not kept:
                x, norm = self.ops.activated(x, norm), None
            skips.append((x, norm))
        del skips[-1]
        for up in self.decoders[:-1]:
            x = up(x, *skips.pop())
        return cast(Tensor, self.ops.activated_head(*self.decoders[-1].pending(x, *skips.pop()), self.head))


def _keeps_norm(stage: Any, following: Any, decoder: _DecoderStage) -> bool:
    """Whether a stage's output is stored before its norm, because both that read it apply it."""
    if not isinstance(stage, _ConvolutionStack) or not isinstance(following, _ConvolutionStack):
        return False
    return bool(following.convolutions[0].normalizes and decoder.stack.convolutions[0].normalizes)


def _affine_of(norm: Any, ops: Any) -> Affine | None:
    """An instance norm's own scale and shift."""
    if norm.weight is None:
        return None
    return norm.weight.detach().float().to(ops.device), norm.bias.detach().float().to(ops.device)


def _pooled(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The mean of each `stride` of voxels, in the volume's own type."""
    if math.prod(stride) == 1:
        return x
    batch, d, h, w, channels = x.shape
    kd, kh, kw = stride
    parts = x.reshape(batch, d // kd, kd, h // kh, kh, w // kw, kw, channels)
    return parts.mean((2, 4, 6), dtype=torch.float32).to(x.dtype)


def _divided(size: Size3, stride: Sequence[int]) -> Size3:
    d, h, w = (length // by for length, by in zip(size, stride, strict=True))
    return d, h, w


def is_nnunet_module(network: nn.Module) -> bool:
    """Whether a network is one of the package's two that ctflow builds; it is not imported to find out."""
    return type(network).__module__ == _MODULE and type(network).__name__ in (PLAIN, RESIDUAL)


def problem_of_unet(network: nn.Module, roi: Size3) -> str | None:
    """Why a network of nnU-Net is not computed with channels last; None if it is.

    Args:
        network: One for which `is_nnunet_module` is true.
        roi: Window size in voxels.
    """
    if not is_nnunet_module(network):
        return "it does not come from nnU-Net"
    net: Any = network
    if net.decoder.deep_supervision:
        return "it gives the outputs of deep supervision"
    problems = [*_problems_of_stages(net.encoder), *(_problems_of_convolutions(net))]
    return next(iter(problems), None) or _problem_of_size(net.encoder.strides, roi)


def _problems_of_stages(encoder: Any) -> Iterator[str]:
    """What the encoder has that is not computed here."""
    for stage in encoder.stages:
        if getattr(encoder, "stem", None) is None:
            if len(stage) != 1:
                yield "its encoder pools"
            continue
        for block in getattr(stage, "blocks", (stage,)):
            if type(block).__name__ != "BasicBlockD":
                yield f"its residual blocks are {type(block).__name__}"
            elif block.apply_se:
                yield "its residual blocks have squeeze and excitation"


def _problems_of_convolutions(net: Any) -> Iterator[str]:
    """What the convolutions have that is not computed here."""
    blocks = [module for module in net.modules() if type(module).__name__ == "BasicBlockD"]
    # The last convolution of a residual block has no activation of its own, nor has the one beside it.
    plain = {block.conv2 for block in blocks} | {part for block in blocks for part in _parts(block.skip)}
    for module in net.modules():
        if type(module).__name__ != "ConvDropoutNormReLU":
            continue
        conv, norm, rectified = module.conv, getattr(module, "norm", None), getattr(module, "nonlin", None)
        if type(conv) is not nn.Conv3d or conv.groups != 1 or conv.padding_mode != "zeros":
            yield "its convolutions are not plain ones of three dimensions"
        elif not all(length % 2 for length in conv.kernel_size):
            yield f"it has a kernel of even size, {tuple(conv.kernel_size)}"
        if type(norm) is not nn.InstanceNorm3d or norm.track_running_stats:
            yield f"its norm is {type(norm).__name__}, not the instance norm of a window alone"
        elif norm.eps != EPS:
            yield f"its instance norms have eps {norm.eps:g}, not {EPS:g}"
        if (rectified is None) != (module in plain) or not isinstance(rectified, nn.LeakyReLU | None):
            yield f"its activation is {type(rectified).__name__}, not LeakyReLU"
        elif rectified is not None and rectified.negative_slope != SLOPE:
            yield f"its leaky ReLUs have slope {rectified.negative_slope:g}, not {SLOPE:g}"
        elif rectified is not None and module.all_modules[-1] is not rectified:
            yield "its activations come before the norms"


def _parts(skip: Any) -> list[nn.Module]:
    return list(skip) if isinstance(skip, nn.Sequential) else []


def _problem_of_size(strides: Sequence[Sequence[int]], roi: Size3) -> str | None:
    """Whether windows of this size fit the encoder's strides."""
    if math.prod(strides[0]) != 1:
        return f"its first stage has the stride {tuple(strides[0])}"
    factors = [math.prod(each) for each in zip(*strides, strict=True)]
    if any(length % factor for length, factor in zip(roi, factors, strict=True)):
        return f"{' x '.join(map(str, roi))} is no multiple of {' x '.join(map(str, factors))}"
    if math.prod(roi) == math.prod(factors):
        return "its deepest stage has a single voxel"
    return None
