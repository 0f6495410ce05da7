"""A pruned network's file says which channels were kept, and goes into the original class."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import transquant as tq
from mutators import mutant
from test_removal import Stream, chosen, images_of, randomised
from tqfile import split
from transquant import inference, pruning, reader, training
from transquant.channels import MARK, KeptChannels, Slice, mask_of, shapes_after, shapes_before, steps_of
from transquant.container import read_container
from transquant.errors import CorruptFile, FileError, InputError


def original():
    torch.manual_seed(0)
    return randomised(Stream())


@pytest.fixture(scope="module")
def images():
    return images_of(64, 30)


@pytest.fixture(scope="module")
def small(images):
    groups = pruning.channel_groups(original(), images[:2])
    return pruning.removed(original(), groups, chosen(groups, 4))


@pytest.fixture(scope="module")
def compressed(small, images):
    return tq.compress(small, images, bits=5.0, activations=8.0, effort=1)


@pytest.fixture(scope="module")
def fixed(small, images):
    return tq.compress(small, images, step=0.01, coding="fixed", effort=1)


def far(one, other, images):
    with torch.no_grad():
        expected, found = one(images), other(images)
    return float((expected - found).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mode", ["float", "transform", "lazy", "activations", "int8"])
def test_a_file_goes_into_the_original_class_in_every_mode(mode, small, compressed, images, tmp_path):
    if mode == "int8" and not inference.has_exact_kernels():
        pytest.skip("integer kernels are for x86 processors")
    compressed.save(tmp_path / "small.tq")
    loaded = tq.load(tmp_path / "small.tq")
    net = original()
    there = loaded.install(net, mode)
    assert there is net
    assert (net.stem.out_channels, net.deep.groups) == (small.stem.out_channels, small.deep.groups)
    assert far(loaded.install(copy.deepcopy(small), mode), there, images) == 0
    assert far(loaded.install(net if mode == "float" else original(), mode), there, images) == 0  # a second time


def test_fixed_codes_stay_packed(small, fixed, images):
    assert far(fixed.install(copy.deepcopy(small)), fixed.install(original(), "packed"), images) < 1e-5


def test_the_size_holds_with_the_list_and_the_report_says_what_was_kept(small, compressed):
    size = len(compressed.data)
    for target in (size - 300, size + 211):
        assert target - 64 <= len(tq.compress(small, size=target, effort=1).data) <= target
    loaded = tq.codec.load_bytes(compressed.data)
    layers = {"stem": 8, "inner": 12, "wide": 6, "first": 10}
    kept = small.stem.out_channels + small.inner.out_channels + small.wide.out_channels + small.first.out_features
    assert compressed.report.kept_channels == loaded.report.kept_channels == (kept, sum(layers.values()))
    assert f"{kept} of 36 channels were kept" in str(loaded.report)
    assert loaded.report.num_parameters == sum(p.numel() for p in small.parameters())
    plain = tq.compress(original(), step=0.1, effort=1).report
    assert plain.kept_channels is None
    assert "kept" not in str(plain)


def test_the_numpy_reader_and_state_dicts_are_those_of_the_small_module(small, compressed):
    arrays = reader.loads(compressed.data)
    assert {k: v.shape for k, v in arrays.items()} == {k: tuple(v.shape) for k, v in small.state_dict().items()}


def test_a_module_that_was_installed_into_is_compressed_with_its_list(compressed, images):
    net = compressed.install(original())
    again = tq.compress(net, step=0.002, effort=1)
    assert read_container(again.data).kept == read_container(compressed.data).kept
    assert far(net, again.install(original()), images) < 0.1


def test_channels_can_be_removed_again(small, compressed, images):
    groups = pruning.channel_groups(small, images[:2])
    smaller = pruning.removed(small, groups, {"inner": [1], "first": [0, 2]})
    data = tq.compress(smaller, step=0.05, effort=1)
    net = data.install(original())
    assert far(data.install(copy.deepcopy(smaller)), net, images) == 0
    assert far(data.install(compressed.install(original())), net, images) == 0  # one that is half way there
    assert net.inner.out_channels == 1


def test_a_part_of_a_model_that_was_pruned(small, images):
    def whole(part):
        torch.manual_seed(3)
        return nn.Sequential(part, nn.ReLU(), nn.Linear(4, 2)).eval()

    data = tq.compress(whole(copy.deepcopy(small)), step=0.05, effort=1)
    assert far(data.install(whole(copy.deepcopy(small))), data.install(whole(original())), images) == 0


def test_layers_under_two_names_and_on_the_meta_device():
    def net():
        torch.manual_seed(0)
        result = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        result.append(nn.ModuleDict({"same": result[2]}))
        result[4].forward = lambda x: x
        return result.eval()

    x = torch.randn(4, 6)
    groups = pruning.channel_groups(net(), x)
    data = tq.compress(pruning.removed(net(), groups, {"0": [1, 5, 6], "2": [0, 3]}), step=0.01, effort=1)
    there = data.install(net())
    assert there[4]["same"].weight is there[2].weight
    assert there[2].weight.shape == (2, 3)
    with torch.device("meta"):
        ghost = net()
    assert far(there, data.install(ghost), x) == 0


def test_models_that_do_not_fit_stay_as_they_are(compressed):
    net = original()
    net.last = nn.Linear(10, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match="do not fit the model"):
        compressed.install(net)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not hasattr(net, MARK)


def test_a_model_that_was_changed_after_pruning(small):
    other = copy.deepcopy(small)
    other.back = nn.Identity()
    with pytest.raises(InputError, match="changed since"):
        tq.compress(other, step=0.1, effort=1)
    del other.__dict__[MARK]
    assert read_container(tq.compress(other, step=0.1, effort=1).data).kept == ()


def test_training_keeps_the_list(small, images):
    other = copy.deepcopy(small)
    training.prepare(other, bits=6.0)
    hardened = training.harden(other)
    assert read_container(hardened.data).kept == steps_of(small)
    assert far(other, hardened.install(original()), images) < 1e-5


@pytest.mark.slow
def test_onnx_of_the_original_class(compressed, images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    compressed.export_onnx(original(), images[:2], tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images[:8].numpy()})
    with torch.no_grad():
        expected = compressed.install(original())(images[:8])
    assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


# ------------------------------------------------------------------------------------------- the list itself


def test_masks_and_shapes():
    step = KeptChannels(6, mask_of(6, [0, 4]), (Slice("a", 0, 2, 1), Slice("b", 1, 0, 3)))
    assert (step.mask, step.count, step.removed, step.gone()) == ("88", 2, 4, [1, 2, 3, 5])
    small = {"a": (5,), "b": (2, 6), "c": (1,)}
    assert shapes_before([step], small) == {"a": [9], "b": [2, 18]}
    assert shapes_after([step], {"a": (9,), "b": (2, 18)}) == {"a": [5], "b": [2, 6]}
    assert shapes_after([step], {"a": (7,), "b": (2, 18)}) is None
    assert isinstance(shapes_before([step], {"a": (3,), "b": (2, 6)}), str)
    assert isinstance(shapes_before([step], {"a": (5,)}), str)


def list_of(data):
    return split(data).value["kept"]


def with_list(data, kept):
    parts = split(data)
    value = parts.value
    value["kept"] = kept
    return parts.with_value(value).join()


def test_the_list_is_short(small, compressed):
    kept = list_of(compressed.data)
    assert [step[0] for step in kept] == [8, 12, 6, 10]
    twin = copy.deepcopy(small)
    del twin.__dict__[MARK]
    bare = with_list(compressed.data, [])
    assert read_container(bare).kept == ()
    assert len(compressed.data) - len(bare) < 150
    names = [t["n"] for t in split(compressed.data).value["tensors"]]
    assert [names[row[0]] for row in kept[1][2]] == ["inner.weight", "inner_norm", "slopes.weight", "back.weight"]


BAD = {
    "no list": {},
    "no step": [[]],
    "a step of two": [[8, "80"]],
    "one channel": [[1, "8", [[0]]]],
    "a boolean": [[True, "8", [[0]]]],
    "2^40 channels": [[1 << 40, "8", [[0]]]],
    "a short mask": [[8, "8", [[0]]]],
    "a long mask": [[8, "800", [[0]]]],
    "upper case": [[8, "F0", [[0]]]],
    "a sign": [[8, "-1", [[0]]]],
    "an underscore": [[12, "8_0", [[0]]]],
    "other digits": [[8, "٨٠", [[0]]]],
    "a number for a mask": [[8, 80, [[0]]]],
    "nothing kept": [[8, "00", [[0]]]],
    "all kept": [[8, "ff", [[0]]]],
    "bits beyond the channels": [[6, "83", [[0]]]],
    "no places": [[8, "80", []]],
    "an empty place": [[8, "80", [[]]]],
    "a place of five": [[8, "80", [[0, 0, 0, 1, 0]]]],
    "no such entry": [[8, "80", [[99]]]],
    "a negative entry": [[8, "80", [[-1]]]],
    "a name for an entry": [[8, "80", [["stem.weight"]]]],
    "no such axis": [[8, "80", [[0, 4]]]],
    "axis 8": [[8, "80", [[0, 8]]]],
    "a negative axis": [[8, "80", [[0, -1]]]],
    "a float for a start": [[8, "80", [[0, 0, 0.0]]]],
    "a span of nothing": [[8, "80", [[0, 0, 0, 0]]]],
    "a start behind the end": [[8, "80", [[0, 0, 100]]]],
    "more than a dimension can be": [[1 << 20, "8" + "0" * ((1 << 18) - 1), [[0, 0, 0, 1 << 12]]]],
    "65,537 places": [[8, "80", [[0]] * ((1 << 16) + 1)]],
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_lists(what, compressed):
    with pytest.raises(CorruptFile):
        read_container(with_list(compressed.data, BAD[what]))


def test_a_list_that_shapes_allow_but_layers_do_not(small, compressed):
    def inverted(change):
        kept = json.loads(json.dumps(list_of(compressed.data)))
        change(kept)
        return tq.codec.load_bytes(with_list(compressed.data, kept))

    class Odd(nn.Module):
        def __init__(self, net):
            super().__init__()
            for name, layer in net.named_children():
                self.add_module(name, layer)
            self.stem = nn.Module()
            self.stem.weight, self.stem.bias = nn.Parameter(torch.zeros(8, 3, 3, 3)), nn.Parameter(torch.zeros(8))

    with pytest.raises(InputError, match="do not fit the layer 'stem', a Module"):
        inverted(lambda kept: None).install(Odd(original()))
    # biases of another length than rows: nothing that a file for this class would have
    lopsided = inverted(lambda kept: kept[0][2].pop(1))
    with pytest.raises(InputError, match="do not fit"):
        lopsided.install(original())


def test_mutants_of_a_list_are_read_or_refused(compressed):
    parts = [split(compressed.data)]
    seen = set()
    for number in range(300):
        data = mutant(parts, 7, number)[1]
        try:
            container = read_container(data)
        except FileError as error:
            seen.add(type(error).__name__)
            continue
        seen.add("read")
        shapes = {s.key for step in container.kept for s in step.slices}
        assert shapes <= {k for e in container.entries for k in (e.name, *(f"{e.name}.{v}" for v in ("weight", "bias", "running_mean", "running_var")))}  # fmt: skip
    assert seen >= {"read", "CorruptFile", "UnsupportedVersion"}


GOLDEN = [  # two steps, and a third from what they had left; starts are those that the steps before have left
    [6, "b4", [[1], [2], [5], [6, 0, 0, 2], [7, 1, 0, 8]]],
    [5, "68", [[3], [4], [5, 0, 4], [6, 0, 8, 2], [7, 1, 32, 8]]],
    [3, "a", [[3], [4], [5, 0, 4], [6, 0, 8, 2], [7, 1, 32, 8]]],
]


def test_the_golden_file():
    """Read for ever as it was written: the list, and a module of the original class that loses its channels."""

    class Pruned(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 5, 1), nn.BatchNorm2d(11)
            self.deep, self.head = nn.Conv2d(11, 22, 3, groups=11, bias=False), nn.Linear(22 * 4, 3)
            self.register_buffer("table", torch.zeros(5, dtype=torch.int64))

        def forward(self, x):
            x = self.norm(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1))
            return self.head(torch.relu(self.deep(x)).flatten(1))

    golden = tq.load(Path(__file__).resolve().parent / "golden" / "version1_kept.tq")
    assert list_of(golden.data) == GOLDEN
    net = golden.install(Pruned().eval())
    assert (net.left.out_channels, net.right.out_channels, net.deep.groups, net.head.in_features) == (4, 2, 6, 48)
    assert net(torch.ones(2, 1, 4, 4)).shape == (2, 3)
    assert golden.report.kept_channels == (6, 11)
