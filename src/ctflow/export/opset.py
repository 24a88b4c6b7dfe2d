"""ONNX graphs for readers of older operator sets than the exporter writes."""

from __future__ import annotations

import importlib
from typing import Any

from ctflow.core.errors import ExportFailed

OLDEST_EXPORTED = 18  # torch's exporter has nothing older
_AXES_INPUT = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")  # since opset 18
# Attributes that newer versions of an operator have, and the values at which it does what the older one did.
_NEW_ATTRIBUTES: dict[str, dict[str, Any]] = {
    **{name: {"noop_with_empty_axes": 0} for name in _AXES_INPUT},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
}


def downgrade_opset(proto: Any, opset: int) -> None:
    """Rewrite a graph, in place, for an older operator set.

    Args:
        proto: An `onnx.ModelProto`.
        opset: The wanted version; nothing happens if the graph's is not newer.

    Raises:
        ExportFailed: An operator of the graph means something else or does not exist in the older set; names it.

    Source: the ONNX operator changelog; `onnx.version_converter` has no way down for Pad and Split.
    """
    domain = next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if domain.version <= opset:
        return
    if proto.functions:
        raise ExportFailed(f"the graph holds functions, which opset {opset} does not know", reason="opset")
    constants = _constants(proto.graph)
    for node in proto.graph.node:
        _downgrade(node, constants, opset, domain.version)
    domain.version = opset


def _downgrade(node: Any, constants: dict[str, list[int]], opset: int, exported: int) -> None:
    """One node."""
    defs = importlib.import_module("onnx").defs
    if any(attribute.HasField("g") for attribute in node.attribute):
        raise ExportFailed(f"{node.op_type} with a graph of its own is not written for opset {opset}", reason="opset")
    now = defs.get_schema(node.op_type, max_inclusive_version=exported, domain=node.domain)
    if now.since_version <= opset:
        return
    if node.op_type in _AXES_INPUT:
        _drop_attributes(node, _NEW_ATTRIBUTES[node.op_type], opset)
        _axes_as_attribute(node, constants)
    elif node.op_type in _NEW_ATTRIBUTES:
        _drop_attributes(node, _NEW_ATTRIBUTES[node.op_type], opset)
        if not _same_but_types(node, opset):
            raise ExportFailed(
                f"{node.op_type} of opset {now.since_version} has no counterpart in opset {opset}", reason="opset"
            )
    elif not (node.op_type == "Pad" and len(node.input) <= 3) and not _same_but_types(node, opset):
        raise ExportFailed(
            f"{node.op_type} of opset {now.since_version} has no counterpart in opset {opset}", reason="opset"
        )


def _same_but_types(node: Any, opset: int) -> bool:
    """Whether the older version of an operator differs in the types that it takes alone."""
    defs = importlib.import_module("onnx").defs
    if not defs.has(node.op_type, max_inclusive_version=opset, domain=node.domain):
        return False
    older = defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain)
    given = {attribute.name for attribute in node.attribute}
    if node.op_type.startswith("Scatter") and given:  # "max" and "min" are new values of an old attribute
        return False
    return given <= set(older.attributes) and len(node.input) <= older.max_input


def _axes_as_attribute(node: Any, constants: dict[str, list[int]]) -> None:
    """Reductions had their axes as an attribute before opset 18."""
    if len(node.input) < 2 or not node.input[1]:
        return
    if node.input[1] not in constants:
        raise ExportFailed(
            f"{node.op_type} over axes that are computed cannot be written for an older opset", reason="opset"
        )
    helper = importlib.import_module("onnx").helper
    if constants[node.input[1]]:  # none are all, in both versions
        node.attribute.append(helper.make_attribute("axes", constants[node.input[1]]))
    del node.input[1:]


def _drop_attributes(node: Any, harmless: dict[str, Any], opset: int) -> None:
    helper = importlib.import_module("onnx").helper
    for attribute in list(node.attribute):
        if attribute.name not in harmless:
            continue
        value = helper.get_attribute_value(attribute)
        if value != harmless[attribute.name]:
            raise ExportFailed(
                f"{node.op_type} with {attribute.name} {value} has no counterpart in opset {opset}", reason="opset"
            )
        node.attribute.remove(attribute)


def _constants(graph: Any) -> dict[str, list[int]]:
    """Whole numbers that are known: initializers and constant nodes, by name."""
    onnx = importlib.import_module("onnx")
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    constant = [node for node in graph.node if node.op_type == "Constant"]
    tensors |= {n.output[0]: a.t for n in constant for a in n.attribute if a.name == "value"}
    small = {name: tensor for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.INT64}
    return {
        name: [int(n) for n in onnx.numpy_helper.to_array(tensor).ravel()]
        for name, tensor in small.items()
        if len(tensor.dims) <= 1
    }
