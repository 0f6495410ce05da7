"""DiffQ in the training room, and the steps of spans that its files have."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import transquant as tq
from tqfile import split
from training_loop import train
from transquant import bitstream, training
from transquant.container import read_container
from transquant.demo.network import DigitsNet, load_digits_split, pretrained
from transquant.entropy import lanes
from transquant.errors import CorruptFile, FileError, InputError, LimitExceeded, UnsupportedVersion
from transquant.grid import steps, tensor_index
from transquant.records import CodedEntry, CodedTensor, Limits
from transquant.training.diffq import MOST, RANGE, NoisyWeight, snap

STEP = 3000, -18


# --------------------------------------------------------------------------------------- the format


def spanned(shape, width, seed=0, exponents=None, **entry):
    draw = np.random.default_rng(seed)
    made = CodedEntry("w", shape, groups="s", span=width, qp=-5, **entry)
    if exponents is None:
        exponents = np.rint(draw.normal(0, 3, (made.rows, made.spans)))
    symbols = np.rint(draw.normal(0, 2, (made.rows, made.columns))).astype(np.int32)
    return CodedTensor(made, symbols, span_exponents=np.asarray(exponents).astype(np.int32))


def file_of(*tensors, coder="m"):
    parts = [(t.entry, t) for t in tensors]
    return bitstream.encode(STEP, parts, {}, lambda jobs: (lanes.encode_planes(*job) for job in jobs), coder)


@pytest.mark.parametrize(
    ("shape", "width"), [((6, 16), 8), ((5, 3, 3, 3), 4), ((4, 7), 1), ((3, 10), 1024), ((0, 4), 2), ((3, 0), 2)]
)
def test_each_span_has_its_step_in_both_readers(shape, width, tmp_path):
    tensor = spanned(shape, width)
    path = tmp_path / "w.tq"
    path.write_bytes(file_of(tensor).data)
    found = tq.reader.load(path)["w"].reshape(tensor.symbols.shape)
    np.testing.assert_array_equal(tq.load(path).state_dict()["w"].numpy().reshape(found.shape), found)
    for i, row in enumerate(tensor.symbols):
        for j, symbol in enumerate(row):
            t = np.array([[-5 + 2 * int(tensor.span_exponents[i, j // width])]])
            assert found[i, j] == np.float32(int(symbol) * steps(STEP, t)[0, 0])


@pytest.mark.parametrize("coder", ["s", "m", "t", "l"])
def test_a_fold_and_every_coder(coder, tmp_path):
    tensor = spanned((6, 48), 16, fold=4)
    decoded = bitstream.decode(
        read_container(file_of(tensor, coder=coder).data), lambda s: [[lanes.decode_planes(*j)[0] for j in k] for k in s]
    )
    np.testing.assert_array_equal(decoded["w"].symbols, tensor.symbols)
    np.testing.assert_array_equal(decoded["w"].span_exponents, tensor.span_exponents)


HOSTILE = [
    ({"w": 0}, CorruptFile), ({"w": 1025}, CorruptFile), ({"w": True}, CorruptFile), ({"w": None}, CorruptFile),
    ({"g": "r"}, CorruptFile), ({"g": ""}, CorruptFile), ({"g": "sc"}, UnsupportedVersion), ({"z": "t", "v": 2}, CorruptFile),
    ({"x": "k", "y": "c"}, CorruptFile), ({"z": "f", "y": "c"}, CorruptFile), ({"s": [48]}, CorruptFile),
    ({"w": 3}, FileError), ({"s": [8, 6]}, FileError), ({"d": [1, 32]}, CorruptFile),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error"), HOSTILE, ids=[str(c) for c, _ in HOSTILE])
def test_headers_that_say_other_things_of_spans(change, error, tmp_path):
    parts = split(file_of(spanned((6, 8), 4)).data)
    value = parts.value
    value["tensors"][0] |= change
    path = tmp_path / "bad.tq"
    path.write_bytes(parts.with_value(value).join())
    for read in (tq.reader.load, tq.load):
        with pytest.raises(error) as caught:
            getattr(read(path), "state_dict", dict)()
        assert len(str(caught.value).splitlines()) == 1


def test_spans_without_a_width_and_exponents_out_of_range():
    parts = split(file_of(spanned((6, 8), 4)).data)
    value = parts.value
    del value["tensors"][0]["w"]
    with pytest.raises(CorruptFile, match="spans of 0 columns"):
        tq.reader.loads(parts.with_value(value).join())
    with pytest.raises(CorruptFile, match="±64"):
        tq.reader.loads(file_of(spanned((2, 8), 4, exponents=[[64, -64], [0, 65]])).data)


def test_exponents_count_towards_the_decoded_size():
    """Of 512 values: 4 bytes each, 8 for the symbol, 8 for its own exponent."""
    data = file_of(spanned((16, 32), 1)).data
    assert tq.reader.loads(data, Limits(max_decoded_bytes=512 * 20)).keys() == {"w"}
    with pytest.raises(LimitExceeded):
        tq.reader.loads(data, Limits(max_decoded_bytes=512 * 20 - 1))


def test_exponents_of_neighbours_cost_little():
    runs = np.repeat(np.random.default_rng(0).integers(-2, 3, (64, 8)), 9, axis=1)
    bits = file_of(spanned((64, 576), 8, exponents=runs)).bits["w"].side
    assert bits < 0.75 * runs.size  # three bits a group on a wire without contexts
    assert file_of(spanned((64, 576), 8, exponents=0 * runs)).bits["w"].side < 0.03 * runs.size


# --------------------------------------------------------------------------------------- the soft weight


@pytest.fixture(scope="module")
def digits():
    (x, y), test = load_digits_split()
    return x, y, test


@pytest.fixture(scope="module")
def start(digits):
    return tq.compress(pretrained(), [digits[0][:256]], bits=1.5, trellis=False, effort=1)


def prepared(start, bits=1.5, model=None, **more):
    model = pretrained() if model is None else model
    return model, training.prepare(model, bits=bits, start=start, method="diffq", **more)


@pytest.fixture(scope="module")
def trained(digits, start):
    model, network = prepared(start, 1.2, steps=120)
    model.train()
    train(model, network, digits[:2], 120)
    model.eval()
    soft = copy.deepcopy(network.coded(0.0))
    return model, training.harden(model), soft


NAME = "features.3.weight"


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_is_as_defined(start, noise):
    model, network = prepared(start, noise=noise)
    model.train()
    weight, (scaled, logits) = network.soft[NAME], network.originals(NAME)
    with torch.no_grad():
        logits.add_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    generator = weight.generator()
    shape = weight.tensor.symbols.shape
    xi = torch.rand(shape, generator=generator) - 0.5 if noise == "uniform" else torch.randn(shape, generator=generator) / 2
    bits = MOST / (1 + torch.exp(-logits))
    size = (weight.extent * 2.0**-bits).repeat_interleave(8, 1)
    expected = (scaled.reshape(shape) + size * xi) * weight.unit
    torch.testing.assert_close(model.features[3].weight.reshape(shape), expected, rtol=1e-5, atol=1e-7)
    first = model.features[3].weight.detach().clone()
    torch.testing.assert_close(model.features[3].weight, first, rtol=0, atol=0)  # within a step
    network.step += 1
    assert (model.features[3].weight != first).float().mean() > 0.99
    model.eval()
    torch.testing.assert_close(model.features[3].weight, decoded(network, NAME), rtol=1e-6, atol=0)


def decoded(network, name):
    tensor = network.coded(0.0)[name]
    return torch.from_numpy(bitstream.tensor_values(tensor, network.template.container.step)).reshape(tensor.entry.shape)


def test_gradients_against_finite_differences(start):
    _, network = prepared(start, group=4)
    weight = network.soft["classifier.weight"].train()
    weight.unit, weight.extent = weight.unit.double(), weight.extent.double()
    scaled, logits = (p.detach().double().requires_grad_() for p in network.originals("classifier.weight"))
    with torch.no_grad():
        logits.add_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.autograd.gradcheck(lambda b: weight.bits(network.lengths, scaled, b), logits, fast_mode=True)
    assert torch.autograd.gradcheck(lambda w, b: weight(w, b) / weight.unit.reshape(weight.shape), (scaled, logits), fast_mode=True)


def test_rounding_takes_the_place_of_noise(start):
    """From the share `rounded` on: values of the file, gradients of noise that happens to be what rounding does."""
    model, network = prepared(start, rounded=0.0)
    model.train()
    weight, (scaled, logits) = network.soft[NAME], network.originals(NAME)
    values = model.features[3].weight
    torch.testing.assert_close(values, decoded(network, NAME), rtol=1e-4, atol=1e-7)
    values.sum().backward()
    torch.testing.assert_close(scaled.grad.reshape(weight.unit.shape), weight.unit)
    slope = -np.log(2) * MOST * torch.sigmoid(logits) * torch.sigmoid(-logits)
    errors = (values.detach() - scaled.detach() * weight.unit.reshape(scaled.shape)).reshape(len(logits), -1, 8).sum(2)
    torch.testing.assert_close(logits.grad, errors * slope, rtol=1e-3, atol=1e-5)


def test_the_step_is_finite_without_bits_and_as_published_with_many(start):
    _, network = prepared(start)
    weight = network.soft[NAME]
    extent = float(weight.extent)
    bits = torch.tensor([[1e-3, 6.0, 10.0]])
    found = weight.steps_of(torch.log(bits / (MOST - bits)))
    torch.testing.assert_close(found[0, 0].item(), extent, rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0, 1:], extent / (2 ** bits[0, 1:] - 1), rtol=0.02, atol=0)


def test_estimated_bits_follow_the_file(start):
    """Calibrated where the training begins, Σ group · b says within 10 % what all groups with a bit less, or more, take."""
    _, network = prepared(start, 4.0, init_bits=4.0)

    def sizes(bits):
        with torch.no_grad():
            for name in network.soft:
                network.originals(name)[1].fill_(float(np.log(bits / (MOST - bits))))
        coded = network.coded(0.0)
        parts = [(t.entry, t) for t in coded.values()]
        written = bitstream.encode(STEP, parts, {}, lambda jobs: (lanes.encode_planes(*job) for job in jobs), "m").section_bytes
        return sum(float(w.bits(network.lengths, *network.originals(n)).detach()) for n, w in network.soft.items()), 8 * written

    estimate, written = sizes(4.0)
    assert 0.75 < written / estimate < 1.1
    for bits in (3.0, 5.0):
        other, found = sizes(bits)
        assert abs(other * written / estimate / found - 1) < 0.1


@pytest.mark.parametrize("init_bits", [None, 8])
def test_one_outlier_changes_no_other_group(start, init_bits):
    def exponents(change):
        model = pretrained()
        with torch.no_grad():
            model.features[3].weight[5, 3, 1, 1] *= change
        network = prepared(start, model=model, init_bits=init_bits)[1]
        return network.coded(0.0)[NAME], network.soft[NAME]

    (plain, _), (wide, weight) = exponents(1.0), exponents(1000.0)
    np.testing.assert_array_equal(plain.span_exponents, wide.span_exponents)
    assert (plain.symbols != wide.symbols).sum() == 1
    assert isinstance(weight, NoisyWeight)
    assert float(weight.extent) < 2 * RANGE * float(np.sqrt(np.mean(plain.symbols**2)) + 1)


def test_a_shift_widens_steps_little_by_little(start):
    _, network = prepared(start, 3.0, init_bits=3.0)
    sizes = [len(network._file(network.coded(shift))) for shift in np.linspace(0, 0.5, 26)]
    falls = -np.diff(sizes) / sizes[0]
    assert sizes[-1] < 0.9 * sizes[0]
    assert falls.max() < 0.02
    for share in (0.9, 0.8, 0.7):
        target = share * sizes[0]
        assert 0.99 * target <= len(network._file(network.coded(network.shift_for(target)))) <= target


def test_snapping_prefers_the_left_neighbour():
    wanted = np.array([[0.0, 0.6, 1.4, 1.4, 9.0, -3.0]], np.float32)
    empty = np.array([[False, False, False, False, True, False]])
    assert snap(wanted, empty).tolist() == [[0, 0, 1, 1, 1, -3]]
    even = snap(np.full((100, 3), 0.25, np.float32), np.zeros((100, 3), bool))
    assert even.sum(0).tolist() == [25, 25, 25]
    assert (np.diff(even, axis=0) != 0).sum() == 3  # once a column


# --------------------------------------------------------------------------------------- whole networks


def test_hardened_at_the_asked_size_with_its_buffers(digits, trained):
    model, compressed, soft = trained
    size = 1.2 * sum(p.numel() for p in pretrained().parameters()) / 8
    assert 0.99 * size <= len(compressed.data) <= size
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in pretrained().named_parameters()]
    x, y = digits[2]
    fresh = compressed.install(DigitsNet()).eval()  # BatchNorms' running statistics too
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert (fresh(x).argmax(1) == y).float().mean() > 0.97
    arrays = tq.reader.loads(compressed.data)
    for key, value in model.state_dict().items():
        assert value.numpy().tobytes() == arrays[key].tobytes(), key
    for name, tensor in soft.items():
        values = bitstream.tensor_values(tensor, read_container(compressed.data).step).reshape(-1)
        assert (values != arrays[name].reshape(-1)).mean() < 0.01, name  # what the last bytes took


def test_ways_to_run_it(digits, trained):
    model, compressed, _ = trained
    x = digits[2][0]
    for mode in ("transform", "lazy"):
        torch.testing.assert_close(compressed.install(DigitsNet(), mode=mode).eval()(x), model(x), rtol=0, atol=0)
    with pytest.raises(InputError, match="packed"):
        compressed.install(DigitsNet(), mode="packed")
    assert compressed.report.side_info_bytes > 0
    assert "features.3" in str(compressed.report)


def test_groups_without_bits_cost_next_to_nothing(digits, start):
    model, network = prepared(start, 0.8, steps=80)
    model.train()
    train(model, network, digits[:2], 80)
    coded = network.coded(0.0)
    empty = groups = 0
    for tensor in coded.values():
        for row in tensor.symbols:
            spans = [row[j : j + 8] for j in range(0, len(row), 8)]
            groups, empty = groups + len(spans), empty + sum(not s.any() for s in spans)
    assert empty > 0.25 * groups
    largest = coded["features.10.weight"]
    none = file_of(replace(largest, symbols=0 * largest.symbols, span_exponents=0 * largest.span_exponents))
    assert 8 * len(none.data) / largest.span_exponents.size < 1.0  # header and coder's states included: below a bit a group


def test_the_same_seed_gives_the_same_file(digits, start):
    def made(seed):
        model, network = prepared(start, 1.3, steps=40, seed=seed)
        model.train()
        train(model, network, digits[:2], 40)
        return training.harden(model).data

    first = made(3)
    assert made(3) == first
    assert made(4) != first


@pytest.mark.parametrize("stop", [20, 38])
def test_a_training_goes_on_from_a_checkpoint(digits, start, stop):
    """Before symbols have settled, and after."""
    model, network = prepared(start, 1.3, steps=40)
    model.train()
    optimizer = train(model, network, digits[:2], stop)
    kept = copy.deepcopy((network.state(), model.state_dict(), optimizer.state_dict()))
    train(model, network, digits[:2], 40, stop, optimizer)
    whole = training.harden(model).data
    model, network = prepared(start, 1.3, steps=40)
    model.train()
    network.load(kept[0])
    model.load_state_dict(kept[1])
    optimizer = torch.optim.Adam(network.parameter_groups())
    optimizer.load_state_dict(kept[2])
    train(model, network, digits[:2], 40, stop, optimizer)
    assert network.settled
    assert training.harden(model).data == whole


@pytest.mark.parametrize(
    "options", [{"group": 3}, {"group": True}, {"noise": "normal"}, {"init_bits": 0}, {"init_bits": 15}, {"init_bits": "8"},
                {"rounded": -1}, {"rounded": "half"}, {"size_of_group": 8}],
)  # fmt: skip
def test_options_are_checked(start, options):
    model = pretrained()
    with pytest.raises(InputError, match=next(iter(options))):
        prepared(start, model=model, **options)
    assert training.soft_network(model) is None


def test_steps_of_a_transform_become_those_of_rows(digits):
    """What an error of a coefficient's step does to the weight, in the mean over what shares a step."""
    start = tq.compress(pretrained(), [digits[0][:256]], bits=1.5, trellis=False, transform="dct", effort=1)
    _, network = prepared(start)
    weight, template = network.soft[NAME], network.template.weights[NAME]
    assert template.entry.transform == "d"
    assert weight.tensor.entry.transform == "i"
    draw = np.random.default_rng(0)
    size = steps(network.template.container.step, tensor_index(template))
    errors = []
    for _ in range(200):
        shaken = replace(template, symbols=np.rint(draw.normal(0, 100, template.symbols.shape)).astype(np.int32))
        errors.append(bitstream.tensor_values(shaken, network.template.container.step) / 100)
    assert size.size
    measured = np.sqrt(np.mean(np.square(errors), axis=0))
    ratio = np.log2(measured / weight.unit.numpy())
    assert abs(ratio).max() < 0.6  # half an octave's rounding and what 200 draws leave
    assert abs(ratio.mean()) < 0.15
