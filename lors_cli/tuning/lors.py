"""LoRS: a linear whose low-rank update keeps the weight's zeros, at no more saved memory than its input.

Legend: W (R, C) sparse weight, X (tokens, C) input, Y (tokens, R) output, A = lora_A (r, C), B = lora_B (R, r),
s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0), dY, dX, dA, dB gradients; R out_features, C in_features, r rank.

Quantisation-aware, W_t is rounded to the grid that W lies on. Exact gradients have the mask in them, as SQFT's do.

Source: LoRS Algorithms 1 and 2, arXiv:2501.08582 (its A is our lora_B, its B our lora_A).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.models.packed.format import Packed, pack, wrong_spec
from lors_cli.models.packed.kernels.choice import unpack
from lors_cli.sparsity import TWO_OF_FOUR, num_violations
from lors_cli.tuning.kernels.cache import Keep, MergedCache
from lors_cli.tuning.kernels.exact_gradients import adapter_gradients
from lors_cli.tuning.kernels.masked_merge import masked_merge, masked_merge_formula
from lors_cli.tuning.kernels.on_grid import lies_on
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.layers import AdapterLinear

Gradient = Literal["approximate", "exact", "rotating"]
_NO_CACHE = MergedCache("never")
QUARTER = 4
"""Of rotating gradients one in so many layers is exact."""


class _LorsFunction(torch.autograd.Function):
    """Saves X and references to parameters; neither the mask nor W_t."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | Packed,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scale: float,
        cache: MergedCache | None,
        rounding: Rounding,
        grid: Grid | None,
        exact: bool,
    ) -> torch.Tensor:
        parts = (weight.values, weight.mask, weight.starts) if isinstance(weight, Packed) else (weight,)
        ctx.save_for_backward(x, lora_A, lora_B, *parts)
        ctx.scale, ctx.cache, ctx.rounding, ctx.grid, ctx.exact = scale, cache, rounding, grid, exact
        ctx.packing = (weight.columns, weight.pattern, weight.grid) if isinstance(weight, Packed) else ()
        W_t = _merged(weight, lora_A, lora_B, scale, x.dtype, cache, rounding, grid, last_use=False)
        return F.linear(x, W_t, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, lora_A, lora_B, *parts = ctx.saved_tensors
        weight = Packed(*parts, *ctx.packing) if ctx.packing else parts[0]
        s = ctx.scale
        dX = dbias = dA = dB = None
        if ctx.needs_input_grad[0]:
            dX = dY @ _merged(weight, lora_A, lora_B, s, x.dtype, ctx.cache, ctx.rounding, ctx.grid, last_use=True)
        dY2, X = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = dY2.sum(0)
        if ctx.exact:
            dA, dB = adapter_gradients(dY2, X, weight, lora_A, lora_B, s, factor="mask")
            return dX, None, dbias, dA, dB, *[None] * 5
        if ctx.needs_input_grad[3]:
            dA = ((dY2 @ lora_B.to(dY.dtype)).T @ X).to(lora_A.dtype).mul_(s)
        if ctx.needs_input_grad[4]:
            dB = (dY2.T @ (X @ lora_A.to(X.dtype).T)).to(lora_B.dtype).mul_(s)
        return dX, None, dbias, dA, dB, *[None] * 5


def _merged(
    weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float, dtype: torch.dtype,
    cache: MergedCache | None, rounding: Rounding, grid: Grid | None, *, last_use: bool,
) -> torch.Tensor:  # fmt: skip
    if cache is None:
        weight = unpack(weight) if isinstance(weight, Packed) else weight
        return masked_merge_formula(weight, lora_A, lora_B, scale, dtype, rounding, grid)
    return cache.merged(weight, lora_A, lora_B, scale, dtype, last_use=last_use, rounding=rounding, grid=grid)


def lors_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    *,
    cache: MergedCache | None = None,
    rounding: Rounding = "nearest",
    grid: Grid | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Y = X·W_tᵀ + bias with W_t = (W + s·B·A) ⊙ (W ≠ 0), recomputed in backward.

    Gradients: dX = dY·W_t; dB = s·dYᵀ(X·Aᵀ); dA = s·(dY·B)ᵀX. Mask and rounding are ignored in the adapters' gradients
    (straight-through); exact ones, dB = s·(dW ⊙ mask)·Aᵀ and dA = s·Bᵀ·(dW ⊙ mask) with dW = dYᵀX, ignore the rounding
    alone. No (R, C) gradient is ever formed. Products are in the weight's dtype, under autocast in autocast's (W_t is
    then rounded to it once).

    Args:
        x: (…, C).
        weight: (R, C), frozen, plain or packed (the same bits).
        lora_A: (r, C), usually float32.
        lora_B: (R, r), usually float32.
        cache: keeps W_t between calls; default: W_t is built in scratch memory each time it is needed.
        rounding: of W_t to bfloat16 or to the grid.
        grid: that W lies on and W_t is to lie on too (quantisation-aware).
        exact: whether the adapters' gradients have the mask in them.

    Returns:
        (…, R) in the products' dtype.

    Raises:
        UsageError: the weight asks for a gradient.
    """
    if isinstance(weight, torch.Tensor) and weight.requires_grad:
        raise UsageError("lors_linear trains adapters only: the weight must not require a gradient.")
    dtype = product_dtype(x, weight)
    holder = None if torch.compiler.is_compiling() else cache or _NO_CACHE
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        Y = _LorsFunction.apply(rows_of(x.to(dtype)), weight, bias, lora_A, lora_B, scale, holder, rounding, grid,
                                exact)  # fmt: skip
    return Y.view(*x.shape[:-1], Y.shape[-1])


def product_dtype(x: torch.Tensor, weight: torch.Tensor | Packed) -> torch.dtype:
    """What products of X with a weight are in: its dtype, under autocast autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """X (tokens, C) where that costs no copy: its product is no view, and blocks may add to it in place (Falcon's)."""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x


class LorsLinear(AdapterLinear):
    """A frozen sparse linear with a LoRS adapter; `cache` says how long the merged weight is kept."""

    exact = False
    """Whether the adapters' gradients have the mask in them."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, *, use_rslora: bool = True, grid: Grid | None = None
    ) -> None:
        super().__init__(linear, rank, alpha, use_rslora=use_rslora, grid=grid)
        self.cache = MergedCache("never")

    @property
    def held(self) -> torch.Tensor | Packed:
        """The weight as it is held."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return lors_linear(x, self.held, self.bias, self.lora_A, self.lora_B, self.scale, cache=self.cache,
                           rounding=self.rounding, grid=self.grid, exact=self.exact)  # fmt: skip

    def merged_weight(self) -> torch.Tensor:
        """The very weight of the forward pass, (R, C) in the base's dtype."""
        return masked_merge(self.held, self.lora_A, self.lora_B, self.scale, rounding=self.rounding, grid=self.grid)


