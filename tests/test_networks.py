"""Real networks on real data: the floors that the project promises, at a size that a test can afford.

The full figures, on all test data, are those of benchmarks/main_job.py."""

from __future__ import annotations

import copy

import pytest
import torch

import transquant as tq
from networks import accuracy, cifar10, imagenet_sample, network, shared_data
from transquant import reader

pytestmark = [
    pytest.mark.skipif(shared_data() is None, reason="needs the real networks and data of ../shared/data"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def resnet():
    return network("resnet20")


@pytest.fixture(scope="module")
def training():
    """2,048 images to calibrate on and 2,000 others to score on; test images are for the benchmark."""
    images, labels = cifar10("train", limit=4048)
    return images, labels


@pytest.fixture(scope="module")
def one_bit(resnet, training):
    return tq.compress(resnet, training[0][:2048], bits=1.0)


def test_resnet20_at_one_bit(resnet, training, one_bit, tmp_path):
    one_bit.save(tmp_path / "net.tq")
    size = (tmp_path / "net.tq").stat().st_size
    parameters = sum(p.numel() for p in resnet.parameters())
    assert 0.99 * parameters / 8 <= size <= parameters / 8
    report = one_bit.report
    assert report.header_bytes + report.side_info_bytes < 0.06 * size
    decoded = tq.load(tmp_path / "net.tq").install(copy.deepcopy(resnet))
    images, labels = training[0][2048:], training[1][2048:]
    assert accuracy(resnet, images, labels) - accuracy(decoded, images, labels) < 10
    assert report.measured_distortion == pytest.approx(divergence(resnet, decoded, images), rel=0.5)


def test_numpy_reader_on_resnet20(one_bit, tmp_path):
    one_bit.save(tmp_path / "net.tq")
    arrays = reader.load(tmp_path / "net.tq")
    for key, value in one_bit.state_dict().items():
        assert arrays[key].tobytes() == value.numpy().tobytes()


def test_threads_do_not_change_the_file_of_resnet20(resnet, training):
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            files.append(tq.compress(resnet, training[0][:320], bits=2.0, effort=1).data)
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def test_depthwise_and_biased_networks():
    for name, style, bits in (("mobilenet", "tf", 5.0), ("squeezenet", "torch", 3.0)):
        model, (images, _) = network(name), imagenet_sample(style)
        compressed = tq.compress(model, images[:96], bits=bits, effort=1)
        parameters = sum(p.numel() for p in model.parameters())
        assert 0.99 * bits * parameters / 8 <= len(compressed.data) <= bits * parameters / 8
        decoded = compressed.install(copy.deepcopy(model))
        with torch.no_grad():
            same = (decoded(images[100:200]).argmax(1) == model(images[100:200]).argmax(1)).float().mean()
        assert same > 0.7, name


def divergence(model, decoded, images):
    with torch.no_grad():
        p, q = model(images).log_softmax(1), decoded(images).log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean().item()
