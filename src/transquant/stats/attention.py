"""Multi-head attention, replayed: projections first, where inputs and gradients can be seen, then PyTorch's own attention.

    query, key, value ─ W_q, W_k, W_v ─ attention with identity projections ─ out_proj (a layer, which records itself)

The packed weight (3E, E) has three groups of rows with inputs and gradients of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transquant.stats.moments import Moments
from transquant.stats.replay import Replaced, as_columns, is_plain, on_gradient

Sinks = Mapping[str, Moments]


def replay(module: nn.MultiheadAttention, sinks: Sinks) -> list[Replaced]:
    """Replay an attention layer; one with a forward of its own is left alone."""
    if not is_plain(module, nn.MultiheadAttention):
        return []
    return [Replaced(module, partial(_attention, module, sinks, module.forward))]


def _attention(
    module: nn.MultiheadAttention, sinks: Sinks, own: Any, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The forward of nn.MultiheadAttention, with its arguments."""
    if query.is_nested or key.is_nested or value.is_nested:
        result: tuple[Tensor, Tensor | None] = own(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return result
    turn = module.batch_first and query.ndim == 3
    inputs = [x.transpose(0, 1) if turn else x for x in (query, key, value)]
    width = module.embed_dim
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    packed = module.in_proj_weight is not None
    weights = module.in_proj_weight.chunk(3) if packed else [getattr(module, f"{n}_proj_weight") for n in "qkv"]
    projected = []
    for k, (x, weight, bias) in enumerate(zip(inputs, weights, biases, strict=True)):
        sink, group = (sinks.get("in_proj_weight"), k) if packed else (sinks.get(f"{'qkv'[k]}_proj_weight"), None)
        as_columns(x if x.ndim == 3 else x[:, None], sink, group)
        projected.append(functional.linear(x, weight, bias))
        on_gradient(projected[-1], sink, group)
    same = torch.eye(width, dtype=query.dtype, device=query.device)
    mixed, shares = functional.multi_head_attention_forward(
        projected[0], projected[1], projected[2], width, module.num_heads, None, None, module.bias_k, module.bias_v,
        module.add_zero_attn, module.dropout, same, None, training=module.training, key_padding_mask=key_padding_mask,
        need_weights=need_weights, attn_mask=attn_mask, use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same,
        v_proj_weight=same, average_attn_weights=average_attn_weights, is_causal=is_causal,
    )  # fmt: skip
    output = module.out_proj(mixed)
    return output.transpose(0, 1) if turn else output, shares