class PackedLorsLinear(LorsLinear):
    """A LorsLinear that holds its weight packed, at 50 % in bfloat16 9/16 of the memory, and gives the same bits.

    Of a weight on a grid of 4 bits it holds codes, a fifth of the memory.

    `weight` unpacks it, for what looks at the base's zeros.
    """

    values: torch.Tensor
    mask: torch.Tensor
    starts: torch.Tensor

    def take_weight(self, weight: torch.Tensor) -> None:
        """Hold it packed, as 2:4 where it is that: the CUDA kernel reads it so."""
        is_two_of_four = weight.shape[1] % 4 == 0 and not num_violations(weight, TWO_OF_FOUR)
        grid = self.base_grid
        has_codes = grid is not None and not wrong_spec(grid.spec) and lies_on(weight, grid)
        packed = pack(weight, TWO_OF_FOUR if is_two_of_four else None, grid if has_codes else None)
        self.pattern, self.has_codes = packed.pattern, has_codes
        for name in ("values", "mask", "starts"):
            self.register_buffer(name, getattr(packed, name), persistent=False)

    @property
    def held(self) -> Packed:
        """The weight as it is held."""
        grid = self.base_grid if self.has_codes else None
        return Packed(self.values, self.mask, self.starts, self.in_features, self.pattern, grid)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(R, C), made anew at every call."""
        return unpack(self.held)


def keep_merged(model: nn.Module, keep: Keep) -> None:
    """Say of every LoRS layer of a model how long its merged weight is kept."""
    for module in model.modules():
        if isinstance(module, LorsLinear):
            module.cache = MergedCache(keep)


def choose_gradients(model: nn.Module, gradient: Gradient, step: int) -> None:
    """Say of every LoRS layer of a model whether its gradients are exact in an optimiser step.

    Of rotating ones a quarter is, every fourth layer, and in the next step their neighbours: the step alone says which.
    """
    layers = [module for module in model.modules() if isinstance(module, LorsLinear)]
    for place, layer in enumerate(layers):
        layer.exact = gradient == "exact" or (gradient == "rotating" and (place - step) % QUARTER == 0)
