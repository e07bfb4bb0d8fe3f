"""GPTQ: weights are rounded column by column, and the columns to the right make up for each; a mask stays as it is.

Legend: W (R, C) weight, H (C, C) = 2·XᵀX / n Hessian, U (C, C) upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU),
R out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.methods.sweep import Masks, Rounding, inverse_factor, stacked, sweep, unstacked

Rounded = tuple[list[torch.Tensor], list[Grid]]
"""Weights with all their values on grids, and those grids."""


def gptq(
    weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], statistics: InputStatistics, spec: GridSpec
) -> Rounded:
    """Round linears (R_i, C) that share their input, so that their outputs change least; what is masked stays 0.

    The target is the weight as it is given: where it is pruned already, what that cost is not made up for here.

    Args:
        masks: (R_i, C) bool, what is kept; the weights are 0 elsewhere.

    Source: GPTQ Algorithm 1, arXiv:2210.17323.
    """
    U = inverse_factor(statistics.hessian())
    Wt, kept = stacked(weights), torch.cat([mask.T for mask in masks], dim=1)
    rounding = Rounding(spec, weights[0].dtype, U)
    sweep(Wt, U, Masks(len(Wt), lambda first, values: kept.unbind()), rounding)
    return unstacked(Wt, weights), rounding.grids([len(weight) for weight in weights])


def quantise_pruned(pruned: Sequence[torch.Tensor], statistics: InputStatistics, spec: GridSpec) -> Rounded:
    """`gptq` of pruned linears (R_i, C) on the masks that they have; to the nearest where no input was seen."""
    masks = [weight != 0 for weight in pruned]
    if statistics.kind != "none" and statistics.num_tokens:
        return gptq(pruned, masks, statistics, spec)
    grids = [fit_grid(weight, mask, spec) for weight, mask in zip(pruned, masks, strict=True)]
    return [grid.rounded(weight) for grid, weight in zip(grids, pruned, strict=True)], grids


def quantise_dense(weight: torch.Tensor, statistics: InputStatistics, spec: GridSpec) -> tuple[torch.Tensor, Grid]:
    """`gptq` of a dense linear (R, C), of 2 to 8 bits.

    Args:
        statistics: of kind "hessian", with the linear's inputs (docs/pruning.md).

    Returns:
        The weight with its values on the grid, and the grid.
    """
    (rounded,), (grid,) = gptq([weight], [torch.ones_like(weight, dtype=torch.bool)], statistics, spec)
    return rounded, grid
