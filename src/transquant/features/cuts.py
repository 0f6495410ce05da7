"""Where a network can be cut in two with one coded map between the halves; needs torch.fx to trace it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from transquant.errors import InputError
from transquant.features.points import ACTIVATIONS

MODULES = "torch.nn.modules.activation"  # whose classes, but for attention, are one activation each


class _Tracer(fx.Tracer):
    """Also notes what each module returns, and which nodes are points, named as `points.replacing` names them."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, list[fx.Node]] = {}
        self.points: dict[str, fx.Node] = {}
        self._paths, self._calls = [""], dict[str, int]()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Leaves of torch.nn stay modules, all others are entered."""
        path = self.path_of_module(m)
        self._paths.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self._paths.pop()
        if isinstance(result, fx.Proxy):
            self.results.setdefault(path, []).append(result.node)
        return result

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node of the graph; activations are counted."""
        node = super().create_node(kind, target, *args, **kwargs)
        method = getattr(Tensor, target, None) if kind == "call_method" else target
        if kind == "call_module":
            kept = self.root.get_submodule(target)
            found = type(kept).__module__ == MODULES and not isinstance(kept, nn.MultiheadAttention)
        else:
            found = kind in ("call_function", "call_method") and method in ACTIVATIONS
        if found:
            path = self._paths[-1]
            number = self._calls.get(path, 0)
            self._calls[path] = number + 1
            self.points[f"{path}#{number}"] = node
        return node


class Traced:
    """A copy of a network in eval mode as a graph. Raises InputError where it cannot be traced."""

    def __init__(self, model: nn.Module) -> None:
        tracer = _Tracer()
        try:
            self.root = copy.deepcopy(model).eval()  # tracing leaves attributes behind
            self.graph = tracer.trace(self.root, _defaults(self.root))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"the network cannot be cut, since torch.fx cannot trace it: {first}") from error
        self.results, self.points = tracer.results, tracer.points
        for node in self.graph.nodes:
            if not node.users and _in_place(self.root, node):
                raise InputError(f"the network cannot be cut: {node.target} changes a tensor in place and its result is not used")

    def clean(self, cut: fx.Node) -> bool:
        """Whether only this tensor, and what comes before it only on one input, crosses."""
        behind = self._needed(self._output(), cut)
        return cut in behind and _inputs(behind - {cut}) == 0 and _inputs(self._needed(cut, None)) == 1

    def name(self, cut: fx.Node, point: str) -> str:
        """What a caller says for it: the shortest path of a module that returns it, or the point's name."""
        paths = [path for path, nodes in self.results.items() if nodes == [cut]]
        return min(paths, key=len, default=point)

    def before(self, cut: fx.Node, activated: bool) -> fx.GraphModule:
        """The network up to the result of an activation, or to what goes into it."""
        end = cut if activated else (cut.args[0] if cut.args else cut.kwargs["input"])
        assert isinstance(end, fx.Node)
        needed, graph, copies = self._needed(end, None), fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(copies[end])
        return fx.GraphModule(self.root, graph, "Before").eval()

    def behind(self, cut: fx.Node) -> fx.GraphModule:
        """The network from the result of an activation on."""
        needed, graph = self._needed(self._output(), cut), fx.Graph()
        copies = {cut: graph.placeholder("features")}
        for node in self.graph.nodes:
            if node in needed and node is not cut:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        return fx.GraphModule(self.root, graph, "Behind").eval()

    def _output(self) -> fx.Node:
        output: fx.Node = next(node for node in self.graph.nodes if node.op == "output")
        return output

    def _needed(self, end: fx.Node, stop: fx.Node | None) -> set[fx.Node]:
        """`end` and all that it is computed from, but not what `stop` is computed from."""
        found, waiting = set[fx.Node](), [end]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [] if node is stop else node.all_input_nodes
        return found


def _inputs(nodes: set[fx.Node]) -> int:
    return sum(node.op == "placeholder" for node in nodes)


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    """Arguments of forward that need not be given, with their defaults."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} or None


def _in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call_") and (bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__")))
