"""Recurrent layers, unrolled: the same outputs as the module's, with the inputs and gate gradients of each weight at hand.

    gates_x = W_ih x_t + b_ih     gates_h = W_hh h_{t−1} + b_hh     h_t = cell(gates_x, gates_h, state)

W_ih meets x over all steps and samples, W_hh the hidden states before each step; their rows meet the gradients of gates_x and
gates_h (which differ in a GRU: the reset gate stands between gates_h and its candidate). A projection W_hr meets the
states that it projects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from transquant.stats.moments import Moments
from transquant.stats.replay import Replaced, as_columns, is_plain, on_gradient

State = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[[Tensor, Tensor, State], State]
Sinks = Mapping[str, Moments]


def replay(module: nn.RNNBase, sinks: Sinks) -> list[Replaced]:
    """Unroll an LSTM, GRU or RNN; one with a forward of its own is left alone."""
    if not is_plain(module, nn.LSTM, nn.GRU, nn.RNN):
        return []
    return [Replaced(module, partial(_layers, module, sinks, module.forward))]


def replay_cell(module: nn.RNNCellBase, sinks: Sinks) -> list[Replaced]:
    """The same for a single step."""
    if not is_plain(module, nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        return []
    return [Replaced(module, partial(_step, module, sinks))]


def lstm(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """Gates (N, 4H): input, forget, cell, output; state (h, c)."""
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """Gates (N, 3H): reset, update, candidate."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    update = torch.sigmoid(z_x + z_h)
    candidate = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (candidate + update * (state[0] - candidate),)


def elman(gates_x: Tensor, gates_h: Tensor, state: State, nonlinearity: str) -> State:
    """Gates (N, H)."""
    return (torch.tanh(gates_x + gates_h) if nonlinearity == "tanh" else torch.relu(gates_x + gates_h),)


def _cell(module: nn.Module) -> Cell:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return lstm
    return gru if isinstance(module, nn.GRU | nn.GRUCell) else partial(elman, nonlinearity=str(module.nonlinearity))


def _layers(module: nn.RNNBase, sinks: Sinks, own: Callable[..., Any], input: Any, hx: Any = None) -> Any:
    """The forward of an LSTM, GRU or RNN: (output, h_n) or (output, (h_n, c_n)), in the module's layouts."""
    if isinstance(input, PackedSequence) or (input.ndim == 3 and 0 in input.shape) or input.is_nested:
        return own(input, hx)  # its weights are judged by their gradients
    single = input.ndim == 2
    x = input[:, None] if single else (input.transpose(0, 1) if module.batch_first else input)
    given = None if hx is None else tuple(s[:, None] if single else s for s in (hx if isinstance(hx, tuple) else (hx,)))
    finals: list[State] = []
    for layer in range(module.num_layers):
        outputs = []
        for reverse in (False, True)[: 1 + module.bidirectional]:
            suffix = f"_l{layer}{'_reverse' if reverse else ''}"
            place = len(finals)
            state = _zeros(module, x) if given is None else tuple(s[place] for s in given)
            y, final = _direction(module, sinks, suffix, x.flip(0) if reverse else x, state)
            outputs.append(y.flip(0) if reverse else y)
            finals.append(final)
        x = torch.cat(outputs, -1)
        if layer + 1 < module.num_layers:
            x = functional.dropout(x, module.dropout, module.training)
    ends = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if single:
        x, ends = x[:, 0], tuple(e[:, 0] for e in ends)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, ends if isinstance(module, nn.LSTM) else ends[0]


def _direction(module: nn.RNNBase, sinks: Sinks, suffix: str, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One layer in one direction: outputs (T, N, H) of x (T, N, n), and the last state."""
    names = [f"weight_ih{suffix}", f"weight_hh{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}", f"weight_hr{suffix}"]
    w_ih, w_hh, b_ih, b_hh, w_hr = (getattr(module, name, None) for name in names)
    of_inputs, of_states, of_projection = (sinks.get(names[k]) for k in (0, 1, 4))
    cell = _cell(module)
    as_columns(x, of_inputs)
    gates = functional.linear(x, w_ih, b_ih)  # type: ignore[arg-type]
    on_gradient(gates, of_inputs)
    # zeros beside the recurrent products: their gradients are all steps' at once
    probe = torch.zeros_like(gates).requires_grad_()
    on_gradient(probe, of_states)
    width = 0 if w_hr is None else len(w_hr)
    projection_probe = x.new_zeros(len(x), x.shape[1], width).requires_grad_()
    on_gradient(projection_probe, of_projection)
    before, unprojected, outputs = [], [], []
    steps = zip(gates.unbind(0), probe.unbind(0), projection_probe.unbind(0), strict=True)
    for gates_x, at_gates, at_projection in steps:
        before.append(state[0].detach())
        state = cell(gates_x, functional.linear(state[0], w_hh, b_hh) + at_gates, state)  # type: ignore[arg-type]
        if w_hr is not None:
            unprojected.append(state[0].detach())
            state = (functional.linear(state[0], w_hr) + at_projection, *state[1:])
        outputs.append(state[0])
    as_columns(torch.stack(before), of_states)
    if unprojected:
        as_columns(torch.stack(unprojected), of_projection)
    return torch.stack(outputs), state


def _zeros(module: nn.RNNBase, x: Tensor) -> State:
    hidden = x.new_zeros(x.shape[1], module.proj_size or module.hidden_size)
    return (hidden, x.new_zeros(x.shape[1], module.hidden_size)) if isinstance(module, nn.LSTM) else (hidden,)


def _step(module: nn.RNNCellBase, sinks: Sinks, input: Tensor, hx: Any = None) -> Any:
    """The forward of an LSTMCell, GRUCell or RNNCell."""
    single = input.ndim == 1
    x = input[None] if single else input
    states = 2 if isinstance(module, nn.LSTMCell) else 1
    given = hx if hx is None or isinstance(hx, tuple) else (hx,)
    state = (x.new_zeros(len(x), module.hidden_size),) * states if given is None else tuple(s[None] if single else s for s in given)
    gates_x = functional.linear(x, module.weight_ih, module.bias_ih)
    gates_h = functional.linear(state[0], module.weight_hh, module.bias_hh)
    for name, seen, gates in (("weight_ih", x, gates_x), ("weight_hh", state[0], gates_h)):
        as_columns(seen[None], sinks.get(name))
        on_gradient(gates, sinks.get(name))
    state = _cell(module)(gates_x, gates_h, state)
    if single:
        state = tuple(s[0] for s in state)
    return state if states == 2 else state[0]
