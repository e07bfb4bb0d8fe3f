"""The methods that LoRS is compared with, each as its authors compute it, adapters in float32 and the scale applied.

Legend: W (R, C) weight, mask = (W ≠ 0), X (tokens, C) input, Y (tokens, R) output, A = lora_A (r, C),
B = lora_B (R, r), P (r, C) and q (R, 1) SPP's two parts, s scale; R out_features, C in_features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lors_cli.errors import MissingError, UsageError
from lors_cli.tuning.kernels.exact_gradients import adapter_gradients
from lors_cli.tuning.kernels.on_grid import RoundedToGrid
from lors_cli.tuning.kernels.scratch import scratch
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import LorsLinear, product_dtype, rows_of


class SqftLinear(AdapterLinear):
    """Y = X·(W + s·mask ⊙ (B·A))ᵀ in one product; autograd keeps the mask and the merged weight.

    On a grid the merged weight is summed in float32 and rounded to it, its gradient straight-through but for the mask.

    Source: SparsePEFT and QA-SparsePEFT of SQFT §2.2 and §2.3, arXiv:2410.03750.
    """

    def merged_weight(self) -> torch.Tensor:
        """The very weight of the forward pass, (R, C) in the base's dtype."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        W, mask = self.weight, self.weight != 0
        if self.grid is None:
            return W + self.scale * (mask * (B @ A))
        total = W.float() + self.scale * (mask * (B.float() @ A.float()))  # or updates below W's last bit were lost
        return RoundedToGrid.apply(total, W, self.grid, self.rounding)


class SqftCheckpointedLinear(SqftLinear):
    """SQFT, with the whole layer computed again in backward and only X kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return checkpoint(super().forward, x, use_reentrant=False)


class SppLinear(AdapterLinear):
    """Y = X·Wᵀ + s·X·(W ⊙ repeat_interleave(P, R/r) ⊙ q)ᵀ in two products; lora_A is P (r, C), lora_B is q (R, 1).

    P is drawn Kaiming-uniform and q is zero. R must be a multiple of r.

    Source: SPP §3.2, arXiv:2405.16057, in the shapes of its authors' code.
    """

    def make_adapters(self) -> None:
        """Draw P and q."""
        super().make_adapters()
        check_rank("spp", self.rank, [self.out_features])
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(self.out_features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias) + self.update(x)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """The second product, (…, R)."""
        return self.scale * F.linear(x, self.delta())

    def delta(self) -> torch.Tensor:
        """W ⊙ repeat_interleave(P, R/r) ⊙ q, (R, C)."""
        P, q = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        return self.weight * torch.repeat_interleave(P, self.out_features // self.rank, dim=0) * q

    def merged_weight(self) -> torch.Tensor:
        """W + s·delta, (R, C) in the base's dtype: equal to the two products but for rounding."""
        return self.weight + self.scale * self.delta()


class SppCheckpointedLinear(SppLinear):
    """SPP, with its second product computed again in backward: how its authors train 7B models."""

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """The second product, (…, R)."""
        return checkpoint(super().update, x, use_reentrant=False)


class HiraLinear(AdapterLinear):
    """Y = X·(W + s·W ⊙ (B·A))ᵀ: a product with the weight keeps its zeros.

    Source: HiRA, ICLR 2025 (https://openreview.net/forum?id=TwJrTz9cRS); PEFT's `HiraConfig` is this with s = 1.
    """

    def merged_weight(self) -> torch.Tensor:
        """The very weight of the forward pass, (R, C) in the base's dtype."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        return self.weight + self.scale * (self.weight * (B @ A))


class HiraCheckpointedLinear(HiraLinear):
    """HiRA that keeps X alone: the merged weight is built again in backward, the adapters' gradients by row tiles."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        dtype = product_dtype(x, self.weight)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            Y = _HiraFunction.apply(rows_of(x.to(dtype)), self.weight, bias, self.lora_A, self.lora_B, self.scale)
        return Y.view(*x.shape[:-1], Y.shape[-1])


