"""The networks that nnU-Net trains, of `dynamic_network_architectures`, from the arguments in a plans.json.

A plans.json names classes by text, which nnU-Net looks up anywhere in the process. Here only the names in `_CLASSES`
mean a class; any other is rejected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ctflow.core.errors import BackendUnavailable, BundleInvalid

PACKAGE = "dynamic_network_architectures"
PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
# Older plans name the module that held the residual network then.
_HOMES = {
    f"{PACKAGE}.architectures.unet.{PLAIN}": PLAIN,
    f"{PACKAGE}.architectures.unet.{RESIDUAL}": RESIDUAL,
    f"{PACKAGE}.architectures.residual_unet.{RESIDUAL}": RESIDUAL,
}
_CLASSES: Mapping[str, type[nn.Module]] = {
    f"torch.nn.{module}{kind.__name__}": kind
    for kinds, home in (
        ((nn.Conv3d,), "modules.conv."),
        ((nn.InstanceNorm3d,), "modules.instancenorm."),
        ((nn.BatchNorm3d,), "modules.batchnorm."),
        ((nn.LeakyReLU, nn.ReLU, nn.GELU, nn.ELU, nn.PReLU, nn.SiLU), "modules.activation."),
        ((nn.Dropout3d, nn.Dropout), "modules.dropout."),
    )
    for kind in kinds
    for module in ("", home)
}
CLASS_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")


def is_nnunet_network(name: str) -> bool:
    """Whether a `NetworkSpec.name` is a dotted one."""
    return "." in name


def check_nnunet_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Reject a network that ctflow does not build, before its weights are read.

    Args:
        name: The network's dotted name.
        arguments: Its arguments, classes by name.

    Raises:
        BundleInvalid: The network or a class is another one, or the network has no such argument.
        BackendUnavailable: The package of the networks is not installed.
    """
    known = inspect.signature(_network_class(name)).parameters
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise BundleInvalid(
            f"plans.json: {name.rpartition('.')[2]} of the installed {PACKAGE} has no argument {unknown[0][:80]!r}",
            reason="argument",
        )
    for argument in CLASS_ARGUMENTS:
        _class(argument, arguments.get(argument))


def nnunet_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make a network with arbitrary weights.

    Raises:
        BundleInvalid: As `check_nnunet_arguments`.
        BackendUnavailable: As `check_nnunet_arguments`.
    """
    check_nnunet_arguments(name, arguments)
    classes = {argument: _class(argument, arguments.get(argument)) for argument in CLASS_ARGUMENTS}
    # Deep supervision gives coarser outputs along with the finest, for training only.
    given = {**arguments, **classes, "deep_supervision": False}
    return _network_class(name)(**given)


def _network_class(name: str) -> type[nn.Module]:
    if name not in _HOMES:
        raise BundleInvalid(
            f"plans.json: the network is {name[:120]!r}; ctflow runs {PLAIN} and {RESIDUAL} of {PACKAGE}",
            reason="target",
        )
    try:
        module = importlib.import_module("dynamic_network_architectures.architectures.unet")
    except ImportError as error:
        raise BackendUnavailable(
            f"nnU-Net's networks need the package {PACKAGE}: python -m pip install 'ctflow[nnunet]'",
            reason="not-installed",
        ) from error
    found: type[nn.Module] = getattr(module, _HOMES[name])
    return found


def _class(argument: str, name: Any) -> type[nn.Module] | None:
    if name is None and argument != "conv_op":
        return None
    if not isinstance(name, str) or name not in _CLASSES:
        raise BundleInvalid(
            f"plans.json: {argument} is {str(name)[:80]!r}; ctflow knows {', '.join(_known(argument))}",
            reason="argument",
        )
    return _CLASSES[name]


def _known(argument: str) -> list[str]:
    parts = {"conv_op": ("Conv",), "norm_op": ("Norm",), "dropout_op": ("Dropout",)}.get(argument, ("LU",))
    return sorted({kind.__name__ for kind in _CLASSES.values() if any(part in kind.__name__ for part in parts)})
