"""The bundle's network: its class and arguments as plain values."""

from __future__ import annotations

from typing import Any

from ctflow.bundle.config import Component, Config, ConfigValue
from ctflow.bundle.metadata import MOST_CHANNELS
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import argument_value, current_arguments, network_class

_PACKAGE = "monai.networks.nets"
_PLACED = frozenset({"device"})  # where MONAI makes a part of the network: ctflow places all of it


def network_from_config(config: Config) -> tuple[NetworkSpec, tuple[str, ...]]:
    """Read `network_def`.

    Args:
        config: The bundle's configuration.

    Returns:
        The network, and a note for each argument that was dropped or renamed.

    Raises:
        BundleInvalid: No network of MONAI, or an argument that cannot be known.
    """
    definition = Component(config, config.top("network_def"), _PACKAGE)
    arguments = {name: _argument(config, definition, name) for name in definition.names}
    try:
        definition.demand_module(network_class(definition.target).__module__)
        arguments, notes = current_arguments(definition.target, arguments)
    except BundleInvalid as error:
        if str(error).startswith(config.file):
            raise
        raise BundleInvalid(f"{config.file}: {error}", reason=error.reason) from None
    return NetworkSpec(definition.target, arguments), notes


def _argument(config: Config, definition: Component, name: str) -> Any:
    """An argument as plain values; one that is itself a part of a network (DiNTS' topology) as an object."""
    found = config.resolved(definition.place(name))
    if isinstance(found.value, dict) and "_target_" in found.value:
        part = Component(config, ConfigValue(f"{definition.id}#{name}", found.value), _PACKAGE)
        part.demand_module(network_class(part.target).__module__)
        inner = {key: _plain(part.get(key)) for key in part.names if key not in _PLACED}
        return {"_target_": part.target, **inner}
    return _plain(definition.get(name))


def _plain(value: Any) -> Any:
    """Arrays as lists, names of element types as words."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def channels_of_network(config: Config, network: NetworkSpec) -> tuple[int, int]:
    """Input and output channels.

    Args:
        config: The bundle's configuration.
        network: From `network_from_config`, with the inferer's slice axis.

    Raises:
        BundleInvalid: The network is not for one CT, or not for volumes (or slices).
    """
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
            allowed = str(low) if low == high else f"{low} to {high}"
            given = "missing" if value is None else "another value"
            raise config.invalid(f"network_def#{name}", f"must be {allowed}; it is {given}")
        found.append(value)
    return found[1], found[2]
