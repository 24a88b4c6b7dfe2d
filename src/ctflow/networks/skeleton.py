"""A network's names and shapes without its data: what a few words of a stranger's configuration would allocate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ctflow.core.errors import BundleInvalid

MOST_ELEMENTS = 2**26  # of a tensor that a constructor computes with: SwinUNETR's tables of offsets have 400,000
_SMALL = 2**16  # numbers of a range, and of a random table that a constructor computes with, as VISTA-3D's does
_RANDOM = frozenset({torch.rand, torch.randn})
_RANGES = frozenset({torch.arange, torch.linspace})
# Constructors that begin with these values; others (ranges, tensors of given numbers) are small and keep their data, as
# DropPath's rates are read from them.
_FILLED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_strided, torch.normal, *_RANDOM})
_FILLS = frozenset(
    {
        *(Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.copy_),
        *(Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
    }
)


class ShapesOnly(TorchFunctionMode):
    """Within this context tensors that a constructor fills have a shape only, on the device "meta".

    Filling them does nothing: there torch's own way imports its compiler, which takes seconds.

    Args:
        most: Tensors that may be made.

    Attributes:
        elements: Numbers that these tensors would have.

    Raises:
        BundleInvalid: More of them, or computing with a tensor that is too large.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left, self.elements = most, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        given = dict(kwargs or {})
        if func in _FILLED:
            self._left -= 1
            if self._left < 0:
                raise BundleInvalid(
                    "models/model.pt does not fit network_def: the network has many more parts than the weights",
                    reason="weights-mismatch",
                )
            made = func(*args, **{**given, "device": "meta"})
            self.elements += made.numel()
            is_small_table = func in _RANDOM and made.numel() <= _SMALL
            return func(*args, **given) if is_small_table else made
        if func in _FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else given["tensor"]
            if tensor.is_meta:
                return tensor
        _check_size(func, args)
        return func(*args, **given)


def _check_size(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    shapes = [each.shape for each in args if isinstance(each, Tensor) and not each.is_meta]
    try:
        # NumPy's, as torch's imports SymPy, which takes half a second.
        size = math.prod(np.broadcast_shapes(*shapes)) if len(shapes) > 1 else 0
    except ValueError:
        size = 0  # no arithmetic of two tensors
    is_long = func in _RANGES and any(isinstance(each, int | float) and abs(each) > _SMALL for each in args)
    if is_long or size > MOST_ELEMENTS:
        raise BundleInvalid("network_def: its arguments make a table of too many numbers", reason="network")
