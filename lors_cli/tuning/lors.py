"""LoRS: a linear whose low-rank update keeps the weight's zeros, at no more saved memory than its input.

Legend: W (R, C) sparse weight, X (tokens, C) input, Y (tokens, R) output, A = lora_A (r, C), B = lora_B (R, r),
s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0), dY, dX, dA, dB gradients; R out_features, C in_features, r rank.

Source: LoRS Algorithms 1 and 2, arXiv:2501.08582 (its A is our lora_B, its B our lora_A).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lors_cli.errors import UsageError

TILE_ELEMENTS = 1 << 18
"""Elements of W merged at a time on a CPU: a float32 tile of 1 MiB stays in the cache."""


@torch.no_grad()
def masked_merge(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """W_t = (W + s·B·A) ⊙ (W ≠ 0), in one rounding order everywhere.

    The adapters are cast to the weight's dtype, the sum is accumulated in float32 (float64 for a float64 weight)
    and rounded once. The work goes by row tiles, so that no second matrix of W's size is made.

    Args:
        weight: (R, C).
        lora_A: (r, C), any float dtype.
        lora_B: (R, r), any float dtype.
        scale: s.

    Returns:
        (R, C) in the weight's dtype.
    """
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A = lora_A.to(weight.dtype).to(exact)
    B = lora_B.to(weight.dtype).to(exact)
    merged = torch.empty_like(weight)
    height = weight.shape[0] if weight.is_cuda else max(16, TILE_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        tile = merged[rows]
        tile.copy_(torch.addmm(weight[rows].to(exact), B[rows], A, alpha=scale))
        tile.mul_(weight[rows].sign().square_())  # sgn² is the mask, without a bool tensor
    return merged


class _LorsFunction(torch.autograd.Function):
    """Saves X and references to parameters; neither the mask nor W_t."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale = scale
        return F.linear(x, masked_merge(weight, lora_A, lora_B, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        s = ctx.scale
        dX = dbias = dA = dB = None
        if ctx.needs_input_grad[0]:
            dX = dY @ masked_merge(weight, lora_A, lora_B, s)
        dY2, X = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = dY2.sum(0)
        if ctx.needs_input_grad[3]:
            dA = ((dY2 @ lora_B.to(dY.dtype)).T @ X).to(lora_A.dtype).mul_(s)
        if ctx.needs_input_grad[4]:
            dB = (dY2.T @ (X @ lora_A.to(X.dtype).T)).to(lora_B.dtype).mul_(s)
        return dX, None, dbias, dA, dB, None


def lors_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Y = X·W_tᵀ + bias with W_t = (W + s·B·A) ⊙ (W ≠ 0), recomputed in backward.

    Gradients: dX = dY·W_t; dB = s·dYᵀ(X·Aᵀ); dA = s·(dY·B)ᵀX. The mask is ignored in the adapters' gradients
    (straight-through), so no (R, C) gradient is ever formed; the weight itself gets none. Saved for backward are
    X and references to parameters.

    Args:
        x: (…, C); cast to the weight's dtype when it differs.
        weight: (R, C), frozen; its zeros stay.
        bias: (R,) or None.
        lora_A: (r, C), usually float32.
        lora_B: (R, r), usually float32.
        scale: s.

    Returns:
        (…, R) in the weight's dtype.

    Raises:
        UsageError: the weight asks for a gradient.

    Source: LoRS Algorithms 1 and 2, arXiv:2501.08582.
    """
    if weight.requires_grad:
        raise UsageError("lors_linear trains adapters only: the weight must not require a gradient.")
    with torch.autocast(x.device.type, enabled=False):
        return _LorsFunction.apply(x.to(weight.dtype), weight, bias, lora_A, lora_B, scale)


class LorsLinear(nn.Module):
    """A frozen sparse linear with a LoRS adapter; at its start it computes what the linear did.

    Args:
        linear: (C → R); its weight and bias are taken over, not copied, and frozen.
        rank: r.
        alpha: numerator of the scale.
        use_rslora: scale s = alpha/√r (rsLoRA, arXiv:2312.03732), else alpha/r.

    `lora_A` (r, C) is drawn Kaiming-uniform and `lora_B` (R, r) is zero, both float32 (float64 for a float64 weight).
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, *, use_rslora: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return lors_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def merged_weight(self) -> torch.Tensor:
        """The very weight of the forward pass, (R, C) in the base's dtype."""
        return masked_merge(self.weight, self.lora_A, self.lora_B, self.scale)

    def to_linear(self) -> nn.Linear:
        """An ordinary linear with the merged weight, which gives the same outputs bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scale={self.scale:g}"
        )
