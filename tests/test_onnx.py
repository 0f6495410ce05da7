"""ONNX files in and out again: what is coded, what stays exact, what bad files do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

import transquant as tq
from onnx_models import far, initialiser, run, sequence_network
from transquant import errors, reader
from transquant.bitstream import encode
from transquant.inputs import load_weights
from transquant.records import GRAPH, RawEntry

CODED = {"table", "lstm_w", "lstm_r", "gru_w", "gru_r", "up_w", "last_w", "factor", "factor#2"}
EXACT = {"lstm_b", "gain"}
IDS = np.random.default_rng(0).integers(0, 50, (3, 7))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "words.onnx"
    onnx.save(sequence_network(), path)
    return path


@pytest.fixture(scope="module")
def compressed(network):
    return tq.compress(network, bits=12, effort=1)


def one_product(**changes):
    """x · w as a model; `changes` of its initialiser."""
    weight = initialiser("w", 16, 16)
    for name, value in changes.items():
        setattr(weight, name, value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])], [weight],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_coded_and_what_comes_back(network, compressed, tmp_path):
    compressed.save(tmp_path / "net.tq")
    loaded = tq.load(tmp_path / "net.tq")
    assert {row.name for row in loaded.report.layers} == CODED
    assert {name for name, _ in compressed.report.raw} == EXACT | {GRAPH}
    assert 8 * len(compressed.data) <= 12 * compressed.report.num_parameters
    loaded.save_onnx(tmp_path / "back.onnx")
    onnx.checker.check_model(str(tmp_path / "back.onnx"), full_check=True)
    assert far(run(tmp_path / "back.onnx", IDS), run(network, IDS)) < 0.01
    before, after = onnx.load(network).graph, onnx.load(tmp_path / "back.onnx").graph
    assert (before.input, before.output) == (after.input, after.output)
    decoded = loaded.state_dict()
    for old, new in zip(before.initializer, after.initializer, strict=True):
        assert (old.name, old.dims, old.data_type) == (new.name, new.dims, new.data_type)
        array = numpy_helper.to_array(new)
        if old.name in CODED:
            assert far(torch.tensor(array), torch.tensor(numpy_helper.to_array(old))) < 0.01
        else:
            assert array.tobytes() == numpy_helper.to_array(old).tobytes()
        if old.name in decoded:
            assert array.tobytes() == decoded[old.name].numpy().tobytes()
    assert not any(node.doc_string for node in after.node)


def test_without_the_graph_it_is_a_file_of_tensors(compressed, tmp_path):
    compressed.save(tmp_path / "net.tq")
    state, arrays = compressed.state_dict(), reader.load(tmp_path / "net.tq")
    assert set(state) == set(arrays) == CODED | EXACT
    assert all(arrays[k].tobytes() == v.numpy().tobytes() for k, v in state.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    model = one_product()
    array = numpy_helper.to_array(model.graph.initializer[0])
    kind = TensorProto.DataType.Value({"float64": "DOUBLE"}.get(dtype, dtype.upper()))
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", kind, array.shape, array.ravel()))  # not as raw_data
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = kind
    onnx.save(model, tmp_path / "net.onnx")
    compressed = tq.compress(tmp_path / "net.onnx", step=0.002)
    assert compressed.state_dict()["w"].dtype == getattr(torch, dtype)
    compressed.save_onnx(tmp_path / "back.onnx")
    back = onnx.load(tmp_path / "back.onnx").graph.initializer[0]
    assert back.data_type == kind
    assert far(torch.tensor(numpy_helper.to_array(back).astype(np.float64)), torch.tensor(array).double()) < 0.05


def test_weights_in_a_file_beside(network, compressed, tmp_path):
    onnx.save(onnx.load(network), tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert tq.compress(tmp_path / "net.onnx", bits=12, effort=1).data == compressed.data
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(errors.InputError, match=r"net\.onnx is not a valid \.onnx file"):
        tq.compress(tmp_path / "net.onnx", bits=12)


def test_a_file_beside_lies_in_the_same_folder(tmp_path):
    model = one_product()
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "below").mkdir()
    tampered = (tmp_path / "net.onnx").read_bytes().replace(b"weights.bin", b"../weights.")
    (tmp_path / "weights.").write_bytes((tmp_path / "weights.bin").read_bytes())
    (tmp_path / "below" / "net.onnx").write_bytes(tampered)
    with pytest.raises(errors.InputError, match="not a valid"):
        tq.compress(tmp_path / "below" / "net.onnx", bits=12)


def test_overrides_and_reserved_names(network):
    compressed = tq.compress(network, step=0.05, effort=1, overrides={"lstm_*": "exact"})
    assert {row.name for row in compressed.report.layers} == CODED - {"lstm_w", "lstm_r"}
    with pytest.raises(errors.InputError, match="kept for graphs"):
        tq.compress({"onnx:graph": torch.zeros(4, dtype=torch.uint8), "w": torch.randn(8, 8)}, bits=4)


def test_the_command_line(cli, network, tmp_path):
    words = tmp_path / "words.onnx"
    words.write_bytes(network.read_bytes())
    assert cli("compress", "--weights", "words.onnx", "--bits", 12, "--effort", 1, "-o", "words.tq")[0] == 0
    code, out, _ = cli("decompress", "words.tq", "-o", "back.onnx")
    assert (code, out.endswith(" bytes, 11 tensors\n")) == (0, True)
    assert far(run(tmp_path / "back.onnx", IDS), run(words, IDS)) < 0.01
    assert cli("decompress", "words.tq", "-o", "back.safetensors")[0] == 0
    assert set(load_file(tmp_path / "back.safetensors")) == CODED | EXACT
    code, _, err = cli("compress", "--weights", "words.onnx", "--model", "model.py:net", "--bits", 4, "-o", "other.tq")
    assert (code, "without --model" in err) == (2, True)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"no network", bytes(range(256)), b"\x08\x08"])
def test_broken_files_are_one_sentence(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(errors.InputError, match=r"net\.onnx is not a valid \.onnx file: ") as caught:
        tq.compress(tmp_path / "net.onnx", bits=4)
    assert "\n" not in str(caught.value)


def test_damaged_files_raise_what_they_should(network, tmp_path):
    """Cut and changed anywhere: read as another network, or refused."""
    good, rng = network.read_bytes(), np.random.default_rng(0)
    for number in range(150):
        bad = bytearray(good[: rng.integers(len(good))] if number % 3 == 0 else good)
        for _ in range(rng.integers(1, 6)):
            if bad:
                bad[rng.integers(len(bad)) if number % 2 else rng.integers(min(len(bad), 900))] = rng.integers(256)
        (tmp_path / "bad.onnx").write_bytes(bad)
        try:
            state = load_weights(tmp_path / "bad.onnx")
        except errors.InputError:
            continue
        assert GRAPH in state


def test_what_has_no_file_or_no_weights(tmp_path, monkeypatch):
    with pytest.raises(errors.InputError, match="No such file"):
        tq.compress(tmp_path / "absent.onnx", bits=4)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "relu", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "relu.onnx")
    with pytest.raises(errors.InputError, match="no weight to code"):
        tq.compress(tmp_path / "relu.onnx", bits=4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependency, match=r"pip install \"transquant\[onnx\]\""):
        tq.compress(tmp_path / "relu.onnx", bits=4)


def file_of(graph: bytes, **tensors):
    """A compressed file with this graph, and with these tensors stored exactly."""
    raw = {GRAPH: np.frombuffer(graph, np.uint8)} | {k: np.asarray(v) for k, v in tensors.items()}
    parts = [(RawEntry(k, v.shape, v.dtype.name), None) for k, v in raw.items()]
    return encode((2048, -11), parts, {k: v.tobytes() for k, v in raw.items()}, list, "m").data


def hollow():
    model = one_product()
    model.graph.initializer[0].ClearField("raw_data")
    return model


WEIGHT = np.ones((16, 16), np.float32)


def outside():
    model = hollow()
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="/etc/hostname")
    return model


def invalid():
    model = hollow()
    model.graph.node[0].input[0] = "nowhere"
    return model


@pytest.mark.parametrize(
    ("graph", "tensors", "message"),
    [
        (b"no graph", {}, "not valid: "),
        (b"", {"w": WEIGHT}, "no tensor 'w'"),
        (hollow(), {}, "a tensor 'w' that the file does not hold"),
        (hollow(), {"w": WEIGHT, "v": WEIGHT}, "no tensor 'v'"),
        (hollow(), {"w": WEIGHT[:8]}, "not of the shape and dtype"),
        (hollow(), {"w": WEIGHT.astype(np.int32)}, "not of the shape and dtype"),
        (outside(), {"w": WEIGHT}, "outside the file"),
        (invalid(), {"w": WEIGHT}, "not valid: Nodes in a graph must be topologically sorted"),
        (hollow().SerializeToString().replace(b"\x01w", b"\x01\xff"), {"w": WEIGHT}, "that the file does not hold"),
    ],
    ids=range(9),
)
def test_graphs_in_bad_files(tmp_path, graph, tensors, message):
    (tmp_path / "bad.tq").write_bytes(file_of(graph if isinstance(graph, bytes) else graph.SerializeToString(), **tensors))
    with pytest.raises(errors.CorruptFile, match=message):
        tq.load(tmp_path / "bad.tq").save_onnx(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_damaged_graphs_raise_nothing_else(compressed, tmp_path):
    everything = compressed._tensors()
    graph, tensors = everything.pop(GRAPH).numpy().tobytes(), {k: v.numpy() for k, v in everything.items()}
    rng, refused = np.random.default_rng(1), 0
    for _ in range(200):
        bad = bytearray(graph)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        (tmp_path / "bad.tq").write_bytes(file_of(bytes(bad), **tensors))
        try:
            tq.load(tmp_path / "bad.tq").save_onnx(tmp_path / "out.onnx")
        except errors.CorruptFile:
            refused += 1
    assert refused > 50


def test_a_graph_of_a_million_empty_nodes(tmp_path):
    """Two kilobytes that would take 600 MB once they are parsed."""
    body = b"\x0a\x00" * 1_000_000
    (tmp_path / "bomb.tq").write_bytes(file_of(b"\x08\x08\x3a\x80\x89\x7a" + body))
    with pytest.raises(errors.LimitExceeded, match=r"raise Limits\(max_decoded_bytes=\.\.\., max_expansion=\.\.\.\)"):
        tq.load(tmp_path / "bomb.tq").save_onnx(tmp_path / "out.onnx")


def test_a_file_without_a_graph(tmp_path):
    compressed = tq.compress({"w": torch.randn(8, 8)}, step=0.1)
    with pytest.raises(errors.InputError, match="holds no ONNX graph"):
        compressed.save_onnx(tmp_path / "net.onnx")


def test_a_huge_shape_is_refused_before_it_is_made(tmp_path):
    model = hollow()
    model.graph.initializer[0].dims[:] = [1 << 30, 1 << 30]
    (tmp_path / "bad.tq").write_bytes(file_of(model.SerializeToString(), w=WEIGHT))
    with pytest.raises(errors.CorruptFile):
        tq.load(tmp_path / "bad.tq").save_onnx(tmp_path / "out.onnx")
