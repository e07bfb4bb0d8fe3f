"""ADMM: the mask and the weights that make up for it are found together, by alternating directions.

Legend: W (R, C) weight, H (C, C) = 2·XᵀX / n, both scaled so that H has a unit diagonal; Z (R, C) the sparse copy of
the weight, D (R, C) the scaled dual, R out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lors_cli.grid import GridSpec, fit_grid
from lors_cli.pruning.facts import ADMM_ITERATIONS
from lors_cli.pruning.methods.gptq import Rounded
from lors_cli.pruning.methods.refit import refit_rounded
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, keep_largest

MASK_ITERATIONS = 15
PENALTY = 1.0
DAMPING = 0.003


def admm(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    pattern: Pattern,
    *,
    iterations: int = ADMM_ITERATIONS,
    mask_iterations: int = MASK_ITERATIONS,
    penalty: float = PENALTY,
    spec: GridSpec | None = None,
) -> list[torch.Tensor]:
    """Prune linears (R_i, C) that share their input, alternating between the least-squares weight and its sparse copy.

    Inputs are scaled to unit norm, so that a weight's size is Wanda's score. One factorisation serves all the weights,
    each of which has its own share of zeros, and all the iterations. Kept entries are updated.

    Args:
        mask_iterations: the first ones, in which the mask is chosen anew; then it is kept while the weights converge.
        penalty: ρ, weight of the two copies' difference.
        spec: the sparse copies are rounded to grids, so that the mask knows of it; the result is not.

    Source: Boža, Algorithms 1 and 2, arXiv:2401.02938.
    """
    norms = statistics.hessian().diagonal().sqrt()
    dead = norms == 0
    norms[dead] = 1
    H = statistics.hessian() / norms[:, None] / norms
    H.diagonal()[dead] = 1
    H.diagonal().add_(DAMPING)
    rows = [weight.shape[0] for weight in weights]
    W = torch.cat([weight.float() for weight in weights]) * norms
    W[:, dead] = 0
    target = W @ H
    penalised = H.clone()
    penalised.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised))
    base = target @ inverse
    D = torch.zeros_like(W)
    mask = torch.empty(0)
    for iteration in range(iterations):
        W += D
        if iteration < mask_iterations:
            mask = _mask(W.abs(), pattern, rows)
        Z = W * mask
        if spec is not None:
            Z = fit_grid(Z / norms, mask, spec, importance=norms.square()).rounded(Z / norms).mul_(norms)
        D = W - Z
        W = torch.addmm(base, Z - D, inverse, alpha=penalty)
    Z = (W + D).mul_(mask).div_(norms)
    return [part.to(weight.dtype) for part, weight in zip(Z.split(rows), weights, strict=True)]


def admm_rounded(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern, spec: GridSpec
) -> Rounded:
    """`admm` with masks that are chosen for grids, on which the kept weights are then solved for."""
    masked = admm(weights, statistics, pattern, mask_iterations=ADMM_ITERATIONS, spec=spec)
    return refit_rounded(weights, masked, statistics, spec)


def _mask(scores: torch.Tensor, pattern: Pattern, rows: list[int]) -> torch.Tensor:
    """The mask of each stacked weight on its own."""
    if pattern.structured:
        return keep_largest(scores, pattern, per_row=True)
    return torch.cat([keep_largest(part, pattern, per_row=False) for part in scores.split(rows)])
