"""OWL: decoder blocks with many outliers are pruned less than others; for unstructured sparsity.

Legend: W (R, C) weight of a linear, X (tokens, C) its inputs, A (R, C) = |W|·‖X_j‖₂ Wanda's score, D outlier ratio of
a block, R out_features, C in_features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lors_cli.errors import UsageError
from lors_cli.recipe.rules import OWL_SPREAD

THRESHOLD = 5.0


def outlier_ratio(
    weights: Sequence[torch.Tensor], norms: Sequence[torch.Tensor], threshold: float = THRESHOLD
) -> float:
    """The share of a block's scores A that exceed `threshold` times their mean.

    The mean is over all the linears of the block together, as in the authors' code: a linear whose inputs are larger
    than its neighbours' has more than its part of the outliers. One (R, C) score is held at a time.

    Args:
        weights: (R_i, C_i) of every linear in the block, dense.
        norms: (C_i,) ‖X_j‖₂ of each linear's inputs, in the dense model.
        threshold: M of the paper.

    Returns:
        D, between 0 and 1 (the authors' code has percent).

    Source: OWL §3.3 (Layerwise Outlier Distribution), arXiv:2310.05175.
    """
    total, num_scores, num_outliers = 0.0, 0, 0
    for W, norm in zip(weights, norms, strict=True):
        total += float((W.abs().float() @ norm).cpu().double().sum())
        num_scores += W.numel()
    limit = threshold * total / num_scores
    for W, norm in zip(weights, norms, strict=True):
        num_outliers += int((W.abs().float() * norm > limit).sum())
    return num_outliers / num_scores


def check_limits(sparsity: float, spread: float) -> None:
    """Refuse a spread that could prune a block not at all or wholly: sparsity ± spread must lie within (0, 1)."""
    if not 0 <= spread < min(sparsity, 1 - sparsity):
        raise UsageError(
            f"OWL: sparsity {sparsity:g} with a spread of {spread:g} lets blocks have {sparsity - spread:g} to "
            f"{sparsity + spread:g}, which must stay between 0 and 1.",
            f"Use a spread from 0 to below {max(0.0, min(sparsity, 1 - sparsity)):g}.",
        )


def allocate(
    ratios: Sequence[float], num_weights: Sequence[int], sparsity: float, spread: float = OWL_SPREAD
) -> list[float]:
    """A sparsity for each block, falling linearly with its outlier ratio: S_i = S − λ·d_i / max|d|, d_i = D_i − mean D.

    As in the paper S_i is in [S − λ, S + λ] and the mean is S: the furthest block is at the interval's edge. The
    authors' code stretches the ratios to a width of 2λ before it shifts their mean to S, which leaves the interval if
    they lie to one side (one block of 32 with outliers gets S − 1.94·λ).

    Args:
        ratios: D of every block.
        num_weights: of every block; the mean is weighted by them, so that the model's sparsity is S.
        sparsity: S, share of zeros in the model.
        spread: λ.

    Source: OWL §3.3, arXiv:2310.05175.
    """
    check_limits(sparsity, spread)
    lowest = min(ratios)
    above = [ratio - lowest for ratio in ratios]
    mean = math.fsum(map(math.prod, zip(above, num_weights, strict=True))) / sum(num_weights)
    deviations = [value - mean for value in above]
    furthest = max(map(abs, deviations))
    if furthest == 0:
        return [sparsity] * len(ratios)
    return [sparsity - spread * (deviation / furthest) for deviation in deviations]
