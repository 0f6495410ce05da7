"""Small ONNX networks made by hand, and what ONNX Runtime says of a file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper


def run(path, *inputs, more=()):
    """Outputs of an .onnx file as tensors: the first, or that and those named in `more`. Inputs in order, or a dict of them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # otherwise products with int4 weights round their inputs to eight bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [session.get_outputs()[0].name, *more]
    if not isinstance(inputs[0], dict):
        inputs = [{i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}]
    given = {name: np.asarray(x) for name, x in inputs[0].items()}
    outputs = [torch.from_numpy(np.asarray(y)) for y in session.run(names, given)]
    return outputs if more else outputs[0]


def far(a, b):
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def initialiser(name, *shape, dtype=np.float32, scale=0.2):
    rng = np.random.default_rng(len(name) + sum(shape))
    return numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(dtype), name)


def sequence_network():
    """Words to scores: embedding, a bidirectional LSTM, a GRU, a transposed convolution, a branch, a product with a constant.

    Two constants of the branch have one name; a mask of infinities, shapes and a scalar lie beside the weights."""

    def branch(scale):
        constant = helper.make_node("Constant", [], ["factor"], value=initialiser("factor", 24, 24, scale=scale))
        return helper.make_graph(
            [constant, helper.make_node("MatMul", ["flat", "factor"], ["branch_out"])], "branch", [],
            [helper.make_tensor_value_info("branch_out", TensorProto.FLOAT, ["N", 24])],
        )  # fmt: skip

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"], doc_string="made at /somewhere/else.py"),
        helper.make_node("Transpose", ["words"], ["by_time"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["by_time", "lstm_w", "lstm_r", "lstm_b"], ["lstm_y"], hidden_size=20, direction="bidirectional"),
        helper.make_node("Transpose", ["lstm_y"], ["moved"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["moved", "shape"], ["joined"]),
        helper.make_node("GRU", ["joined", "gru_w", "gru_r"], ["gru_y", "gru_h"], hidden_size=24),
        helper.make_node("Squeeze", ["gru_h", "zero"], ["flat"]),
        helper.make_node("ReduceSum", ["flat"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "nothing"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], then_branch=branch(0.3), else_branch=branch(0.4)),
        helper.make_node("Unsqueeze", ["chosen", "two"], ["long"]),
        helper.make_node("ConvTranspose", ["long", "up_w"], ["up"], strides=[2]),
        helper.make_node("Constant", [], ["last_w"], value=initialiser("last_w", 3, 40)),
        helper.make_node("MatMul", ["up", "last_w"], ["scores"]),
        helper.make_node("Mul", ["scores", "gain"], ["gained"]),
        helper.make_node("Max", ["gained", "mask"], ["y"]),
    ]
    initialisers = [
        initialiser("table", 50, 32, scale=1), initialiser("lstm_w", 2, 80, 32), initialiser("lstm_r", 2, 80, 20),
        initialiser("lstm_b", 2, 160), initialiser("gru_w", 1, 72, 40), initialiser("gru_r", 1, 72, 24),
        initialiser("up_w", 24, 8, 3), initialiser("gain", 8, 40),
        numpy_helper.from_array(np.array([0, 0, 40], np.int64), "shape"), numpy_helper.from_array(np.array([0], np.int64), "zero"),
        numpy_helper.from_array(np.array([2], np.int64), "two"), numpy_helper.from_array(np.float32(0), "nothing"),
        numpy_helper.from_array(np.full((8, 40), -np.inf, np.float32), "mask"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "words", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "T"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 40])], initialisers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
