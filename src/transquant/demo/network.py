"""A small convolutional network for handwritten digits, with its trained weights and its data.

The data are the 1,797 8 x 8 digit images that come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from importlib import import_module, resources
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from transquant.errors import MissingDependency

Split: TypeAlias = tuple[Tensor, Tensor]

WEIGHTS = "digits.safetensors"
TRAIN_SAMPLES = 1000


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    """3 x 3 convolution that keeps height and width, batch normalisation and ReLU."""
    # The normalisation adds its own offset, so a convolution bias would have no effect.
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


class DigitsNet(nn.Module):
    """Four 3 x 3 convolutions with batch normalisation, two max poolings and a linear classifier.

    Input: N x 1 x 8 x 8, float32, pixel values in [0, 1]. Output: N x 10, float32, one logit per digit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, 16),
            *_conv(16, 24),
            nn.MaxPool2d(2),
            *_conv(24, 32),
            *_conv(32, 32),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N x 10, float32) of `images` (N x 1 x 8 x 8, float32)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def load_digits_split() -> tuple[Split, Split]:
    """The digits as `(train_images, train_labels), (test_images, test_labels)`.

    Images are N x 1 x 8 x 8, float32, pixel / 16, hence in [0, 1]; labels are N, int64, 0 to 9. In scikit-learn's
    order, unshuffled, the first 1,000 samples are for training and the remaining 797 for testing.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise MissingDependency(
            'the digits come with scikit-learn, which could not be imported: pip install "transquant[demo]"'
        ) from error
    data = datasets.load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = slice(None, TRAIN_SAMPLES), slice(TRAIN_SAMPLES, None)
    return (images[train], labels[train]), (images[test], labels[test])


def pretrained() -> DigitsNet:
    """A `DigitsNet` with the trained float32 weights of this package, on the CPU and in eval mode."""
    network = DigitsNet()
    with resources.as_file(resources.files(__package__) / WEIGHTS) as path:
        network.load_state_dict(load_file(path), strict=True)
    return network.eval()
