"""Small models, one for each kind of layer, with inputs that fit: (model in eval mode, samples)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Conv1D(nn.Module):
    """A stand-in for transformers' layer of that name: a linear layer whose weight is stored (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Pipe(nn.Module):
    """Layer, tanh, mean over positions (channels first), linear head: the layer's errors reach every output."""

    def __init__(self, layer: nn.Module, width: int, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.layer, self.head = first or nn.Identity(), layer, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(torch.tanh(self.first(x))))
        return self.head(y.flatten(2).mean(2) if y.ndim > 2 else y)


class Sequence(nn.Module):
    """Embedding, a recurrent layer, and a distribution at every step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, layer.input_size), layer
        width = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.head = nn.Linear(width, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]
        return 3 * self.head(y if self.layer.batch_first else y.transpose(0, 1))


class Steps(nn.Module):
    """A cell, called by hand at every step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(20, cell.input_size), cell, nn.Linear(cell.hidden_size, 20)

    def forward(self, ids: Tensor) -> Tensor:
        state, outputs = None, []
        for x in self.embedding(ids).unbind(1):
            state = self.cell(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return 3 * self.head(torch.stack(outputs, 1))


class Attentive(nn.Module):
    """Attention of a sequence to itself or, with other widths of keys and values, to two maps of it."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(20, layer.embed_dim), layer, nn.Linear(layer.embed_dim, 20)
        self.key, self.value = nn.Linear(layer.embed_dim, layer.kdim), nn.Linear(layer.embed_dim, layer.vdim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x if self.layer.batch_first else x.transpose(0, 1)
        y = self.layer(3 * x, 2 * self.key(x), self.value(x))[0]
        return 3 * self.head(y if self.layer.batch_first else y.transpose(0, 1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 32), nn.Linear(32, 20)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * self.head(self.layer(self.embedding(ids)))


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layer, self.head = nn.EmbeddingBag(100, 24, mode=mode), nn.Linear(24, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(ids)))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Bilinear(8, 12, 30), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x[:, :8], x[:, 8:])))


class RootMean(nn.Module):
    """A language model's own normalisation: known by the end of its name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class TinyRMSNorm(RootMean):
    pass


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.RMSNorm(32), TinyRMSNorm(32), nn.GroupNorm(4, 32)])
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in self.norms])

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return x


def old_weight_norm(layer: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, name)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def _ids(length: int = 12, words: int = 20):
    return lambda n, generator: torch.randint(0, words, (n, length), generator=generator)


def _normal(*shape: int):
    return lambda n, generator: torch.randn(n, *shape, generator=generator) + 0.3


MODELS = {
    "conv1d": (lambda: Pipe(nn.Conv1d(8, 24, 5, 2, 2, groups=2, padding_mode="circular"), 24), _normal(8, 20)),
    "conv3d": (lambda: Pipe(nn.Conv3d(4, 24, 3, padding="same", dilation=(1, 2, 1)), 24), _normal(4, 4, 6, 5)),
    "conv_transpose1d": (lambda: Pipe(nn.ConvTranspose1d(16, 24, 4, 2, 1), 24, nn.Conv1d(8, 16, 3)), _normal(8, 10)),
    "conv_transpose2d": (lambda: Pipe(nn.ConvTranspose2d(16, 24, 3, 2, 1, output_padding=1), 24), _normal(16, 4, 5)),
    "conv_transpose2d_groups": (lambda: Pipe(nn.ConvTranspose2d(16, 24, 3, 2, groups=4, dilation=2), 24), _normal(16, 4, 4)),
    "conv_transpose3d": (lambda: Pipe(nn.ConvTranspose3d(8, 24, 3, (1, 2, 1), 2), 24), _normal(8, 4, 4, 4)),
    "conv1d_hf": (lambda: Pipe(Conv1D(48, 32), 48), _normal(32)),
    "bilinear": (Pairs, _normal(20)),
    "bag_mean": (lambda: Bags("mean"), _ids(6, 100)),
    "bag_sum": (lambda: Bags("sum"), _ids(6, 100)),
    "bag_max": (lambda: Bags("max"), _ids(6, 100)),
    "lstm": (lambda: Sequence(nn.LSTM(16, 24, 2, batch_first=True)), _ids()),
    "lstm_projected": (lambda: Sequence(nn.LSTM(16, 32, proj_size=12)), _ids()),
    "gru": (lambda: Sequence(nn.GRU(16, 24, bidirectional=True, batch_first=True)), _ids()),
    "rnn": (lambda: Sequence(nn.RNN(16, 32, 2, bias=False)), _ids()),
    "lstm_cell": (lambda: Steps(nn.LSTMCell(16, 24)), _ids(6)),
    "gru_cell": (lambda: Steps(nn.GRUCell(16, 32)), _ids(6)),
    "rnn_cell": (lambda: Steps(nn.RNNCell(16, 32, nonlinearity="relu")), _ids(6)),
    "attention": (lambda: Attentive(nn.MultiheadAttention(32, 4)), _ids()),
    "attention_separate": (lambda: Attentive(nn.MultiheadAttention(32, 4, kdim=24, vdim=20, add_bias_kv=True, batch_first=True)), _ids()),
    "encoder": (Encoder, _ids()),
    "weight_norm": (lambda: Pipe(parametrizations.weight_norm(nn.Conv1d(8, 24, 5)), 24), _normal(8, 12)),
    "spectral_norm": (lambda: Pipe(parametrizations.spectral_norm(nn.Linear(32, 40)), 40), _normal(32)),
    "orthogonal": (lambda: Pipe(parametrizations.orthogonal(nn.Linear(32, 32)), 32), _normal(32)),
    "old_weight_norm": (lambda: Pipe(old_weight_norm(nn.ConvTranspose1d(8, 24, 5)), 24), _normal(8, 12)),
    "old_spectral_norm": (lambda: Pipe(old_spectral_norm(nn.Linear(32, 40)), 40), _normal(32)),
    "weight_norm_rnn": (lambda: Sequence(old_weight_norm(nn.LSTM(16, 24, batch_first=True), "weight_hh_l0")), _ids()),
    "norms": (Normed, _normal(32)),
}  # fmt: skip


def make(name: str, samples: int, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model of MODELS, with random weights, and that many samples."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]
    return model().eval(), inputs(samples, torch.Generator().manual_seed(seed + 1))
