"""A model as one ONNX file."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctflow.core.atomic import write_atomically
from ctflow.core.errors import BackendUnavailable, ExportFailed, first_line
from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.contract import not_taken
from ctflow.engines.onnxfile import CPU_GRAPH, OPSET, GraphStyle
from ctflow.networks.build import network_from_model
from ctflow.networks.half import HALVES, with_half_precision
from ctflow.networks.head import fold_two_class_head
from ctflow.networks.swin import rewrite_for_export

_NEEDED = ("onnx", "onnxscript")
_LARGEST = 2_000_000_000  # bytes in one protobuf


def onnx_from_model(model: Model, roi: Size3, *, batch: int, path: Path, style: GraphStyle = CPU_GRAPH) -> None:
    """Write a model's network, with its exact rewrites, as ONNX: input "windows", output "logits".

    The same model and versions give the same bytes.

    Args:
        model: The model.
        roi: Window size in voxels.
        batch: The one batch size that the graph takes: it exports faster than one for any, and engines optimise it
            further.
        path: The file; its folder exists.
        style: For the engine that will read it.

    Raises:
        BackendUnavailable: The packages that write ONNX are not installed.
        BundleInvalid: The network does not take windows of this size.
        ExportFailed: The network cannot be expressed; names the cause.
        OutputError: The file cannot be written.
    """
    absent = [name for name in _NEEDED if find_spec(name) is None]
    if absent:
        raise BackendUnavailable(
            f"{' and '.join(absent)} not installed: pip install 'ctflow[openvino]'", reason="not-installed"
        )
    network, _ = fold_two_class_head(network_from_model(model), model.spec)
    fixed = rewrite_for_export(network, roi, style.attention)
    # The rewritten network does not need the exporter's own optimisation, which takes half of its time.
    program = _program(_in_style(fixed, style), model, roi, batch, optimize=fixed is network)
    proto = _anonymous(program.model_proto)
    result = tuple(axis.dim_value for axis in proto.graph.output[0].type.tensor_type.shape.dim)[2:]
    if result != tuple(roi):
        raise not_taken(roi, f"its logits are {result}")
    if proto.ByteSize() > _LARGEST:
        raise ExportFailed(
            f"{model.spec.network.name} is too large for one ONNX file: use --engine eager", reason="too-large"
        )
    data: bytes = proto.SerializeToString(deterministic=True)
    write_atomically(path, lambda stream: stream.write(data))


def _in_style(network: nn.Module, style: GraphStyle) -> nn.Module:
    """The network with the number format that the engine needs."""
    network = _with_explicit_zeros(network)
    return with_half_precision(network, HALVES[style.precision]) if style.precision in HALVES else network


def _program(network: nn.Module, model: Model, roi: Size3, batch: int, *, optimize: bool) -> Any:
    """The exporter's result."""
    windows = torch.zeros((batch, model.spec.in_channels, *roi))
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            return torch.onnx.export(
                network,
                (windows,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["windows"],
                output_names=["logits"],
                optimize=optimize,
                verify=False,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        _check_window(network, windows[:1], roi)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportFailed(
            f"{model.spec.network.name} cannot be exported: {first_line(cause)}; use --engine eager",
            reason="not-exportable",
        ) from error


def _check_window(network: nn.Module, window: torch.Tensor, roi: Size3) -> None:
    """Check whether the window made the export fail."""
    try:
        with torch.inference_mode():
            network(window)
    except (RuntimeError, ValueError, IndexError) as error:
        raise not_taken(roi, error) from error


def _with_explicit_zeros(network: nn.Module) -> nn.Module:
    """A copy in which convolutions without a bias have a zero bias, and norms without weights have ones and zeros.

    onnxscript 0.7 writes an absent bias as an array of the wrong shape, which only its optimiser removes again.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels), requires_grad=False)
        if type(module) is nn.InstanceNorm3d and not module.affine:
            module.affine = True
            module.weight = nn.Parameter(torch.ones(module.num_features), requires_grad=False)
            module.bias = nn.Parameter(torch.zeros(module.num_features), requires_grad=False)
    return network


def _anonymous(proto: Any) -> Any:
    """The graph without the exporter's notes, which name this machine's folders and source lines."""
    for element in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info,
                    *proto.graph.input, *proto.graph.output, *proto.functions,
                    *(node for function in proto.functions for node in function.node)):  # fmt: skip
        element.ClearField("doc_string")
        element.ClearField("metadata_props")
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, on which a user cannot act."""
    importlib.import_module("onnxscript")  # also warns at its first import
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(action="ignore"):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
