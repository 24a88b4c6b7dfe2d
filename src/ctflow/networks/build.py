"""A network of MONAI or nnU-Net from its name and arguments, with a model's weights."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctflow.compat.monai import import_monai
from ctflow.core.errors import BundleInvalid, first_line
from ctflow.core.model import Model, NetworkSpec, OwnCode
from ctflow.networks import vista3d
from ctflow.networks.dints import with_listed_paths
from ctflow.networks.native import MODULES, native_class
from ctflow.networks.nnunet import check_nnunet_arguments, is_nnunet_network, nnunet_network
from ctflow.networks.own_code import TORCHSCRIPT, own_class, scripted_network
from ctflow.networks.skeleton import MOST_ELEMENTS, ShapesOnly

_PACKAGE = "monai.networks.nets"
LARGEST_ARGUMENT = 65_536  # far above any real width, size or count; more would only fill the memory
_TENSORS_PER_WEIGHT, _FEWEST_TENSORS = 8, 1_000  # made while a network is: the known ones make at most 1.2 per weight
_NAMED = 3  # keys that a message names
# Arguments that MONAI has removed since and that never changed the result: dropped with a note.
_DROPPED = {"SwinUNETR": ("img_size",)}
# Arguments that MONAI has renamed: the same value goes to the new name.
_RENAMED = {
    "UNETR": {"pos_embed": "proj_type"},
    "UNet": {"dimensions": "spatial_dims"},
    "BasicUNet": {"dimensions": "spatial_dims"},
}
# Arguments that are arrays, and that a bundle's description gives as lists.
_ARRAYS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "DiNTS": {"node_a": torch.tensor},
    "TopologyInstance": {"arch_code": lambda codes: [np.array(code) for code in codes]},
}
# What constructors raise for arguments that do not fit each other.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def network_class(name: str) -> type[nn.Module]:
    """The class of `monai.networks.nets` with this name.

    Args:
        name: A plain class name.

    Raises:
        BundleInvalid: There is none.
    """
    nets = _networks_of_monai()
    found = None
    if name.isidentifier() and "_" not in name:
        found = getattr(nets, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__.startswith(f"{_PACKAGE}.")):
        raise BundleInvalid(
            f"network_def#_target_ is {name[:80]!r}; ctflow accepts only networks of {_PACKAGE}", reason="target"
        )
    network: type[nn.Module] = found
    return network


def _networks_of_monai() -> ModuleType:
    """Import `monai.networks.nets`; late, as it takes a second and `ctflow --help` does not need it."""
    with warnings.catch_warnings():
        # MONAI 1.6 scripts functions at import, which torch 2.13 deprecates; users of ctflow cannot change it.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        import_monai()
        return importlib.import_module(_PACKAGE)


def current_arguments(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Adapt a bundle's arguments to the installed MONAI.

    Args:
        name: Class name.
        arguments: The bundle's arguments.

    Returns:
        The arguments that the class takes, and a note for each that was dropped or renamed.

    Raises:
        BundleInvalid: The class does not exist, does not know an argument, or would fetch weights.
    """
    parameters = _parameters(
        name, {key: value for key, value in arguments.items() if key not in _DROPPED.get(name, ())}
    )
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    result: dict[str, Any] = {}
    notes = []
    for given, value in arguments.items():
        key = given
        if given not in parameters and given in _DROPPED.get(name, ()):
            notes.append(f"network_def#{given} dropped: MONAI has removed this argument of {name}")
            continue
        if given not in parameters and given in _RENAMED.get(name, {}):
            key = _RENAMED[name][given]
            notes.append(f"network_def#{given} read as {key}: MONAI has renamed this argument of {name}")
            if key in arguments:
                raise BundleInvalid(
                    f"network_def#{given} and {key} are the same argument; keep {key}", reason="argument"
                )
        if key not in parameters and not open_ended:
            raise BundleInvalid(
                f"network_def#{given[:80]} is an argument that {name} of the installed MONAI does not have",
                reason="argument",
            )
        check_size(value, f"network_def#{given[:80]}")
        result[key] = value
    _check_not_pretrained(name, parameters, result)
    return result, tuple(notes)


