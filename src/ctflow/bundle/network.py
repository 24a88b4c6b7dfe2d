"""The bundle's network: its class and arguments as plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

from ctflow.bundle.config import Component, Config, ConfigValue, short
from ctflow.bundle.config.ensemble import RUN_BY_MONAI, ensemble_from_config
from ctflow.bundle.metadata import MOST_CHANNELS
from ctflow.bundle.vista3d import is_vista, network_place, vista_network
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec, OwnCode
from ctflow.networks import vista3d
from ctflow.networks.build import argument_value, current_arguments, module_of_network, network_class
from ctflow.networks.own_code import own_class

_PACKAGE = "monai.networks.nets"
_PLACED = frozenset({"device"})  # where MONAI makes a part of the network: ctflow places all of it


def network_from_config(config: Config, code: OwnCode | None = None) -> tuple[NetworkSpec, tuple[str, ...]]:
    """Read `network_def`, or the networks of an ensemble.

    Args:
        config: The bundle's configuration.
        code: The bundle's own code, if it may be executed.

    Returns:
        The network, and a note for each argument that was dropped or renamed.

    Raises:
        BundleInvalid: No network of MONAI, an argument that cannot be known, or an ensemble of different networks.
    """
    ensemble = ensemble_from_config(config)
    if ensemble is None:
        return _network(config, network_place(config), code)
    for member in ensemble.members[1:]:
        target = member.definition.value.get("_target_")
        if _is_own(target) or is_vista(member.definition):
            problem = f"is {short(target)}; ctflow runs several networks only of MONAI's classes without prompts"
            raise config.invalid(member.place, f"{problem}. {RUN_BY_MONAI}", "target")
    read = [_network(config, member.definition, code) for member in ensemble.members]
    network, notes = read[0]
    for member, (other, _) in zip(ensemble.members, read, strict=True):
        if other != network:
            problem = f"differs from {ensemble.members[0].place}, {network.name}, in its class or arguments"
            raise config.invalid(
                member.place,
                f"{problem}; ctflow combines networks that differ only in weights. {RUN_BY_MONAI}",
                "value",
            )
    return replace(network, members=len(read)), notes


def _network(config: Config, place: ConfigValue, code: OwnCode | None) -> tuple[NetworkSpec, tuple[str, ...]]:
    target = place.value.get("_target_") if isinstance(place.value, dict) else None
    if isinstance(target, str) and _finds_boxes(target):
        raise config.invalid(
            f"{place.id}#_target_",
            f"is {short(target)}, which finds boxes; ctflow marks voxels. {RUN_BY_MONAI}",
            "target",
        )
    if is_vista(place):
        return vista_network(config, place)
    if _is_own(target):
        return _own_network(config, place, target, code)
    definition = Component(config, place, _PACKAGE)
    arguments = {name: _argument(config, definition, name) for name in definition.names}
    try:
        definition.demand_module(module_of_network(definition.target))
        arguments, notes = current_arguments(definition.target, arguments)
    except BundleInvalid as error:
        if str(error).startswith(config.file):
            raise
        raise BundleInvalid(f"{config.file}: {error}", reason=error.reason) from None
    return NetworkSpec(definition.target, arguments), notes


def _finds_boxes(target: str) -> bool:
    return target.startswith("monai.apps.detection.") or "Detector" in target or target == "RetinaNet"


def _is_own(target: object) -> TypeGuard[str]:
    """Whether a class is the bundle's own, or of a package other than MONAI."""
    return isinstance(target, str) and "." in target and not target.startswith("monai.")


def _own_network(
    config: Config, place: ConfigValue, target: str, code: OwnCode | None
) -> tuple[NetworkSpec, tuple[str, ...]]:
    """A network of the bundle's own code.

    Raises:
        BundleInvalid: It was not allowed, or the bundle has no such code.
    """
    if code is None:
        raise config.invalid(
            f"{place.id}#_target_",
            f"is {short(target)}, code of the bundle itself or of another package, which ctflow does not execute by "
            "itself; --allow-code imports it from the bundle's folder, with all that this code may do to this computer",
            "target",
        )
    definition = Component(config, place, target.rpartition(".")[0])
    own_class(target, code)
    spec = NetworkSpec(target, {name: _argument(config, definition, name) for name in definition.names}, code=code)
    return spec, (note_of_code(f"network {target}", code),)


def note_of_code(what: str, code: OwnCode) -> str:
    """What the log and result.json say of a bundle's code that is executed."""
    return f"the bundle's own code was executed, as --allow-code permits: {what}, SHA-256 {code.digest[:12]}"


def _argument(config: Config, definition: Component, name: str) -> Any:
    """An argument as plain values; one that is itself a part of a network (DiNTS' topology) as an object."""
    found = config.resolved(definition.place(name))
    if isinstance(found.value, dict) and "_target_" in found.value:
        part = Component(config, ConfigValue(f"{definition.id}#{name}", found.value), _PACKAGE)
        part.demand_module(network_class(part.target).__module__)
        inner = {key: part.get(key) for key in part.names if key not in _PLACED}
        return {"_target_": part.target, **inner}
    return definition.get(name)


def demand_one_image(config: Config, network: NetworkSpec) -> None:
    """Reject a network of several images.

    Args:
        config: The bundle's configuration.
        network: From `network_from_config`.

    Raises:
        BundleInvalid: It takes several; the message says what runs the bundle.
    """
    value = None if network.name == vista3d.NAME else argument_value(network, "in_channels")
    if isinstance(value, int) and value > 1:
        problem = f"is {value}: the network takes {value} images of a patient at once (phases or sequences)"
        advice = f"ctflow reads one CT series. {RUN_BY_MONAI}"
        raise config.invalid("network_def#in_channels", f"{problem}; {advice}", "inputs")


def channels_of_network(config: Config, network: NetworkSpec) -> tuple[int, int]:
    """Input and output channels.

    Args:
        config: The bundle's configuration.
        network: From `network_from_config`, with the inferer's slice axis.

    Raises:
        BundleInvalid: The network is not for one CT, or not for volumes (or slices).
    """
    if network.name == vista3d.NAME:
        return 1, 1 + len(network.arguments["classes"])
    found = []
    dims = 3 if network.slice_axis is None else 2
    for names, low, high in (
        (("spatial_dims",), dims, dims),
        (("in_channels",), 1, 1),
        (("out_channels", "num_classes"), 1, MOST_CHANNELS),
    ):
        name = next((each for each in names if argument_value(network, each) is not None), names[0])
        value = argument_value(network, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            if network.code is not None and value is None and name in ("spatial_dims", "in_channels"):
                found.append(low)  # own networks need not have these arguments; a wrong guess fails at the first window
                continue
            allowed = str(low) if low == high else f"{low} to {high}"
            given = "missing" if value is None else short(value)
            raise config.invalid(f"network_def#{name}", f"must be {allowed}; it is {given}")
        found.append(value)
    return found[1], found[2]
