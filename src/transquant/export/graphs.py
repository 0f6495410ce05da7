"""Graphs: which of their tensors are weights, and where tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

STANDARD = ("", "ai.onnx")  # names of the domain of the standard operators
# operators that multiply by weights (or look them up), and which of their inputs are weights
WEIGHTS = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1), "Gather": (0,),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip
# operators that only move values: what comes out is a weight where all that goes in is
MOVES = {"Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Split", "Concat"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in a graph: an initialiser, or the value of a constant."""

    name: str
    tensor: Any
    initialiser: bool
    weight: bool


def subgraphs(node: Any) -> Iterator[Any]:
    """The graphs in a node's attributes, in order."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nested(graph: Any) -> Iterator[Any]:
    """A graph and all those inside, outer ones first."""
    stack = [graph]
    while stack:
        item = stack.pop()
        yield item
        stack += [inner for node in item.node for inner in subgraphs(node)][::-1]


def constant(node: Any) -> Any:
    """The tensor of a Constant node, None for another node."""
    if node.op_type == "Constant" and node.domain in STANDARD and len(node.output) == 1:
        return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
    return None


def stored(graph: Any, used: Callable[[Any], Container[str]] = lambda graph: ()) -> Iterator[Stored]:
    """Initialisers and constants of a graph and, node by node, of its subgraphs (FORMAT.md section 8). `used(graph)` are the
    names of those of one graph that are weights."""
    weights = used(graph)
    for tensor in graph.initializer:
        yield Stored(tensor.name, tensor, True, tensor.name in weights)
    for node in graph.node:
        tensor = constant(node)
        if tensor is not None:
            yield Stored(node.output[0], tensor, False, node.output[0] in weights)
        for inner in subgraphs(node):
            yield from stored(inner, used)


def weight_uses(graph: Any) -> dict[str, tuple[str, int, Any] | None]:
    """The initialisers and constants of a graph that are used as weights, also in its subgraphs and after they were moved.

    For each the use: (operator, number of the input, node) where it is used as it is, else None."""
    roots: dict[str, set[str]] = {t.name: {t.name} for t in graph.initializer}
    roots |= {node.output[0]: {node.output[0]} for node in graph.node if constant(node) is not None}
    uses: dict[str, tuple[str, int, Any] | None] = {}
    for inner in nested(graph):
        for node in inner.node:
            if node.domain not in STANDARD:
                continue
            for k in WEIGHTS.get(node.op_type, ()):
                name = node.input[k] if k < len(node.input) else ""
                for root in roots.get(name, ()):
                    direct = (node.op_type, k, node) if root == name else None
                    uses[root] = uses.get(root) or direct
            data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
            if node.op_type in MOVES and data and all(name in roots for name in data):
                moved = set().union(*(roots[name] for name in data))
                for name in node.output:
                    roots.setdefault(name, moved)
    return uses
