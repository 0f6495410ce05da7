"""Train the demo network `DigitsNet` on the digits' training split and store its weights in the package.

The test split decides nothing: the recipe was chosen by cross-validation inside the training split, the last
weights are kept, and the test accuracy is measured once, after the file is written.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from transquant.demo.network import WEIGHTS, DigitsNet, load_digits_split, pretrained

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "transquant" / "demo" / WEIGHTS

SEED = 0
EPOCHS = 150
BATCH = 50
PEAK_RATE = 1e-2
WEIGHT_DECAY = 5e-2
LABEL_SMOOTHING = 0.05

MAX_ROTATION = math.radians(12)
MAX_SHEAR = 0.15
MAX_SCALING = 0.12
MAX_SHIFT = 0.75  # pixels


def augment(images: Tensor) -> Tensor:
    """`images` (N x 1 x 8 x 8, float32), each rotated, sheared, scaled and shifted a little at random.

    Same shape and dtype as the input.
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images)) * 2 - 1) * limit

    angle, shear = uniform(MAX_ROTATION), uniform(MAX_SHEAR)
    scale_x, scale_y = 1 + uniform(MAX_SCALING), 1 + uniform(MAX_SCALING)
    # The sampling grid spans [-1, 1], so one pixel is 2 / width of it.
    shift_x, shift_y = uniform(MAX_SHIFT * 2 / images.shape[3]), uniform(MAX_SHIFT * 2 / images.shape[2])
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=1)
    grid = functional.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, seed: int = SEED, epochs: int = EPOCHS) -> DigitsNet:
    """A network trained on `images` (N x 1 x 8 x 8, float32) and `labels` (N, int64), in eval mode."""
    torch.manual_seed(seed)
    network = DigitsNet().train()
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    # A last batch of a few samples would give noisy normalisation statistics, so it is dropped.
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: batches * BATCH].view(batches, BATCH):
            loss = loss_of(network(augment(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Fraction of `images` (N x 1 x 8 x 8, float32) that `network` assigns their label (N, int64)."""
    correct: Tensor = network(images).argmax(dim=1) == labels
    return int(correct.sum()) / len(labels)


def main() -> None:
    """Train, write the weights, and print the accuracies of the network read back from the file."""
    torch.set_num_threads(1)  # the order of float additions, hence the weights, depends on the thread count
    (train_images, train_labels), (test_images, test_labels) = load_digits_split()
    save_file(train(train_images, train_labels).state_dict(), OUTPUT)
    network = pretrained()
    print(f"parameters      {sum(p.numel() for p in network.parameters()):,}")
    print(f"train accuracy  {accuracy(network, train_images, train_labels):.4f}")
    print(f"test accuracy   {accuracy(network, test_images, test_labels):.4f}")


if __name__ == "__main__":
    main()
