"""A bundle's folder -> `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ctflow.bundle.config import Config
from ctflow.bundle.config.documents import merged_document, read_bundle_document
from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.locate import INFERENCE, METADATA, configuration_files, is_of_nnunet
from ctflow.bundle.metadata import demand_ct, metadata_from_document, names_background, segments_after
from ctflow.bundle.network import channels_of_network, demand_one_image, network_from_config, note_of_code
from ctflow.bundle.nnunet.read import read_nnunet, read_nnunet_spec
from ctflow.bundle.parts import read_parts
from ctflow.bundle.postprocessing import Postprocessing
from ctflow.bundle.weights import (
    digest_of_ensemble,
    digest_with_code,
    read_weights,
    scripted_file,
    weights_digest,
)
from ctflow.bundle.workflow import Checkpoint, checkpoints_from_config
from ctflow.compat.monai import import_all
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Model, ModelSpec, NetworkSpec, OwnCode
from ctflow.core.progress import startup
from ctflow.networks import vista3d
from ctflow.networks.own_code import TORCHSCRIPT, code_of_folder, scripted_network

_OVERLAPPING = "the bundle's channels may overlap: a voxel that several of them mark belongs to the last of these"


def read_bundle(path: Path, configuration: str | None = None, *, allow_code: bool = False) -> Model:
    """Read a MONAI bundle, or a folder that nnU-Net trained; without `allow_code` nothing of it is executed.

    Only `network_def`, `preprocessing`, `inferer` and `postprocessing` of its configuration are read, with
    configs/metadata.json and the checkpoint that it loads; `evaluator` and `dataset`, if present, must use these four.

    Args:
        path: As `find_bundle` found it.
        configuration: Files of the configuration, joined by commas (see `configuration_files`).
        allow_code: Whether a network of the bundle's own code, or its TorchScript file, may be executed.

    Returns:
        The model, its weights on the CPU.

    Raises:
        BundleInvalid: A required part is missing or unsupported; the message names file and key.

    Source: MONAI Bundle Specification, docs.monai.io/en/stable/mb_specification.html.
    """
    startup.lap("imports")
    model = read_nnunet(path) if is_of_nnunet(path) else _read(path, configuration, allow_code=allow_code)
    startup.lap("bundle")
    return model


def _read(path: Path, configuration: str | None, *, allow_code: bool) -> Model:
    """A MONAI bundle."""
    config = read_config(path, configuration)
    code = _code(path) if allow_code else None
    spec = _spec(config, read_bundle_document(path, METADATA), folder_name=path.resolve().name, code=code)
    checkpoints = checkpoints_from_config(config)
    if spec.network.members > 1:
        return _ensemble(path, spec, checkpoints)
    (checkpoint,) = checkpoints
    script = scripted_file(path, checkpoint.file)
    if script is not None:
        return _scripted(path, spec, script, allow_code=allow_code)
    weights, notes = read_weights(path, checkpoint.file, checkpoint.key, is_shared=checkpoint.is_shared)
    digest = digest_with_code(weights_digest(weights), spec.own_code)
    return Model(replace(spec, notes=(*spec.notes, *notes)), weights, digest)


def _ensemble(path: Path, spec: ModelSpec, checkpoints: tuple[Checkpoint, ...]) -> Model:
    """A model of several networks, the names of whose weights begin with `0.`, `1.` and so on."""
    weights: dict[str, Tensor] = {}
    notes: list[str] = []
    for number, checkpoint in enumerate(checkpoints):
        script = scripted_file(path, checkpoint.file)
        if script is not None:
            raise BundleInvalid(
                f"{script} is TorchScript; ctflow reads an ensemble's weights only from state dicts: save them with "
                "torch.save(network.state_dict(), ...)",
                reason="torchscript",
            )
        one, found = read_weights(path, checkpoint.file, checkpoint.key, is_shared=checkpoint.is_shared)
        weights |= {f"{number}.{name}": tensor for name, tensor in one.items()}
        notes += found
    digest = digest_of_ensemble(weights_digest(weights), spec.network)
    return Model(replace(spec, notes=(*spec.notes, *dict.fromkeys(notes))), weights, digest)


def _scripted(path: Path, spec: ModelSpec, file: str, *, allow_code: bool) -> Model:
    """A model whose network is a TorchScript file."""
    if not allow_code:
        raise BundleInvalid(
            f"{file} is TorchScript, which is code: --allow-code runs it, or save the weights with "
            "torch.save(network.state_dict(), 'models/model.pt')",
            reason="torchscript",
        )
    workflow = spec.workflow
    code = code_of_folder(path, (file, *(workflow.files if workflow else ())))
    if workflow is not None:
        spec = replace(spec, workflow=replace(workflow, code=code))
    weights = dict(scripted_network(path / file).state_dict())
    network = NetworkSpec(TORCHSCRIPT, {"file": file}, code=code)
    notes = (*spec.notes, note_of_code(file, code))
    return Model(replace(spec, network=network, notes=notes), weights, digest_with_code(weights_digest(weights), code))


def read_spec(path: Path, configuration: str | None = None, *, allow_code: bool = False) -> ModelSpec:
    """Read all that `read_bundle` reads except the weights.

    Raises:
        BundleInvalid: As `read_bundle`.
    """
    if is_of_nnunet(path):
        return read_nnunet_spec(path)
    config = read_config(path, configuration)
    code = _code(path) if allow_code else None
    return _spec(config, read_bundle_document(path, METADATA), folder_name=path.resolve().name, code=code)


def _code(path: Path) -> OwnCode:
    """The bundle's own code; whatever it uses of MONAI must be there, which is why MONAI is not imported before."""
    import_all()
    return code_of_folder(path)


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


