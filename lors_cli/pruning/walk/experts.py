"""Fused experts run one expert after the other, with an eye on what each of their matrices reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lors_cli.models.blocks import expert_keys

Observe = Callable[[int, str, torch.Tensor], None]


def forward_experts(
    experts: Any, observe: Observe, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the experts' own forward gives, by the contract of transformers' `use_experts_implementation`.

    Args:
        experts: a module with `expert_keys`.
        observe: told (expert, parameter name, X) just before the product; X (routed tokens, in_features). Experts
            that no token is routed to are passed over.
        hidden_states: (tokens, hidden_size).
        top_k_index: (tokens, k) experts of each token; numbers beyond the last expert stand for none.
        top_k_weights: (tokens, k) weight of each expert's output.

    Returns:
        (tokens, hidden_size).
    """
    up_key, down_key = expert_keys(experts)
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    mixed = torch.zeros_like(hidden_states)
    for expert in range(len(getattr(experts, up_key))):
        token, place = torch.where(top_k_index == expert)
        if not len(token):
            continue
        routed = hidden_states[token]
        observe(expert, up_key, routed)
        inner = activate(_project(experts, up_key, expert, routed))
        observe(expert, down_key, inner)
        output = _project(experts, down_key, expert, inner)
        if getattr(experts, "has_post_expert_norm", False):  # newer than the rest of the contract
            output = experts.post_expert_norm(output)
        mixed.index_add_(0, token, (output * top_k_weights[token, place, None]).to(mixed.dtype))
    return mixed


def _project(experts: nn.Module, key: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, key)[expert]
    bias = getattr(experts, f"{key}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.T if experts.is_transposed else weight, bias)
