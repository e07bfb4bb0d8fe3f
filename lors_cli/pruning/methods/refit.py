"""Refit: the weights that stay are solved for anew on a fixed mask, as any numbers or as points of a grid.

Legend: W0 (R, C) dense weight, W (R, C) pruned weight, M its mask, H (C, C) = 2·XᵀX / n, P preconditioned residual,
R out_features, C in_features. The descent works on transposes, so that a column of W is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lors_cli.grid import Grid, GridSpec
from lors_cli.pruning.facts import DESCENT_PASSES, REFIT_ITERATIONS
from lors_cli.pruning.methods.gptq import Rounded, gptq
from lors_cli.pruning.methods.statistics import InputStatistics

DAMPING = 0.01


def refit(W0: torch.Tensor, W: torch.Tensor, H: torch.Tensor, *, iterations: int = REFIT_ITERATIONS) -> torch.Tensor:
    """The minimiser of ‖(W − W0)·X‖² over weights with W's zeros, by conjugate gradients from W.

    All rows are solved at once, each with step lengths of its own; the diagonal of H is the preconditioner, and H is
    damped by 0.01 × its mean diagonal as in SparseGPT.

    Args:
        W: its zeros are the mask, its values the start.

    Returns:
        (R, C) float32, zero where W is.

    Source: ALPS §3.2 (preconditioned conjugate gradients on a fixed support), arXiv:2406.07831.
    """
    damped = _damped(H)
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


def refit_group(
    weights: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor], statistics: InputStatistics
) -> list[torch.Tensor]:
    """`refit` of linears (R_i, C) that share their input, whose Hessian is known."""
    rows = [weight.shape[0] for weight in weights]
    solved = refit(torch.cat([*weights]), torch.cat([*pruned]), statistics.hessian())
    return [part.to(weight.dtype) for part, weight in zip(solved.split(rows), weights, strict=True)]


def refit_rounded(
    weights: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor], statistics: InputStatistics, spec: GridSpec
) -> Rounded:
    """`refit_group` that puts the kept weights on grids: GPTQ rounds the solution, and a descent mends what that lost.

    Both see the layer's outputs, but GPTQ, whose spreading knows no mask, does not see where it can go on.
    """
    masks = [weight != 0 for weight in pruned]
    swept, grids = gptq(refit_group(weights, pruned, statistics), masks, statistics, spec)
    solved = [descend(W0, W, M, statistics.hessian(), grid)
              for W0, W, M, grid in zip(weights, swept, masks, grids, strict=True)]  # fmt: skip
    return [W for W, _ in solved], [grid for _, grid in solved]


def descend(
    W0: torch.Tensor, W: torch.Tensor, M: torch.Tensor, H: torch.Tensor, grid: Grid, *, passes: int = DESCENT_PASSES
) -> tuple[torch.Tensor, Grid]:
    """Lower ‖(W − W0)·X‖² over weights on a grid, by coordinate descent; it never rises.

    In every pass, one group of columns after the other, each row's scale goes to the best for its codes, and then the
    code of each column to the best for all the others. H is damped as in `refit`.

    Args:
        W: where to begin, zero where M is False; rounded to the grid first.
        M: (R, C) bool, which weights may be other than 0.

    Returns:
        (R, C) in the grid's dtype, and the grid that it lies on: its scales are new, its zeros are not.
    """
    damped, size, dtype = _damped(H), grid.spec.group_size, grid.scales.dtype
    scales = grid.scales.T.to(torch.float32, copy=True).contiguous()
    zeros = torch.full_like(scales, grid.spec.middle) if grid.zeros is None else grid.zeros.T.float()
    kept = M.T.contiguous()
    levels = [(part - zero) * keep for part, zero, keep in
              zip(grid.codes(W).T.float().split(size), zeros, kept.split(size), strict=True)]  # fmt: skip
    values = [(part * scale).to(dtype).float() for part, scale in zip(levels, scales, strict=True)]
    slope = damped @ (W0.T.float() - torch.cat(values))
    for _ in range(passes):
        for number, (level, value, keep) in enumerate(zip(levels, values, kept.split(size), strict=True)):
            columns = slice(number * size, number * size + len(level))
            group = _Group(damped[columns, columns], level, value, slope[columns].clone(), scales[number], dtype)
            before = value.clone()
            group.rescale()
            group.recode(zeros[number], keep, grid.spec.num_codes - 1)
            slope.addmm_(damped[:, columns], value - before, alpha=-1)
    found = replace(grid, scales=scales.T.to(dtype).contiguous())
    return torch.cat(values).T.to(dtype).contiguous(), found


@dataclass
class _Group:
    """The columns of one group while they descend, all of it changed in place.

    Args:
        H: (columns, columns) their part of the Hessian.
        levels: (columns, R) codes less the zero point.
        values: (columns, R) levels · scales, rounded to the dtype.
        slope: (columns, R) H·(W0 − W)ᵀ, half of the objective's descent.
        scales: (R,).
    """

    H: torch.Tensor
    levels: torch.Tensor
    values: torch.Tensor
    slope: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    def rescale(self) -> None:
        """Give each row the scale that is best for its levels, where that lowers the objective once it is rounded."""
        best = self.scales + (self.levels * self.slope).sum(0) / (self.levels * (self.H @ self.levels)).sum(0)
        best = best.to(self.dtype).float()
        values = (self.levels * best).to(self.dtype).float()
        change = values - self.values
        image = self.H @ change
        better = (best > 0) & ((change * (2 * self.slope - image)).sum(0) > 0)
        self.scales.copy_(torch.where(better, best, self.scales))
        self.values.copy_(torch.where(better, values, self.values))
        self.slope.sub_(torch.where(better, image, 0))

    def recode(self, zeros: torch.Tensor, kept: torch.Tensor, last_code: int) -> None:
        """Give one column after the other the codes that are best for all the others."""
        for i, curvature in enumerate(self.H.diagonal()):
            best = self.values[i] + self.slope[i] / curvature
            level = (best / self.scales).round_().add_(zeros).clamp_(0, last_code).sub_(zeros)
            value = (level * self.scales).to(self.dtype).float()
            better = ((value - best).abs() < (self.values[i] - best).abs()).logical_and_(kept[i])
            change = torch.where(better, value - self.values[i], 0)
            self.levels[i] = torch.where(better, level, self.levels[i])
            self.values[i] = torch.where(better, value, self.values[i])
            self.slope[i + 1 :].addr_(self.H[i, i + 1 :], change, alpha=-1)


def _damped(H: torch.Tensor) -> torch.Tensor:
    damped = H.clone()
    damped.diagonal().add_(DAMPING * H.diagonal().mean())
    return damped