def _spec(config: Config, metadata: Mapping[str, Any], *, folder_name: str, code: OwnCode | None = None) -> ModelSpec:
    demand_ct(metadata)  # and one image: before --allow-code is advised for what would not help
    network, notes = network_from_config(config, code)
    demand_one_image(config, network)
    parts = read_parts(config, code)
    steps, sliding, after = parts.steps, parts.sliding, parts.after
    network = replace(network, slice_axis=sliding.slice_axis)
    if network.members > 1:
        network = replace(network, combined=after.combined, shares=after.shares)
        notes = (*notes, _note_of_ensemble(network))
    in_channels, out_channels = channels_of_network(config, network)
    _check_vote(config, after, out_channels)
    if after.threshold is None and out_channels < 2 and parts.workflow is None:
        raise config.invalid("postprocessing", f"has {_name(after)}, which needs at least 2 channels")
    has_background = after.threshold is None
    if parts.workflow is not None:
        has_background = out_channels > 1 and names_background(metadata)
    painted = tuple(range(1, out_channels + 1)) if after.threshold is not None and out_channels > 1 else ()
    classes = network.arguments["classes"] if network.name == vista3d.NAME else ()
    about = metadata_from_document(metadata, folder_name, out_channels, has_background=has_background, classes=classes)
    return ModelSpec(
        name=about.name,
        version=about.version,
        network=network,
        in_channels=in_channels,
        out_channels=out_channels * (network.members if network.is_stacked else 1),
        preprocessing=steps,
        roi=sliding.roi,
        overlap=sliding.overlap,
        blend=sliding.blend,
        batch_size=sliding.batch_size,
        activation=after.activation,
        threshold=after.threshold,
        segments=segments_after(about.segments, (*after.before, *after.after)),
        intended_use=about.intended_use,
        demonstration=about.demonstration,
        body_parts=about.body_parts,
        notes=(*notes, *parts.notes, *about.notes, *([_OVERLAPPING] if painted else [])),
        painted=painted,
        restored=after.restored,
        network_label_steps=tuple(after.before),
        label_steps=tuple(after.after),
        sigma_scale=sliding.sigma_scale,
        window_padding=sliding.padding,
        workflow=parts.workflow and replace(parts.workflow, has_background=has_background),
    )


def _note_of_ensemble(network: NetworkSpec) -> str:
    how = "their labels voted on" if network.combined == "votes" else f"the mean of their {network.combined}"
    shares = f", shares {', '.join(f'{share:.3g}' for share in network.shares)}" if network.shares else ""
    return f"an ensemble of {network.members} networks: {how}{shares}"


def _check_vote(config: Config, after: Postprocessing, channels: int) -> None:
    """Require that MONAI's VoteEnsemble counts votes: else it rounds the mean of the numbers of classes."""
    given = after.voted_classes
    if after.combined != "votes":
        return
    if after.threshold is None:
        fits, wanted = channels == 2 if given is None else given >= channels, f"at least {channels}"
    else:
        fits, wanted = given is None or (channels == 1 and given > 1), "missing" if channels > 1 else "at least 2"
    if not fits:
        problem = f"has VoteEnsembled with num_classes {given}, which for {channels} channels must be {wanted}"
        raise config.invalid("postprocessing", problem)


def _name(after: Postprocessing) -> str:
    return after.activation if after.activation != "none" else "an AsDiscreted of logits"
