from __future__ import annotations

import numpy as np
import pytest

from ctflow.core.errors import ExportFailed
from ctflow.export.opset import downgrade_opset
from reasons import raises_reason

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper = onnx.helper
X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)


def model_of(*nodes, initializers=(), opset: int = 18):
    graph = helper.make_graph(
        list(nodes), "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in initializers],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model) -> np.ndarray:
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": X})[0]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = {
    "mean over axes": ([helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)], [("axes", ints(-2, -1))]),
    "mean over all": ([helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0, noop_with_empty_axes=0)], []),
    "axes of a constant node": (
        [
            helper.make_node("Constant", [], ["axes"], value=onnx.numpy_helper.from_array(ints(1), "axes")),
            helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0),
        ],
        [],
    ),
    "pad": ([helper.make_node("Pad", ["x", "pads"], ["y"], mode="constant")], [("pads", ints(0, 1, 0, 0, 0, 2))]),
    "empty axes": ([helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)], [("axes", ints())]),
    "given parts": ([helper.make_node("Split", ["x", "parts"], ["y", "rest"], axis=1)], [("parts", ints(1, 3))]),
    "unchanged": ([helper.make_node("Add", ["x", "x"], ["y"])], []),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_older_graph_computes_the_same(case):
    nodes, initializers = CASES[case]
    model = model_of(*nodes, initializers=initializers)
    expected = run(model)
    downgrade_opset(model, 16)
    assert model.opset_import[0].version == 16
    assert np.array_equal(run(model), expected)


def test_a_graph_that_is_old_enough_stays_as_it_is():
    model = model_of(helper.make_node("Add", ["x", "x"], ["y"]), opset=15)
    before = model.SerializeToString()
    downgrade_opset(model, 16)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("node", "initializers", "named"),
    [
        (
            helper.make_node("LayerNormalization", ["x", "s"], ["y"]),
            [("s", np.ones(6, np.float32))],
            "LayerNormalization",
        ),
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"], noop_with_empty_axes=1), [("axes", ints(1))], "noop"),
        (helper.make_node("Pad", ["x", "p", "", "a"], ["y"]), [("p", ints(1, 1)), ("a", ints(1))], "Pad"),
        (helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), [], "Split"),
        (
            helper.make_node("ScatterElements", ["x", "i", "x"], ["y"], reduction="max"),
            [("i", np.zeros(X.shape, np.int64))],
            "ScatterElements",
        ),
        (helper.make_node("Resize", ["x", "", "s"], ["y"], axes=[2]), [("s", np.ones(1, np.float32))], "Resize"),
    ],
    ids=["new operator", "new meaning", "new input", "new attribute", "new value", "axes of a resize"],
)
def test_what_the_older_set_lacks_is_named(node, initializers, named):
    with raises_reason(ExportFailed, "opset", names=named):
        downgrade_opset(model_of(node, initializers=initializers), 16)


def test_axes_that_are_computed_are_refused():
    nodes = [
        helper.make_node("Add", ["one", "one"], ["axes"]),
        helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
    ]
    with raises_reason(ExportFailed, "opset", names="ReduceMean"):
        downgrade_opset(model_of(*nodes, initializers=[("one", ints(0))]), 16)
