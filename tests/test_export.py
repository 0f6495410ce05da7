"""Decoded networks elsewhere: ONNX Runtime with float and integer weights, torch.export, torch.compile."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import transquant as tq
from conftest import make_net
from networks import network, shared_data
from onnx_models import far, run
from transquant import errors
from transquant.export.integers import BLOCK, RANGES, rounded


class Words(nn.Module):
    """Embedding, LSTM, GRU, attention, a transposed convolution, a tied output layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 24)
        self.lstm = nn.LSTM(24, 16, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up = nn.ConvTranspose1d(24, 48, 2, stride=2, groups=2)
        self.pick = nn.utils.parametrizations.weight_norm(nn.Conv1d(48, 24, 3, padding=1, groups=4))
        self.out = nn.Linear(24, 40)
        self.out.weight = self.words.weight

    def forward(self, ids, gain):
        x = self.gru(self.lstm(self.words(ids))[0])[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.pick(self.up(x.transpose(1, 2))).transpose(1, 2)
        return self.out(x) * gain.unsqueeze(1)


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture(scope="module")
def small_six(small):
    return tq.compress(small, bits=6, effort=1)


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected(compressed, model, *inputs):
    return compressed.install(copy.deepcopy(model)).eval()(*inputs)


def test_a_module_with_decoded_weights(small, small_six, pictures, tmp_path):
    model = copy.deepcopy(small).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    records = small_six.export_onnx(model, pictures[:1], tmp_path / "net.onnx")
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for count in (1, 5):
        out = run(tmp_path / "net.onnx", pictures[:count])
        assert far(out, expected(small_six, small, pictures[:count])) < 1e-5
    proto = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {n.domain for n in proto.graph.node} == {""}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert ".py" not in str(proto.graph.node)  # no stack traces
    assert {(r.form, r.relative_error) for r in records} == {("float", 0.0)}
    assert {tuple(r.shape) for r in records} == {tuple(v.shape) for v in before.values() if v.ndim > 1}
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.slow
def test_every_kind_of_layer(words, tmp_path):
    compressed = tq.compress(words, step=0.01, effort=1)
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    gain = torch.rand(4, 1, generator=torch.Generator().manual_seed(1))
    compressed.export_onnx(words, {"gain": gain, "ids": ids}, tmp_path / "words.onnx")  # keywords, in any order
    inputs = {"ids": ids, "gain": gain}
    assert far(run(tmp_path / "words.onnx", inputs), expected(compressed, words, ids, gain)) < 1e-5
    records = compressed.export_onnx(words, (ids, gain), tmp_path / "int4.onnx", weights="int4")
    codes = {t.name for t in onnx.load(tmp_path / "int4.onnx").graph.initializer if t.name.endswith("_int4")}
    assert codes == {f"{r.name}_int4" for r in records}
    assert len(records) >= 10
    check_what_runs(tmp_path / "words.onnx", tmp_path / "int4.onnx", records, 0.13, inputs)


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.012), ("int4", 0.13)])
def test_integer_weights(small, small_six, pictures, tmp_path, form, bound):
    small_six.export_onnx(small, pictures, tmp_path / "float.onnx")
    records = small_six.export_onnx(small, pictures, tmp_path / "net.onnx", weights=form)
    proto = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {n.domain for n in proto.graph.node} == {""}
    assert len(records) == sum(v.ndim > 1 for v in small.state_dict().values())
    check_what_runs(tmp_path / "float.onnx", tmp_path / "net.onnx", records, bound, pictures)


def check_what_runs(floats, integers, records, bound, *inputs):
    """What ONNX Runtime makes of codes and scales is what the records say, and the network is as good as with those weights."""
    proto = onnx.load(integers)
    known = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in onnx.load(floats).graph.initializer}
    for record in records:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(record.name, onnx.TensorProto.FLOAT, record.shape))
    probe = integers.with_name("probe.onnx")
    onnx.save(proto, probe)
    first, *decoded = run(probe, *inputs, more=[r.name for r in records])
    for record, value in zip(records, decoded, strict=True):
        assert far(value, known[record.name]) == pytest.approx(record.relative_error, rel=1e-3, abs=1e-6)
        assert 0 <= record.relative_error < bound
    plain = onnx.load(floats)
    for tensor in plain.graph.initializer:
        if tensor.name in {r.name for r in records}:
            value = decoded[[r.name for r in records].index(tensor.name)]
            tensor.CopyFrom(numpy_helper.from_array(value.numpy(), tensor.name))
    onnx.save(plain, probe)
    assert far(first, run(probe, *inputs)) < 1e-5
    assert far(run(integers, *inputs), first) < 1e-5
    assert integers.stat().st_size < floats.stat().st_size


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_scales_are_the_best_that_were_tried(rng, form):
    rows = np.concatenate([rng.standard_normal((40, BLOCK)), rng.laplace(size=(40, BLOCK)), np.zeros((1, BLOCK))]).astype(
        np.float32
    )
    codes, scales = rounded(rows, form)
    low, high = RANGES[form]
    assert low <= codes.min()
    assert codes.max() <= high
    error = ((rows - codes * scales[:, None]) ** 2).sum(1)
    plain = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30) / high
    assert (error <= ((rows - np.clip(np.rint(rows / plain), low, high) * plain) ** 2).sum(1) * (1 + 1e-6)).all()
    assert error[-1] == 0
    grid = (rng.integers(low, high + 1, (20, BLOCK)) * 0.037).astype(np.float32)  # already on such a grid
    grid[:, 0] = high * 0.037
    codes, scales = rounded(grid, form)
    assert np.abs(codes * scales[:, None] - grid).max() < 1e-5


