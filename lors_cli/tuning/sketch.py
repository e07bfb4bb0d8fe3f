"""Sketches of the loss gradient: its leading directions from one pass over the samples, without ever forming it.

Legend: dW (R, C) loss gradient at a weight, X (tokens, C) its input, dY (tokens, R) gradient of its output,
Ω (C, k) and Ψ (l, R) random, S = dW·Ω (R, k), T = Ψ·dW (l, C); R out_features, C in_features, r rank.

Source: Tropp et al., "Practical sketching algorithms for low-rank matrix approximation", Algorithms 1 and 4,
arXiv:1609.00048.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import rows_of


class GradientSketch:
    """S = dW·Ω and T = Ψ·dW, summed over all tokens as they come; r directions can be asked for later."""

    def __init__(self, num_rows: int, num_columns: int, rank: int, *, seed: int, device: torch.device) -> None:
        width = min(2 * rank + 1, num_rows, num_columns)
        height = min(2 * width + 1, num_rows)
        generator = torch.Generator().manual_seed(seed)
        self.omega = torch.randn(num_columns, width, generator=generator).to(device)
        self.psi = torch.randn(height, num_rows, generator=generator).to(device)
        self.S = torch.zeros(num_rows, width, device=device)
        self.T = torch.zeros(height, num_columns, device=device)

    @torch.no_grad()
    def add(self, dY: torch.Tensor, X: torch.Tensor) -> None:
        """Add dYᵀX to what is sketched; costs tokens·(R + C)·(k + l) and not tokens·R·C."""
        dY, X = dY.float(), X.float()
        self.S.addmm_(dY.T, X @ self.omega)
        self.T.addmm_((dY @ self.psi.T).T, X)

    def right_singular_vectors(self, rank: int) -> torch.Tensor:
        """The r leading right singular vectors of dW, (r, C) float32; r is at most that of the sketch."""
        S, T, psi = self.S, self.T, self.psi
        if S.device.type == "mps":  # has no float64
            S, T, psi = S.cpu(), T.cpu(), psi.cpu()
        Q = torch.linalg.qr(S).Q
        # dW ≈ Q·core, where core solves (Ψ·Q)·core = T
        core = torch.linalg.lstsq(psi.double() @ Q.double(), T.double()).solution
        vectors = torch.linalg.svd(core, full_matrices=core.shape[0] < rank).Vh
        return vectors[:rank].float().to(self.S.device)


class _Tap(torch.autograd.Function):
    """A frozen linear whose backward pass adds dY and X to a sketch."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sketch: GradientSketch
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sketch = sketch
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.sketch.add(dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dY @ weight, None, None, None


class SketchedLinear(nn.Module):
    """A frozen linear that sketches its loss gradient in every backward pass; an adapter on it takes no part."""

    def __init__(self, linear: nn.Linear | AdapterLinear, sketch: GradientSketch) -> None:
        super().__init__()
        self.linear, self.sketch = linear, sketch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        if not x.requires_grad:  # the first layer of a frozen model: its gradient is wanted all the same
            x = x.detach().requires_grad_()
        Y: torch.Tensor = _Tap.apply(rows_of(x), self.linear.weight, self.linear.bias, self.sketch)
        return Y.view(*x.shape[:-1], Y.shape[-1])