class _HiraFunction(torch.autograd.Function):
    """Saves X and references to parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor,
        lora_B: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale = scale
        return F.linear(x, _hira_in_scratch(weight, lora_A, lora_B, scale).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        dX = None
        if ctx.needs_input_grad[0]:
            dX = dY @ _hira_in_scratch(weight, lora_A, lora_B, ctx.scale).to(dY.dtype)
        dY2, X = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
        dA, dB = adapter_gradients(dY2, X, weight, lora_A, lora_B, ctx.scale, factor="weight")
        return dX, None, None, dA, dB, None


def _hira_in_scratch(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """HiRA's merged weight, the same bits, in memory that all layers share."""
    A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    if torch.compiler.is_compiling():
        return weight + scale * (weight * (B @ A))
    out = scratch(weight.shape, weight.dtype, weight.device)
    return torch.mm(B, A, out=out).mul_(weight).mul_(scale).add_(weight)


class LoraLinear(AdapterLinear):
    """LoRA in PEFT's own layer: Y = X·Wᵀ + s·(X·Aᵀ)·Bᵀ. Its merged weight is dense.

    Raises:
        MissingError: the package peft is not installed.

    Source: LoRA §4.1, arXiv:2106.09685.
    """

    keeps_zeros = False
    peft: Any

    def make_adapters(self) -> None:
        """Let PEFT wrap the linear."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingError("method: lora needs the package peft.", "pip install peft") from error
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = self.weight
        if self.bias is not None:
            linear.bias = self.bias
        # PEFT computes alpha/r itself: an alpha that gives our scale, whatever its settings for rsLoRA are
        config = LoraConfig(r=self.rank, lora_alpha=self.scale * self.rank, target_modules=["linear"])  # type: ignore[arg-type]
        self.peft = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear})).linear
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        for part in (self.peft.lora_A, self.peft.lora_B):
            part.to(dtype)

    @property
    def lora_A(self) -> nn.Parameter:  # type: ignore[override]
        """(r, C)."""
        return self.peft.lora_A["default"].weight

    @property
    def lora_B(self) -> nn.Parameter:  # type: ignore[override]
        """(R, r)."""
        return self.peft.lora_B["default"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return self.peft(x.to(self.weight.dtype))

    def merged_weight(self) -> torch.Tensor:
        """W + s·B·A, (R, C) in the base's dtype: dense, and equal to the layer but for rounding."""
        exact = self.lora_A.dtype
        return torch.addmm(self.weight.to(exact), self.lora_B, self.lora_A, alpha=self.scale).to(self.weight.dtype)


LAYERS: dict[str, type[AdapterLinear]] = {
    "lors": LorsLinear,
    "sqft": SqftLinear,
    "sqft-gc": SqftCheckpointedLinear,
    "spp": SppLinear,
    "spp-gc": SppCheckpointedLinear,
    "hira": HiraLinear,
    "hira-gc": HiraCheckpointedLinear,
    "lora": LoraLinear,
}
"""The layer of every `tune.method`."""


def check_inputs(rank: int, in_features: Mapping[str, int]) -> None:
    """Refuse a rank that a start from the gradient cannot have: above C of a layer, given by name as `in_features`.

    Raises:
        UsageError: names the first such layer.
    """
    for name, inputs in in_features.items():
        if rank > inputs:
            raise UsageError(f"rank: {rank} is above the {inputs} inputs of {name}.",
                             "Choose a smaller rank or init: kaiming, or leave such layers out with skip.")  # fmt: skip


def check_rank(method: str, rank: int, out_features: Iterable[int]) -> None:
    """Refuse a rank that a method cannot take: SPP's must divide R of every layer, given as `out_features`.

    Raises:
        UsageError: names the ranks that work.
    """
    common = math.gcd(*out_features)
    if method in ("spp", "spp-gc") and common % rank:
        fitting = [str(size) for size in range(1, min(common, 256) + 1) if common % size == 0]
        raise UsageError(
            f"rank: {rank} does not divide the outputs of every layer, which SPP needs; "
            f"ranks that work for this model: {', '.join(fitting)}"
        )
