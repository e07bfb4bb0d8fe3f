"""SparseGPT: weights go column by column, and the columns to the right make up for each; `sweep` is how.

Legend: W (R, C) weight, H (C, C) = 2·XᵀX / n Hessian, U (C, C) upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU),
R out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lors_cli.grid import Grid, GridSpec
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.methods.sweep import BLOCK_COLUMNS, Masks, Rounding, inverse_factor, stacked, sweep, unstacked
from lors_cli.sparsity import Pattern, keep_largest, keep_of_group


def sparsegpt(weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern) -> list[torch.Tensor]:
    """Prune linears (R_i, C) that share their input, in one sweep over their stacked rows; kept entries are updated.

    Every weight has its own share of zeros: N:M picks within M columns of a row, unstructured within 128 columns.

    Source: SparseGPT §3 and Algorithm 1, arXiv:2301.00774.
    """
    Wt, U, masks = _start(weights, statistics, pattern)
    sweep(Wt, U, masks)
    return unstacked(Wt, weights)


def sparsegpt_rounded(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern, spec: GridSpec
) -> tuple[list[torch.Tensor], list[Grid]]:
    """`sparsegpt` that rounds what it keeps to grids, and spreads the error of rounding like that of pruning.

    The grids of a group are fitted when the sweep comes to its first column, to what would stay of it if only the
    columns before and within the group were to be made up for.

    Source: SparseGPT §3.5 (joint sparsification and quantisation), arXiv:2301.00774.
    """
    Wt, U, masks = _start(weights, statistics, pattern)
    rounding = Rounding(spec, weights[0].dtype, U)
    sweep(Wt, U, masks, rounding)
    return unstacked(Wt, weights), rounding.grids([len(weight) for weight in weights])


def _start(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor, Masks]:
    """Stacked Wᵀ (C, R), U, and how masks are chosen."""
    H = statistics.hessian()
    Wt = stacked(weights)
    Wt[H.diagonal() == 0] = 0
    U = inverse_factor(H)
    choose = partial(_choose, U, pattern, [len(weight) for weight in weights])
    return Wt, U, Masks(pattern.m or BLOCK_COLUMNS, choose, pattern.m or 1)


def _choose(
    U: torch.Tensor, pattern: Pattern, rows: list[int], first: int, values: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Keep the highest saliencies of these columns: N of a row's M, or unstructured each weight's share."""
    saliency = (values / U.diagonal()[first : first + len(values), None]).square()
    if pattern.structured:
        return keep_of_group(saliency.unbind(), pattern)
    parts = [keep_largest(part.T.contiguous(), pattern, per_row=False) for part in saliency.split(rows, dim=1)]
    return torch.cat(parts).T.contiguous().unbind()