def _parameters(name: str, arguments: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of the class that makes a network with these arguments."""
    return inspect.signature(native_class(name, arguments) or network_class(name)).parameters


def module_of_network(name: str) -> str:
    """The module in which MONAI has a network.

    Raises:
        BundleInvalid: It has no such network.
    """
    return MODULES[name] if name in MODULES else network_class(name).__module__


def argument_value(spec: NetworkSpec, name: str) -> Any:
    """An argument as given, else the class's default, else None.

    Args:
        spec: A network whose class exists.
        name: The argument.

    Raises:
        BundleInvalid: The class does not exist.
    """
    if name in spec.arguments:
        return spec.arguments[name]
    if spec.code is None:
        parameter = _parameters(spec.name, spec.arguments).get(name)
    else:
        parameter = inspect.signature(own_class(spec.name, spec.code)).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def network_from_spec(spec: NetworkSpec) -> nn.Module:
    """Make a network with arbitrary weights.

    Args:
        spec: A class and its arguments.

    Raises:
        BundleInvalid: The class does not exist or does not take the arguments.
        BackendUnavailable: The package of nnU-Net's networks is not installed.
    """
    if spec.code is not None:
        return _own_network(spec, spec.code)
    if spec.members > 1:
        member = replace(spec, members=1, slice_axis=None)
        members = [network_from_spec(member) for _ in range(spec.members)]
        joined = Stacked(members) if spec.is_stacked else Averaged(members, spec.shares)
        return joined if spec.slice_axis is None else SliceNetwork(joined, spec.slice_axis)
    is_nnunet, is_vista = is_nnunet_network(spec.name), spec.name == vista3d.NAME
    arguments = spec.arguments if is_nnunet or is_vista else current_arguments(spec.name, spec.arguments)[0]
    with torch.random.fork_rng(devices=[]):  # the first weights are random and replaced: leave the caller's seed alone
        try:
            if is_nnunet:
                return nnunet_network(spec.name, arguments)
            if is_vista:
                _networks_of_monai()
                return vista3d.AutomaticVista3d(**arguments)
            native = native_class(spec.name, arguments)
            network = native(**arguments) if native else network_class(spec.name)(**_with_parts(spec.name, arguments))
        except ImportError as error:
            what = "needs a package that is not installed, or that ctflow hides because no network for volumes needs it"
            raise BundleInvalid(f"network_def: {spec.name} {what}: {first_line(error)}", reason="network") from error
        except _BUILD_ERRORS as error:
            raise BundleInvalid(
                f"network_def: {spec.name} does not take these arguments: {first_line(error)}", reason="network"
            ) from error
    if spec.name == "DiNTS" and type(network.dints_space).__name__ == "TopologyInstance":
        network = with_listed_paths(network)
    return network if spec.slice_axis is None else SliceNetwork(network, spec.slice_axis)


def _own_network(spec: NetworkSpec, code: OwnCode) -> nn.Module:
    """A network of the bundle's own code, or its TorchScript file."""
    if spec.name == TORCHSCRIPT:
        return scripted_network(Path(code.folder) / str(spec.arguments["file"]))
    try:
        with torch.random.fork_rng(devices=[]):
            return own_class(spec.name, code)(**spec.arguments)
    except BundleInvalid:
        raise
    except Exception as error:
        raise BundleInvalid(
            f"network_def: the bundle's {spec.name} failed: {type(error).__name__}: {first_line(error)}",
            reason="own-code",
        ) from error


def _with_parts(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the parts of the network that they describe, and arrays where the class needs these."""
    found = {}
    for key, value in arguments.items():
        if isinstance(value, Mapping) and "_target_" in value:
            inner = {each: item for each, item in value.items() if each != "_target_"}
            found[key] = network_class(value["_target_"])(**_with_parts(value["_target_"], inner))
        elif value is not None and key in _ARRAYS.get(name, {}):
            found[key] = _ARRAYS[name][key](value)
        else:
            found[key] = value
    return found


class SliceNetwork(nn.Module):
    """A network for slices as one for windows of one slice.

    Args:
        network: (B, C, H, W) -> (B, C', H, W).
        axis: The window's axis of size 1, from 0.
    """

    def __init__(self, network: nn.Module, axis: int) -> None:
        super().__init__()
        self.network, self._axis = network, 2 + axis

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C, D, H, W) of one slice along the axis -> logits of the same size."""
        logits: Tensor = self.network(windows.squeeze(self._axis))
        return logits.unsqueeze(self._axis)


class _Members(nn.Module):
    """Networks whose weights are named `0.`, `1.` and so on."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, member in enumerate(members):
            self.add_module(str(number), member)


class Averaged(_Members):
    """The mean of the logits of several networks, such as those of the folds of a cross-validation.

    Args:
        members: The networks.
        shares: Each one's share of the mean; empty where all have the same.
    """

    def __init__(self, members: Sequence[nn.Module], shares: Sequence[float] = ()) -> None:
        super().__init__(members)
        self._shares = tuple(shares)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, C, D, H, W)."""
        first, *others = self.children()
        if not self._shares:
            logits: Tensor = first(windows)
            for member in others:
                logits = logits + member(windows)
            return logits / (1 + len(others))
        logits = first(windows) * self._shares[0]
        for member, share in zip(others, self._shares[1:], strict=True):
            logits = logits + member(windows) * share
        return logits


class Stacked(_Members):
    """The logits of several networks, so that each one's windows are blended by themselves."""

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, members * C, D, H, W)."""
        return torch.cat([member(windows) for member in self.children()], dim=1)


def network_from_model(model: Model) -> nn.Module:
    """Make a model's network, with its weights, for inference.

    Args:
        model: Specification and weights.

    Returns:
        The network on the CPU, in evaluation mode, without gradients.

    Raises:
        BundleInvalid: The weights are not exactly the network's; the message names the first keys that differ.
    """
    if model.spec.network.code is None:
        check_fit(model)
    made = network_from_spec(model.spec.network)
    network = _demand_fit(made, model)
    network.load_state_dict(dict(model.weights), strict=True)
    for parameter in made.parameters():  # TorchScript lacks requires_grad_
        parameter.requires_grad = False
    return made.eval()


def check_fit(model: Model) -> None:
    """Require that the weights are exactly the network's, before a network of any size is made.

    Args:
        model: Specification and weights; the network is not of a bundle's own code.

    Raises:
        BundleInvalid: As `network_from_model`.
    """
    spec = model.spec.network
    if is_nnunet_network(spec.name):
        check_nnunet_arguments(spec.name, spec.arguments)  # imports the network, which must not happen in a skeleton
    elif native_class(spec.name, spec.arguments) is None:
        _networks_of_monai()
    with ShapesOnly(_TENSORS_PER_WEIGHT * len(model.weights) + _FEWEST_TENSORS) as skeleton:
        made = network_from_spec(spec)
    _demand_fit(made, model)
    held = sum(tensor.numel() for tensor in model.weights.values())
    if skeleton.elements > _TENSORS_PER_WEIGHT * held + MOST_ELEMENTS:
        raise BundleInvalid(
            f"network_def: {spec.name} makes {skeleton.elements:.1g} numbers for {held:.1g} weights", reason="network"
        )


def _demand_fit(made: nn.Module, model: Model) -> nn.Module:
    """The network that the weights are for, if they are exactly its."""
    network = made.network if isinstance(made, SliceNetwork) else made
    own, given = network.state_dict(), model.weights
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and own[key].shape != given[key].shape
    ]
    problems = [
        _listed("missing", [key for key in own if key not in given]),
        _listed("unexpected", [key for key in given if key not in own]),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        name = model.spec.network.name
        is_of_plans = "." in name and model.spec.network.code is None
        several = "the checkpoints do not fit the ensemble's"
        pair = "models/model.pt does not fit network_def" if model.spec.network.members == 1 else several
        pair = "the checkpoints do not fit plans.json's" if is_of_plans else pair
        raise BundleInvalid(f"{pair} {name.rpartition('.')[2]}: {found}", reason="weights-mismatch")
    return network


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{what}: {', '.join(key[:120] for key in keys[:_NAMED])}{more}"


def check_size(value: Any, place: str) -> None:
    """Reject an argument with a number that would only fill the memory.

    Raises:
        BundleInvalid: There is one; the message names the place.
    """
    if isinstance(value, list | tuple):
        for item in value:
            check_size(item, place)
    elif isinstance(value, Mapping):
        for item in value.values():
            check_size(item, place)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_ARGUMENT:
        raise BundleInvalid(f"{place} contains a number beyond {LARGEST_ARGUMENT}", reason="value")


def _check_not_pretrained(name: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Reject a network that would download weights; they come from the bundle."""
    for key in {*parameters, *given}:
        if "pretrained" in key:
            value = given[key] if key in given else parameters[key].default
            if value not in (False, None, inspect.Parameter.empty):
                raise BundleInvalid(
                    f"network_def#{key} of {name} must be false: ctflow takes weights only from the bundle",
                    reason="value",
                )
