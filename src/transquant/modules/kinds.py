"""What each tensor of a module is to the codec: a weight of some kind, a vector, or neither.

    kind                    weight               rows × columns                    rows meet
    conv1d … conv3d         (Co, Ci/g, k…)       outputs × patches                 gradients
    conv_transpose1d … 3d   (Ci, Co/g, k…)       inputs × patches of the gradient  inputs
    linear, bilinear        (O, I), (O, I₁, I₂)  outputs × inputs                  gradients
    conv1d_hf               (I, O)               inputs × outputs                  inputs
    embedding(_bag)         (V, E)               tokens × outputs                  inputs
    recurrent(_cell)        (gates·H, I or H)    gates × inputs or states          gradients
    attention               (3E, E) or (E, I)    projections × inputs              gradients
    matrix                  any                  known by its gradient alone

To code another layer: a line here and a recorder in stats/recorders.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from transquant.errors import InputError

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d", nn.ConvTranspose3d: "conv_transpose3d", nn.Linear: "linear",
    nn.Bilinear: "bilinear", nn.Embedding: "embedding", nn.EmbeddingBag: "embedding_bag", nn.RNNBase: "recurrent",
    nn.RNNCellBase: "recurrent_cell", nn.MultiheadAttention: "attention",
}  # fmt: skip
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, *BATCHNORMS)
NORM_NAMES = ("RMSNorm", "LayerNorm")  # ends of class names: nearly every language model brings its own
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
ATTENTION_VECTORS = ("in_proj_bias", "bias_k", "bias_v")
LENGTH_FIRST = ("_WeightNorm",)  # parametrizations of which "original0" is a length and "original1" a direction
ROW_SCALING = ("_WeightNorm", "_SpectralNorm")  # those that rescale the rows of a matrix

Part = Literal["whole", "direction", "length", "free"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the state dict is used: by which module (and its path), as which of its attributes.

    `part`: "whole" it is that attribute; "direction" or "length" of its rows (weight norm; a spectral norm has directions
    only); "free" it becomes that attribute by a parametrization that is not known."""

    path: str
    module: nn.Module | None
    attribute: str
    part: Part = "whole"


def kind_of(module: nn.Module | None) -> str | None:
    """The kind of a module's weights, or None."""
    if (kind := next((k for t, k in KINDS.items() if isinstance(module, t)), None)) is not None:
        return kind
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width
    return "conv1d_hf" if type(module).__name__ == "Conv1D" and plain else None


def is_weight(kind: str, attribute: str) -> bool:
    """Whether a module of that kind has a weight of that name."""
    if kind in ("recurrent", "recurrent_cell"):
        return attribute.startswith("weight_")
    return attribute in ATTENTION_WEIGHTS if kind == "attention" else attribute == "weight"


def is_vector(module: nn.Module | None, attribute: str, ndim: int) -> bool:
    """Whether a module's attribute is a bias or the scale of a normalisation."""
    kind = kind_of(module)
    if kind in ("recurrent", "recurrent_cell"):
        return attribute.startswith("bias_")
    if kind is not None:
        return attribute in ATTENTION_VECTORS if kind == "attention" else attribute == "bias"
    own = ndim == 1 and type(module).__name__.endswith(NORM_NAMES)
    return attribute in ("weight", "bias") and (isinstance(module, NORMS) or own)


def groups_of(module: nn.Module | None, attribute: str) -> int:
    """Groups of rows with columns of their own: those of convolutions; queries, keys and values."""
    if attribute == "in_proj_weight":
        return 3
    groups = getattr(module, "groups", 1) if attribute == "weight" else 1
    return groups if isinstance(groups, int) else 1


def place(key: str, owners: Mapping[str, nn.Module]) -> Place:
    """Where the tensor of a state-dict key is used."""
    owner, _, name = key.rpartition(".")
    module = owners.get(owner)
    if isinstance(module, ParametrizationList):
        path, _, attribute = f".{owner}".rpartition(".parametrizations.")
        path = path.removeprefix(".")
        classes = tuple(type(p).__name__ for p in module)
        part: Part = "free"
        if len(classes) == 1 and classes[0] in ROW_SCALING:
            part = "length" if classes[0] in LENGTH_FIRST and name == "original0" else "direction"
        return Place(path, owners.get(path), attribute, part)
    # before parametrizations there were hooks, which leave the weight itself as a plain attribute
    for suffix, sibling, old in (("_v", "_g", "direction"), ("_g", "_v", "length"), ("_orig", "_u", "direction")):
        attribute = name.removesuffix(suffix)
        if attribute != name and module is not None and isinstance(getattr(module, attribute + sibling, None), Tensor):
            return Place(owner, module, attribute, old)  # type: ignore[arg-type]
    return Place(owner, module, name)


def refuse_soft(model: nn.Module) -> None:
    """Raises InputError for a model whose weights `training.prepare` has made soft."""
    if any(getattr(module, "soft_weight", None) is True for module in model.modules()):
        raise InputError("the model is prepared for training: harden it first (training.harden)")
