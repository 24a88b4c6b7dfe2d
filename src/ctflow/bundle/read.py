"""A bundle's folder -> `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctflow.bundle.config import Component, Config, is_number, short
from ctflow.bundle.config.documents import merged_document, read_bundle_document
from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.locate import INFERENCE, METADATA, configuration_files, is_of_nnunet
from ctflow.bundle.metadata import MOST_CHANNELS, metadata_from_document
from ctflow.bundle.nnunet.read import read_nnunet, read_nnunet_spec
from ctflow.bundle.postprocessing import activation_from_config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.bundle.signatures import INFERER
from ctflow.bundle.weights import read_weights, weights_digest
from ctflow.bundle.workflow import read_workflow
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Blend, Model, ModelSpec, NetworkSpec
from ctflow.core.volume import Size3
from ctflow.networks.build import argument_value, current_arguments, network_class

LARGEST_ROI = 1024


def read_bundle(path: Path, configuration: str | None = None) -> Model:
    """Read a MONAI bundle, or a folder that nnU-Net trained, without executing any of it.

    Only `network_def`, `preprocessing`, `inferer` and `postprocessing` of its configuration are read, with
    configs/metadata.json and the checkpoint that it loads; `evaluator` and `dataset`, if present, must use these four.

    Args:
        path: As `find_bundle` found it.
        configuration: Files of the configuration, joined by commas (see `configuration_files`).

    Returns:
        The model, its weights on the CPU.

    Raises:
        BundleInvalid: A required part is missing or unsupported; the message names file and key.

    Source: MONAI Bundle Specification, docs.monai.io/en/stable/mb_specification.html.
    """
    if is_of_nnunet(path):
        return read_nnunet(path)
    config = read_config(path, configuration)
    spec = _spec(config, read_bundle_document(path, METADATA), folder_name=path.resolve().name)
    checkpoint = read_workflow(config)
    weights, notes = read_weights(path, checkpoint.file, checkpoint.key)
    return Model(replace(spec, notes=(*spec.notes, *notes)), weights, weights_digest(weights))


def read_spec(path: Path, configuration: str | None = None) -> ModelSpec:
    """Read all that `read_bundle` reads except the weights.

    Raises:
        BundleInvalid: As `read_bundle`.
    """
    if is_of_nnunet(path):
        return read_nnunet_spec(path)
    config = read_config(path, configuration)
    return _spec(config, read_bundle_document(path, METADATA), folder_name=path.resolve().name)


def read_config(path: Path, configuration: str | None = None) -> Config:
    """A bundle's configuration, of one file or several merged ones.

    Raises:
        BundleInvalid: A file is missing or is no configuration.
    """
    names = configuration_files(path, configuration)
    merged: dict[str, Any] = {}
    for name in names:
        merged_document(read_bundle_document(path, name), name, merged)
    return Config(merged, " + ".join(names), BundleFiles(path))


def spec_from_documents(inference: Mapping[str, Any], metadata: Mapping[str, Any], *, folder_name: str) -> ModelSpec:
    """The `ModelSpec` of a bundle's two configuration files.

    Args:
        inference: configs/inference.json, parsed.
        metadata: configs/metadata.json, parsed.
        folder_name: Name of the bundle's folder.

    Raises:
        BundleInvalid: As `read_bundle`.
    """
    return _spec(Config(inference, INFERENCE), metadata, folder_name=folder_name)


def _spec(config: Config, metadata: Mapping[str, Any], *, folder_name: str) -> ModelSpec:
    network, notes = _network(config)
    in_channels, out_channels = _channels(config, network)
    steps = steps_from_config(config)
    sliding = sliding_from_config(config)
    activation, threshold = activation_from_config(config)
    if activation == "softmax" and out_channels < 2:
        raise config.invalid("postprocessing", "has softmax, which needs at least 2 channels")
    if activation == "sigmoid" and out_channels != 1:
        raise config.invalid("postprocessing", f"has sigmoid; ctflow implements it for 1 channel, not {out_channels}")
    read_workflow(config)
    about = metadata_from_document(metadata, folder_name, out_channels, activation)
    return ModelSpec(
        name=about.name,
        version=about.version,
        network=network,
        in_channels=in_channels,
        out_channels=out_channels,
        preprocessing=steps,
        roi=sliding.roi,
        overlap=sliding.overlap,
        blend=sliding.blend,
        batch_size=sliding.batch_size,
        activation=activation,
        threshold=threshold,
        segments=about.segments,
        intended_use=about.intended_use,
        demonstration=about.demonstration,
        body_parts=about.body_parts,
        notes=(*notes, *about.notes),
    )


def _network(config: Config) -> tuple[NetworkSpec, tuple[str, ...]]:
    definition = Component(config, config.top("network_def"), "monai.networks.nets")
    arguments = {name: definition.get(name) for name in definition.names}
    try:
        definition.demand_module(network_class(definition.target).__module__)
        arguments, notes = current_arguments(definition.target, arguments)
    except BundleInvalid as error:
        if str(error).startswith(config.file):
            raise
        raise BundleInvalid(f"{config.file}: {error}", reason=error.reason) from None
    return NetworkSpec(definition.target, arguments), notes


def _channels(config: Config, network: NetworkSpec) -> tuple[int, int]:
    found = []
    for name, low, high in (("spatial_dims", 3, 3), ("in_channels", 1, 1), ("out_channels", 1, MOST_CHANNELS)):
        value = argument_value(network, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            allowed = str(low) if low == high else f"{low} to {high}"
            given = "missing" if value is None else "another value"
            raise config.invalid(f"network_def#{name}", f"must be {allowed}; it is {given}")
        found.append(value)
    return found[1], found[2]


@dataclass(frozen=True)
class Sliding:
    """The placement of windows: see `ModelSpec`."""

    roi: Size3
    overlap: float
    blend: Blend
    batch_size: int


def sliding_from_config(config: Config) -> Sliding:
    """Read `inferer`.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: Not a SlidingWindowInferer, or not as ctflow supports it.
    """
    inferer = Component(config, config.top("inferer"), "monai.inferers")
    if inferer.target != "SlidingWindowInferer":
        raise inferer.refused(
            "_target_", f"is {short(inferer.target)}; ctflow implements SlidingWindowInferer", "target"
        )
    inferer.demand_signature(INFERER)
    overlap = _overlap(inferer)
    mode = inferer.get("mode", "constant")
    blend: Blend
    if mode == "constant":
        blend = "constant"
    elif mode == "gaussian":
        blend = "gaussian"
    else:
        raise inferer.refused("mode", f'must be "constant" or "gaussian", not {short(mode)}')
    return Sliding(_roi(inferer), overlap, blend, inferer.integer("sw_batch_size", 1, 1024, 1))


def _overlap(inferer: Component) -> float:
    given = inferer.get("overlap", 0.25)
    values = given if isinstance(given, list) else [given]
    if len(values) not in (1, 3) or (len(values) == 1 and isinstance(given, list)):
        raise inferer.refused("overlap", f"must be one or three numbers, not {short(given)}")
    if not all(is_number(value) and 0 <= value < 1 for value in values):
        raise inferer.refused("overlap", f"must be at least 0 and below 1, not {short(given)}")
    if len(set(values)) > 1:
        raise inferer.refused("overlap", f"differs between the axes, {short(given)}; ctflow accepts one for all")
    return float(values[0])


def _roi(inferer: Component) -> Size3:
    given = inferer.get("roi_size")
    sizes = given if isinstance(given, list) else [given] * 3
    if len(sizes) != 3 or not all(
        is_number(size) and isinstance(size, int) and 1 <= size <= LARGEST_ROI for size in sizes
    ):
        raise inferer.refused("roi_size", f"must be one or three whole numbers up to {LARGEST_ROI}, not {short(given)}")
    return sizes[0], sizes[1], sizes[2]
