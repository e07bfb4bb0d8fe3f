"""SparseGPT: weights go column by column, and the columns to the right make up for each.

Legend: W (R, C) weight, H (C, C) = 2·XᵀX / n Hessian, U (C, C) upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU),
R out_features, C in_features. The sweep works on Wᵀ, so that a column of W is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lors_cli.errors import UsageError
from lors_cli.output import console
from lors_cli.pruning.methods.statistics import NOT_FINITE, InputStatistics
from lors_cli.sparsity import Pattern, keep_largest, keep_of_group

BLOCK_COLUMNS = 128
STRIP_COLUMNS = 16
DAMPING = 0.01
FLOAT64_COLUMNS = 4096
"""Hessians up to this width are factored in float64: with inputs of very unequal sizes float32 keeps few digits of
the inverse. Wider ones take float32, whose half memory counts there."""


def sparsegpt(weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern) -> list[torch.Tensor]:
    """Prune linears (R_i, C) that share their input, in one sweep over their stacked rows; kept entries are updated.

    Every weight has its own share of zeros: N:M picks within M columns of a row, unstructured within 128 columns.

    Source: SparseGPT §3 and Algorithm 1, arXiv:2301.00774.
    """
    H = statistics.hessian()
    Wt = torch.cat([weight.T.float() for weight in weights], dim=1)
    Wt[H.diagonal() == 0] = 0
    rows = [weight.shape[0] for weight in weights]
    swept = _sweep(Wt, inverse_factor(H), pattern, rows).T
    return [part.to(weight.dtype) for part, weight in zip(swept.split(rows), weights, strict=True)]


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U (C, C) of the damped Hessian's inverse, H⁻¹ = UᵀU, in float32.

    Damping is 0.01 × the mean diagonal. Where float32 fails (wide matrices), float64 is tried, then ten-fold damping
    until the matrix is positive definite; each step is logged. An input that was always 0 gets a 1 on the diagonal.

    Raises:
        UsageError: H holds NaN or infinities.
    """
    diagonal = torch.where(H.diagonal() == 0, 1, H.diagonal())
    mean = diagonal.double().mean()
    damping = DAMPING
    dtype = torch.float64 if len(H) <= FLOAT64_COLUMNS else torch.float32
    while True:
        damped = H.to(dtype, copy=True)
        damped.diagonal().copy_(diagonal.to(dtype) + damping * mean.to(dtype))
        U, failed = _factor_of_inverse(damped)
        del damped
        if not failed:
            return U.float()
        if not bool(torch.isfinite(H).all()):
            raise UsageError(NOT_FINITE)
        if dtype == torch.float32:
            dtype = torch.float64
            console.info("  Hessian not positive definite in float32: trying float64")
        else:
            damping *= 10
            console.warn(f"Hessian not positive definite: damping raised to {damping:g} × its mean diagonal")


def _factor_of_inverse(H: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The upper Cholesky factor of H⁻¹, and whether it failed; at most two matrices of H's size beside H."""
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        return L, True
    inverse = torch.cholesky_inverse(L)
    del L
    U, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return U, bool(failed) or not bool(torch.isfinite(U).all())


def _sweep(Wt: torch.Tensor, U: torch.Tensor, pattern: Pattern, rows: list[int]) -> torch.Tensor:
    """Prune Wᵀ (C, R) in place, block by block of columns of W; `rows` splits R into separate weights."""
    num_columns = Wt.shape[0]
    width = _multiple(BLOCK_COLUMNS, pattern)
    for start in range(0, num_columns, width):
        block = slice(start, min(start + width, num_columns))
        errors = _sweep_block(Wt[block], U[block, block], pattern, rows)
        Wt[block.stop :].addmm_(U[block, block.stop :].T, errors, alpha=-1)
    return Wt


def _sweep_block(block: torch.Tensor, U: torch.Tensor, pattern: Pattern, rows: list[int]) -> torch.Tensor:
    """Prune one block of columns in place; the errors (columns, R) that the columns to its right make up for.

    Columns of a narrow strip are updated one by one, the rest of the block by one product a strip.
    """
    errors = torch.empty_like(block)
    masks: Sequence[torch.Tensor] = [] if pattern.structured else _block_mask(block, U, pattern, rows).unbind()
    width = _multiple(STRIP_COLUMNS, pattern)
    for first in range(0, block.shape[0], width):
        last = min(first + width, block.shape[0])
        for i in range(first, last):
            if pattern.m is not None and (i - first) % pattern.m == 0:
                group = slice(i, i + pattern.m)
                masks = keep_of_group((block[group] / U.diagonal()[group, None]).square().unbind(), pattern)
            keep = masks[(i - first) % pattern.m if pattern.m else i]
            torch.div(block[i] * ~keep, U[i, i], out=errors[i])
            block[i].mul_(keep)
            if i + 1 < last:
                block[i + 1 : last].addr_(U[i, i + 1 : last], errors[i], alpha=-1)
        block[last:].addmm_(U[first:last, last:].T, errors[first:last], alpha=-1)
    return errors


def _multiple(width: int, pattern: Pattern) -> int:
    """The largest multiple of the pattern's M up to `width`, at least M itself."""
    return width if pattern.m is None else max(pattern.m, width // pattern.m * pattern.m)


def _block_mask(block: torch.Tensor, block_U: torch.Tensor, pattern: Pattern, rows: list[int]) -> torch.Tensor:
    """Unstructured: the (columns, R) mask that keeps the highest saliencies of each weight's part of the block."""
    saliency = (block / block_U.diagonal()[:, None]).square()
    parts = [keep_largest(part.T.contiguous(), pattern, per_row=False) for part in saliency.split(rows, dim=1)]
    return torch.cat(parts).T.contiguous()
