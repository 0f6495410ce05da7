from __future__ import annotations

import numpy as np
import pytest
import torch

import transquant as tq
from conftest import make_net
from transquant import bitstream, distillation
from transquant.choices import Choice, Method
from transquant.distillation import Teacher, changed, learned_changes
from transquant.encoder import Encoder, Source
from transquant.modules import gather, micro_batches, plan_model, run_batch
from transquant.stats import Reference, collect
from transquant.stats.metric import distance, loss
from transquant.workers import workers


def run(model, batch):
    return run_batch(model, batch)


def quiet(done, total):
    pass


@pytest.fixture
def setting(net, images):
    """(encoder, draft, teacher, measure on the teacher's samples)."""
    plan, batches = plan_model(net), list(micro_batches([images]))
    source = Source(*gather(plan, net.state_dict()))
    with workers() as pool:
        stats = collect(net, batches, plan, run, pool)
        encoder = Encoder(plan, source, stats, pool, Method(state_bits=3))
        draft = encoder.draft(encoder.first_guess(500), Choice())
        yield encoder, draft, Teacher(net, batches, run, pool, "kl"), Reference(net, batches, run, pool, "kl")


def distil(encoder, teacher, draft, choice, share=1.0):
    return changed(encoder, draft, choice, learned_changes(teacher, draft, quiet), share)


def symbols(draft):
    return {e.name: draft.coded[e.name].symbols for e in draft.entries if len(getattr(e, "shape", ())) > 1}


def test_vectors_learn_and_weights_stay(setting):
    encoder, draft, teacher, reference = setting
    other = distil(encoder, teacher, draft, Choice())
    assert reference.distortion(other.state()) < 0.9 * reference.distortion(draft.state())
    before, after = symbols(draft), symbols(other)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert other.c == draft.c
    read = tq.reader.loads(encoder.encode(other).data)
    for key, value in other.state().items():
        np.testing.assert_array_equal(read[key], value.numpy())


def test_a_share_of_what_was_learned_is_that_share(setting):
    encoder, draft, teacher, _ = setting
    changes = learned_changes(teacher, draft, quiet)
    start, half, whole = (changed(encoder, draft, Choice(), changes, share).state() for share in (0.0, 0.5, 1.0))
    for name in changes:
        key = name.replace(".scale", ".weight").replace(".shift", ".bias")
        if key in start:
            unit = distillation.vector_places(draft)[key][1]
            assert float((half[key] - (start[key] + whole[key]) / 2).abs().max()) <= 1.01 * unit


def test_nothing_is_learned_where_outputs_are_too_many(setting, monkeypatch):
    encoder, draft, teacher, _ = setting
    monkeypatch.setattr(distillation, "MOST_OUTPUTS", 10)
    fresh = Teacher(make_net(), teacher.batches, run, encoder.pool, "kl")
    assert learned_changes(fresh, draft, quiet) == {}


def test_vectors_that_did_not_learn_are_quantized_as_they_were(setting, monkeypatch):
    """With no steps to learn in, the file has the same entries and symbols; only its predicted distortions are new."""
    encoder, draft, teacher, _ = setting
    monkeypatch.setattr(distillation, "STEPS", 0)
    other = distil(encoder, teacher, draft, Choice())
    assert other is not draft
    assert other.entries == draft.entries
    for entry in draft.entries:
        planes = [bitstream.planes_of(d.coded[entry.name]) for d in (draft, other)]
        assert all(np.array_equal(a.symbols, b.symbols) for a, b in zip(*planes, strict=True))


@pytest.mark.parametrize("metric", ["kl", "mse"])
def test_gradients_are_those_of_finite_differences(setting, metric):
    encoder, draft, teacher, _ = setting
    state = draft.state()
    teacher = Teacher(make_net().double(), [b.double() for b in teacher.batches], run, encoder.pool, metric)
    monkey = {k: v.double() for k, v in state.items()}
    teacher.learn({**monkey}, {"bn.bias": 1e-9, "linear.bias": 1e-9}, quiet)  # outputs, and who takes gradients
    values = {"bn.bias": monkey["bn.bias"], "linear.bias": monkey["linear.bias"]}
    # outputs come as float32: differences are taken of the loss in float64
    gradients, count = teacher.gradients(0, values, list(values))

    def total(changed):
        model = make_net().double()
        model.load_state_dict({**model.state_dict(), **monkey, **changed})
        with torch.no_grad():
            return distance(teacher._outputs[0], run(model, teacher.batches[0]), metric)[0]

    for name, entry in (("bn.bias", 3), ("linear.bias", 7)):
        change = torch.zeros_like(values[name])
        change[entry] = 1e-4
        slope = (total({name: values[name] + change}) - total({name: values[name] - change})) / 2e-4
        assert float(gradients[name][entry]) == pytest.approx(slope, rel=1e-3, abs=1e-5)
    assert count == (len(teacher.batches[0]) if metric == "kl" else teacher._outputs[0].numel())


def test_the_loss_is_the_distance():
    one, two = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.randn(5, 7)
    for metric in ("kl", "mse"):
        total, count = loss(one, two, metric)
        assert (float(total), count) == pytest.approx(distance(one, two, metric), rel=1e-5)


def test_effort_six_learns_and_threads_do_not_matter(net, images):
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            files.append(tq.compress(net, images, bits=4.0, effort=6))
    finally:
        torch.set_num_threads(before)
    assert files[0].data == files[1].data
    assert len(files[0].data) <= 4.0 * sum(p.numel() for p in net.parameters()) / 8
    said = files[0].report.settings["distilled"]
    assert ("have learned" in str(files[0].report)) == said
    assert not tq.compress(net, images, bits=4.0, effort=5).report.settings["distilled"]


def test_vectors_are_found_by_their_keys(setting):
    _, draft, _, _ = setting
    places = distillation.vector_places(draft)
    assert {"bn.weight", "bn.bias", "conv.bias", "norm.weight", "linear.bias"} <= set(places)
    assert places["bn.weight"][0] == "bn.scale"
    shapes = {e.name: bitstream.plane_shapes(e) for e in draft.entries if e.name == "bn"}
    assert len(shapes["bn"]) == 2
    assert all(unit > 0 for _, unit in places.values())