def test_half_precision_is_exported_in_float32(tmp_path, pictures):
    model = make_net().bfloat16()
    compressed = tq.compress(model, bits=8, effort=1)
    compressed.export_onnx(model, pictures.bfloat16(), tmp_path / "net.onnx")
    assert far(run(tmp_path / "net.onnx", pictures), expected(compressed, make_net(), pictures)) < 1e-5
    assert model.conv.weight.dtype == torch.bfloat16


class Undecided(nn.Module):
    """The way depends on the values: no graph says that."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else x


class ThreeAtATime(Undecided):
    def forward(self, x):
        return self.layer(x) + torch.ones(3, 4)


def test_what_cannot_be_exported_is_one_sentence(small, small_six, pictures, tmp_path, monkeypatch):
    out = tmp_path / "net.onnx"
    for weights, example, message in (
        ("int3", pictures, "weights is 'int3', allowed are 'float', 'int8', 'int4'"),
        ("float", 3, "the example input is a int, allowed are"),
        ("float", {"x": None}, "has no tensor with samples"),
        ("float", pictures[:, :2], "torch cannot export the model to ONNX: "),
    ):
        with pytest.raises(errors.InputError, match=message) as caught:
            small_six.export_onnx(small, example, out, weights)
        assert "\n" not in str(caught.value)
    other = Undecided()
    with pytest.raises(errors.InputError, match="torch cannot export"):
        tq.compress(other, step=0.01).export_onnx(other, torch.randn(2, 4), out)
    fixed = ThreeAtATime()
    with pytest.raises(errors.InputError, match=r"fixes the number of samples \(3 here\)"):
        tq.compress(fixed, step=0.01).export_onnx(fixed, torch.randn(3, 4), out)
    with pytest.raises(errors.InputError, match="do not fit"):
        small_six.export_onnx(other, torch.randn(2, 4), out)
    with pytest.raises(errors.OutputError, match="does not exist"):
        small_six.export_onnx(small, pictures, tmp_path / "absent" / "net.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependency, match=r"pip install \"transquant\[onnx\]\""):
        small_six.export_onnx(small, pictures, out)
    assert not list(tmp_path.iterdir())


def test_the_command_line(cli, tmp_path, small, small_six, pictures):
    small_six.save(tmp_path / "net.tq")
    base = ("export", "net.tq", "--model", "model.py:net", "-o", "net.onnx")
    code, out, _ = cli(*base, "--input-shape", "1,3,12,12", "--weights", "int8")
    assert (code, out.startswith("net.onnx: ")) == (0, True)
    assert " 4 weights as int8, relative errors up to 0.0" in out
    code, _, err = cli(*base, "--example", "model.py:picture")
    assert (code, "exists already" in err) == (2, True)
    (tmp_path / "model.py").write_text(
        (tmp_path / "model.py").read_text() + "\ndef picture():\n    return torch.randn(2, 3, 12, 12)\n"
    )
    code, out, _ = cli(*base, "--example", "model.py:picture", "--force", "--json")
    assert (code, [w["form"] for w in json.loads(out)["weights"]]) == (0, ["float"] * 4)
    assert far(run(tmp_path / "net.onnx", pictures), expected(small_six, small, pictures)) < 1e-5
    for more, message in (
        ((), "give one example input"),
        (("--input-shape", "1,x"), "expected positive integers"),
        (("--example", "model.py:fails"), "no weights here"),
        (("--example", "model.py:picture", "--input-shape", "1,3"), "give one example input"),
        (("--input-shape", "1,3,12,12", "--weights", "int5"), "int5"),
    ):
        code, out, err = cli(*base, *more, "--force")
        assert (code, out, message in err) == (2, "", True), err
    assert cli("export", "net.tq", "--input-shape", "1,3", "-o", "other.onnx")[0] == 2
    assert cli("export", "net.tq", "--model", "model.py:net", "--input-shape", "1,3", "-o", "net.pt")[0] == 2


def test_torch_export_and_compile(small, small_six, pictures):
    decoded = small_six.install(make_net())
    with torch.no_grad():
        expectation = decoded(pictures)
        program = torch.export.export(decoded, (pictures,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert torch.allclose(program.module()(pictures[:3]), decoded(pictures[:3]), atol=1e-6)
        compiled = torch.compile(decoded, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(pictures), expectation, atol=1e-6)


REAL = {"resnet20": (3, 32, 32), "squeezenet": (3, 224, 224), "mobilenet": (3, 224, 224), "charrnn": None}


@pytest.mark.slow
@pytest.mark.skipif(shared_data() is None, reason="needs the real networks of ../shared/data")
@pytest.mark.parametrize("name", REAL)
def test_real_networks(name, tmp_path):
    generator, shape = torch.Generator().manual_seed(0), REAL[name]
    inputs = torch.randint(0, 65, (3, 40), generator=generator) if shape is None else torch.randn(3, *shape, generator=generator)
    model = network(name)
    compressed = tq.compress(model, bits=6, effort=1)
    compressed.export_onnx(model, inputs[:1], tmp_path / "net.onnx")
    assert far(run(tmp_path / "net.onnx", inputs), expected(compressed, model, inputs)) <= 1e-4
    again = tq.compress(tmp_path / "net.onnx", bits=8, effort=1)
    again.save_onnx(tmp_path / "back.onnx")
    onnx.checker.check_model(str(tmp_path / "back.onnx"), full_check=True)
    assert far(run(tmp_path / "back.onnx", inputs), run(tmp_path / "net.onnx", inputs)) < (0.3 if name == "mobilenet" else 0.03)
