"""The real networks and data of `../shared/data`, as plain torch modules and arrays.

Used by benchmarks and by the tests that need real networks; never by the package. `shared_data()` is None where the
folder is missing, and callers skip.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def shared_data() -> Path | None:
    """Folder with the shared data (`TRANSQUANT_DATA`, or `../shared/data` beside the repository), or None."""
    here = Path(os.environ.get("TRANSQUANT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    return here if here.is_dir() else None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: stride-2 subsampling, zero channels on both sides."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride, self.extra = stride, (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.extra:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 images (He et al. 2015). Input N x 3 x 32 x 32, output N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            blocks = [
                BasicBlock(widths[stage - 1] if k == 0 else widths[stage], widths[stage], 2 if stage > 1 and k == 0 else 1)
                for k in range(3)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Fire(nn.Module):
    """SqueezeNet's fire module: 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, channels_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        return torch.cat([functional.relu(self.expand1x1(x)), functional.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 with torchvision's key names. Input N x 3 x 224 x 224, output N x 1000."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool, Fire(128, 32, 128),
            Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


class MobileNetV1(nn.Module):
    """MobileNetV1 0.25 as converted from TensorFlow. Input N x 3 x 224 x 224, output N x 1000."""

    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    WIDTHS = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        widths = self.WIDTHS
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0], eps=1e-3)
        pairs = list(zip(widths[:-1], widths[1:], self.STRIDES, strict=True))
        self.dw = nn.ModuleList([nn.Conv2d(a, a, 3, s, groups=a, bias=False) for a, _, s in pairs])
        self.dwbn = nn.ModuleList([nn.BatchNorm2d(a, eps=1e-3) for a, _, _ in pairs])
        self.pw = nn.ModuleList([nn.Conv2d(a, b, 1, bias=False) for a, b, _ in pairs])
        self.pwbn = nn.ModuleList([nn.BatchNorm2d(b, eps=1e-3) for _, b, _ in pairs])
        self.fc = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.bn1(self.conv1(functional.pad(x, (0, 1, 0, 1)))))
        for k, stride in enumerate(self.STRIDES):
            pad = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
            x = functional.relu6(self.dwbn[k](self.dw[k](functional.pad(x, pad))))
            x = functional.relu6(self.pwbn[k](self.pw[k](x)))
        return self.fc(x.mean((2, 3)))


class CharRNN(nn.Module):
    """Character language model: two LSTM layers. Input N x T characters, output N x T x 65, the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.decoder = nn.Embedding(65, 128), nn.LSTM(128, 128, 2, batch_first=True), nn.Linear(128, 65)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.lstm(self.embedding(ids))[0])


def network(name: str) -> nn.Module:
    """One of "resnet20", "squeezenet", "mobilenet", "charrnn" with its trained weights, in eval mode."""
    data = shared_data()
    assert data is not None, "the shared data folder is missing"
    model, file = {
        "resnet20": (ResNet20, "cifar10/resnet20.safetensors"),
        "squeezenet": (SqueezeNet, "imagenet/squeezenet1_1.safetensors"),
        "mobilenet": (MobileNetV1, "imagenet/mobilenet_v1_025_224.safetensors"),
        "charrnn": (CharRNN, "charrnn/shakespeare.safetensors"),
    }[name]
    net = model()
    state = load_file(data / file)
    for key, value in net.state_dict().items():  # the files leave BatchNorm's counters out
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    net.load_state_dict(state, strict=True)
    return net.eval()


def _tar_images(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                stream = archive.extractfile(member)
                assert stream is not None
                yield member.name, np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB"))


def cifar10(split: str, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """CIFAR-10 "train" or "test": images (N, 3, 32, 32) float32, normalised, and labels (N,) int64.

    `limit` draws that many images at random (seeded) without decoding the others."""
    data = shared_data()
    assert data is not None, "the shared data folder is missing"
    path = data / "cifar10" / f"{split}.tar.xz"
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        classes = sorted({m.name.split("/")[-2] for m in members})
        if limit is not None:
            chosen = {members[k].name for k in np.random.default_rng(seed).permutation(len(members))[:limit]}
        else:
            chosen = {m.name for m in members}
    items = []
    with tarfile.open(path) as archive:  # a second, sequential pass: seeking in xz would decode it again and again
        for member in archive:
            if member.isfile() and member.name in chosen:
                stream = archive.extractfile(member)
                assert stream is not None
                image = np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB"))
                items.append((member.name, image))
    items.sort(key=lambda item: item[0])
    if limit is not None:
        items = [items[k] for k in np.random.default_rng(seed + 1).permutation(len(items))]
    images = torch.from_numpy(np.stack([image for _, image in items])).permute(0, 3, 1, 2)
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name, _ in items])
    return normalise(images), labels


def imagenet_sample(style: str) -> tuple[Tensor, Tensor]:
    """The 1,000 sample images (1000, 3, 224, 224) float32 and labels (1000,); style "torch" or "tf" (x / 127.5 - 1)."""
    data = shared_data()
    assert data is not None, "the shared data folder is missing"
    items = sorted(_tar_images(data / "imagenet" / "sample1000.tar"), key=lambda item: item[0])
    images = torch.from_numpy(np.stack([image for _, image in items])).permute(0, 3, 1, 2)
    labels = torch.tensor([int(name.split("/")[-1][:3]) for name, _ in items])
    return (normalise(images) if style == "torch" else images.float() / 127.5 - 1), labels


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32 with the usual mean and standard deviation."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Outputs of the model on images (N, ...), in batches."""
    return torch.cat([model(images[k : k + batch]) for k in range(0, len(images), batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in per cent."""
    return 100 * (logits(model, images).argmax(1) == labels).float().mean().item()


WARM_UP = 50  # characters of a row that are not scored: the state begins at zero
ROW = 401  # characters: 400 inputs, each with its next one


def characters(first: float, count: int | None = None, last: float = 1.0) -> Tensor:
    """Rows (N, 401) of the character network's text, int64: `count` rows from the fraction `first` of it on, or all up to
    the fraction `last`."""
    data = shared_data()
    assert data is not None, "the shared data folder is missing"
    vocabulary = json.loads((data / "charrnn" / "shakespeare.vocab.json").read_text())
    text = (data / "text" / "tinyshakespeare.txt").read_text()
    begin = int(first * len(text))
    rows = (int(last * len(text)) - begin) // ROW if count is None else count
    return torch.tensor([vocabulary[c] for c in text[begin : begin + rows * ROW]]).view(rows, ROW)


def characters_around(first: float, count: int, wanted: int) -> Tensor:
    """Rows (wanted, 401), spread over the text, that are none of `characters(first, count)` nor within two rows of them."""
    rows = characters(0.0)
    begin = int(first * len(rows))
    kept = torch.tensor([k for k in range(len(rows)) if not begin - 3 <= k <= begin + count + 3])
    return rows[kept[torch.linspace(0, len(kept) - 1, wanted).long()]]


def after_warm_up(logits: Tensor) -> Tensor:
    """Of logits (N, T, V), those that count: for `compress(output=)`."""
    return logits[:, WARM_UP:]


@torch.no_grad()
def bits_per_character(model: nn.Module, rows: Tensor) -> float:
    """Mean −log2 of what the model gave the characters that came."""
    log_p = after_warm_up(model(rows[:, :-1])).log_softmax(-1)
    losses = log_p.gather(2, rows[:, WARM_UP + 1 :, None])
    return -losses.mean().item() / math.log(2)
