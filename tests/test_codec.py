"""The main job through the public API, on a small network of every coded kind of layer."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import transquant as tq
from transquant import reader


def saved(compressed, folder):
    path = folder / "net.tq"
    compressed.save(path)
    return path


# ------------------------------------------------------------------------------------------------ round trip


def test_file_gives_back_what_compress_holds(compressed, small, tmp_path):
    loaded = tq.load(saved(compressed, tmp_path))
    state, again = compressed.state_dict(), loaded.state_dict()
    original = small.state_dict()
    assert list(again) == list(original)
    for key, value in again.items():
        assert value.dtype == original[key].dtype
        assert value.shape == original[key].shape
        assert torch.equal(value, state[key])
    twin = copy.deepcopy(small)
    assert loaded.install(twin) is twin
    twin.load_state_dict(again, strict=True)


def test_tensors_that_were_given_are_the_callers_own(compressed, tmp_path):
    """Loading decodes once for the first state dict; what is done to that one does not reach the next."""
    loaded = tq.load(saved(compressed, tmp_path))
    expected = compressed.state_dict()
    for value in loaded.state_dict().values():
        value.zero_()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_numpy_reader_gives_the_same_bits(compressed, tmp_path):
    path = saved(compressed, tmp_path)
    arrays = reader.load(path)
    for key, value in compressed.state_dict().items():
        assert arrays[key].tobytes() == value.numpy().tobytes(), key


def test_numpy_reader_needs_numpy_alone(compressed, tmp_path):
    path = saved(compressed, tmp_path)
    code = (
        "import sys\n"
        "for name in ('torch', 'numba', 'safetensors', 'typer', 'rich', 'scipy'): sys.modules[name] = None\n"
        "import transquant.reader\n"
        f"print(sum(v.size for v in transquant.reader.load({str(path)!r}).values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(v.numel() for v in compressed.state_dict().values())


def test_high_rate_is_the_same_function(small, samples):
    """BatchNorm comes back as an equivalent set: nothing but rounding separates the outputs."""
    fine = tq.compress(small, samples, step=1e-7)
    decoded = fine.install(copy.deepcopy(small))
    with torch.no_grad():
        torch.testing.assert_close(decoded(samples), small(samples), rtol=1e-3, atol=1e-3)
    assert torch.equal(decoded.bn.running_mean, torch.zeros(16))
    assert not torch.equal(small.bn.running_mean, decoded.bn.running_mean)
    assert torch.equal(decoded.bn.num_batches_tracked, small.bn.num_batches_tracked)


def test_calibration_beats_rounding_at_the_same_size(small, samples):
    ours, plain = tq.compress(small, samples, bits=3.0), tq.compress(small, None, bits=3.0)
    with torch.no_grad():
        reference = small(samples).log_softmax(1)
        distances = []
        for one in (ours, plain):
            output = one.install(copy.deepcopy(small))(samples).log_softmax(1)
            distances.append(float((reference.exp() * (reference - output)).sum(1).mean()))
    assert distances[0] < 0.7 * distances[1]


# ------------------------------------------------------------------------------------------------ nothing is changed


def test_model_and_random_states_are_left_alone(small, samples):
    model = copy.deepcopy(small).train()
    model.norm.eval()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    model.conv.weight.requires_grad_(False)
    hook_calls = []
    model.linear.register_forward_hook(lambda *a: hook_calls.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    def refuse(model, batch):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        raise RuntimeError("no")

    for forward in (None, refuse):
        if forward:
            with pytest.raises(tq.errors.InputError, match="refuses"):
                tq.compress(model, samples, bits=4, forward=forward)
        else:
            tq.compress(model, samples, bits=4)
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["linear.weight"]
        assert not model.conv.weight.requires_grad
        assert len(model.linear._forward_hooks) == 1
        assert all(not m._forward_hooks for m in model.modules() if m is not model.linear)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


def test_same_seed_same_file_with_any_number_of_threads(small, samples):
    before = torch.get_num_threads()
    try:
        files = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            files.append(tq.compress(small, samples, bits=4.0, seed=3).data)
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]
    batches = [samples[k : k + 50] for k in range(0, 160, 50)]
    assert tq.compress(small, batches, bits=4.0, seed=3).data == files[0]
    assert tq.compress(small, samples, bits=4.0, seed=4).data != files[0]


def test_interrupted_statistics_leave_threads_as_they_were(small, samples):
    before = torch.get_num_threads()

    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tq.compress(small, samples, bits=4, progress=interrupt)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------ what may be given


def test_kinds_of_batches_give_the_same_file(small, samples):
    expected = tq.compress(small, samples, step=0.1).data
    labels = torch.zeros(len(samples))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(samples, labels), batch_size=40)
    for calibration in (loader, [(samples, labels)], [[samples[:100], labels], [samples[100:], labels]], iter([samples])):
        assert tq.compress(small, calibration, step=0.1).data == expected

    class Named(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, pixels, scale=1.0):
            return {"logits": self.body(pixels * scale), "extra": torch.zeros(1)}

    named = Named(small)
    one = tq.compress(named, [{"pixels": samples, "labels": labels}], step=0.1)
    two = tq.compress(named, [samples], step=0.1, forward=lambda m, b: m(b, 1.0), output=lambda r: r["logits"])
    assert one.data == two.data
    assert one.report.metric == "kl"


def test_metric_follows_the_output():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    images = torch.randn(64, 3, 10, 10)
    report = tq.compress(model, images, bits=8.0).report
    assert report.metric == "mse"
    assert "mse" in str(report)
    with pytest.raises(tq.errors.InputError, match="metric 'kl' needs an output of shape"):
        tq.compress(model, images, bits=8.0, metric="kl")
    assert tq.compress(model, images, bits=8.0, metric="weights").report.metric == "weights"
    with pytest.raises(tq.errors.InputError, match="needs calibration"):
        tq.compress(model, None, bits=8.0, metric="mse")


def test_tied_weights_are_counted_and_coded_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids)))

    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.randint(0, 50, (64, 7))
    compressed = tq.compress(model, ids, bits=6.0)
    assert compressed.report.num_parameters == 800
    assert compressed.report.original_bytes == 3200
    assert len(compressed.data) <= 600
    state = compressed.state_dict()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    twin = compressed.install(copy.deepcopy(model))
    assert twin.head.weight is twin.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_in_their_own(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype).eval()
    model.register_buffer("table", torch.arange(6, dtype=torch.int32))
    compressed = tq.compress(model, torch.randn(64, 20), bits=5.0)
    state = compressed.state_dict()
    assert state["0.weight"].dtype == dtype
    assert torch.equal(state["table"], model.table)
    compressed.install(copy.deepcopy(model))(torch.randn(2, 20, dtype=dtype))
    assert compressed.report.raw == (("table", "a buffer"),)


def test_state_dict_and_safetensors_without_calibration(small, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(small.state_dict(), path)
    by_state, by_path = tq.compress(small.state_dict(), size=4000), tq.compress(path, size=4000)
    state = by_state.state_dict()
    assert sorted(by_path.state_dict()) == sorted(state)  # the file has its own order
    assert by_path.report.num_parameters == by_state.report.num_parameters
    assert list(state) == list(small.state_dict())
    assert torch.equal(state["bn.running_var"], small.bn.running_var)  # no module: no equivalent set
    with pytest.raises(tq.errors.InputError, match="need the model itself"):
        tq.compress(small.state_dict(), torch.randn(4, 3, 12, 12), size=4000)
    with pytest.raises(tq.errors.InputError, match="No such file"):
        tq.compress(tmp_path / "missing.safetensors", size=4000)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(tq.errors.InputError, match="not a valid"):
        tq.compress(path, size=4000)
    with pytest.raises(tq.errors.InputError, match=r"\.safetensors"):
        tq.compress(tmp_path / "weights.npz", size=4000)


def test_overrides_store_exactly(small, samples):
    compressed = tq.compress(small, samples, bits=10.0, overrides={"linear.*": "exact"})
    state = compressed.state_dict()
    assert torch.equal(state["linear.weight"], small.linear.weight)
    assert torch.equal(state["linear.bias"], small.linear.bias)
    assert not torch.equal(state["conv.weight"], small.conv.weight)
    assert ("linear.weight", "override") in compressed.report.raw
    with pytest.raises(tq.errors.InputError, match="no weight to code"):
        tq.compress(small, samples, bits=4.0, overrides={"*": "exact"})


def test_unreached_layers_and_constant_weights(samples):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(16, 16)
            self.zero = nn.Linear(8, 8)
            nn.init.zeros_(self.zero.weight)
            nn.init.zeros_(self.zero.bias)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.used(x).mean((2, 3))
            return self.head(x + self.zero(x))

    torch.manual_seed(0)
    model = Half().eval()
    state = tq.compress(model, samples, bits=10.0).state_dict()
    assert not state["zero.weight"].any()
    error = (state["unused.weight"] - model.unused.weight).std() / model.unused.weight.std()
    assert error < 0.2  # calibration says nothing of it, so it is kept with care


@pytest.mark.parametrize(
    ("model", "calibration", "message"),
    [
        (nn.Sequential(nn.ReLU()), None, "no weight to code"),
        ("a string", None, r"\.safetensors"),
        (42, None, "model is a int"),
        (nn.Sequential(nn.LazyLinear(3)), None, "not initialised"),
        (nn.Linear(4, 2), 7, "calibration is a int"),
        (nn.Linear(4, 2), [], "no batches"),
        (nn.Linear(4, 2), torch.zeros(0, 4), "no samples"),
        (nn.Linear(4, 2), torch.full((8, 4), float("nan")), "NaN or infinite"),
        (nn.Linear(4, 2), torch.zeros(8, 5), r"refuses a calibration batch of shape \(\d, 5\)"),
        (nn.Linear(4, 2), torch.full((8, 4), 3e38), "NaN or infinite"),
    ],
)
def test_bad_models_and_calibration(model, calibration, message):
    with pytest.raises(tq.errors.InputError, match=message):
        tq.compress(model, calibration, step=0.1)


def test_nan_weights_are_refused(small, samples):
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.conv.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(tq.errors.InputError, match="'conv.weight' has NaN or infinite values"):
        tq.compress(broken, samples, bits=4.0)


def test_install_refuses_another_network(compressed, small):
    with pytest.raises(tq.errors.InputError, match="missing|unexpected"):
        compressed.install(nn.Linear(3, 4))
    with pytest.raises(tq.errors.InputError, match="mode is 'fast'"):
        compressed.install(small, mode="fast")


# ------------------------------------------------------------------------------------------------ saving


def test_save_is_whole_or_not_at_all(compressed, tmp_path):
    with pytest.raises(tq.errors.OutputError, match="missing does not exist"):
        compressed.save(tmp_path / "missing" / "net.tq")
    folder = tmp_path / "folder.tq"
    folder.mkdir()
    with pytest.raises(tq.errors.OutputError):
        compressed.save(folder)
    old = tmp_path / "net.tq"
    old.write_bytes(b"precious")
    compressed.save(old)
    assert old.read_bytes() == compressed.data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.tq", "net.tq"]


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(tq.errors.InputError, match="missing.tq"):
        tq.load(tmp_path / "missing.tq")
