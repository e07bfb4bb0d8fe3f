"""Refit: the weights that stay are solved for anew on a fixed mask.

Legend: W0 (R, C) dense weight, W (R, C) pruned weight, M its mask, H (C, C) = 2·XᵀX / n, P preconditioned residual,
R out_features, C in_features.
"""

from __future__ import annotations

import torch

DAMPING = 0.01
ITERATIONS = 32


def refit(W0: torch.Tensor, W: torch.Tensor, H: torch.Tensor, *, iterations: int = ITERATIONS) -> torch.Tensor:
    """The minimiser of ‖(W − W0)·X‖² over weights with W's zeros, by conjugate gradients from W.

    All rows are solved at once, each with step lengths of its own; the diagonal of H is the preconditioner, and H is
    damped by 0.01 × its mean diagonal as in SparseGPT.

    Args:
        W: its zeros are the mask, its values the start.

    Returns:
        (R, C) float32, zero where W is.

    Source: ALPS §3.2 (preconditioned conjugate gradients on a fixed support), arXiv:2406.07831.
    """
    damped = H.clone()
    damped.diagonal().add_(DAMPING * H.diagonal().mean())
    inverse_diagonal = 1 / damped.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    mask = W != 0
    solution = W.float().clone()
    residual = ((W0.float() - solution) @ damped).mul_(mask)
    P = residual * inverse_diagonal
    direction = P.clone()
    energy = (residual * P).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ damped).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)  # a row that has converged stays
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        torch.mul(residual, inverse_diagonal, out=P)
        next_energy = (residual * P).sum(1, keepdim=True)
        direction.mul_(torch.where(energy > 0, next_energy / energy, 0)).add_(P)
        energy = next_energy
    return solution
