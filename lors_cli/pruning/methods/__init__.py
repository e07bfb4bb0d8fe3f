"""The pruning methods, and how a group of weights is handed to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lors_cli.grid import GridSpec
from lors_cli.pruning.facts import STATISTICS, grid_spec, statistics_kind
from lors_cli.pruning.methods.admm import admm, admm_rounded
from lors_cli.pruning.methods.gptq import Rounded, quantise_pruned
from lors_cli.pruning.methods.magnitude import magnitude
from lors_cli.pruning.methods.refit import refit_group, refit_rounded
from lors_cli.pruning.methods.ria import relative_importance, ria
from lors_cli.pruning.methods.sparsegpt import sparsegpt, sparsegpt_rounded
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.methods.wanda import wanda
from lors_cli.sparsity import Pattern

__all__ = [
    "ROUNDED_SOLVERS", "SOLVERS", "STATISTICS", "grid_spec", "prune_group", "refit_group",
    "round_group", "scores", "statistics_kind",
]  # fmt: skip

Solver = Callable[[Sequence[torch.Tensor], InputStatistics, Pattern], list[torch.Tensor]]
RoundedSolver = Callable[[Sequence[torch.Tensor], InputStatistics, Pattern, GridSpec], Rounded]


def each(function: Callable[[torch.Tensor, InputStatistics, Pattern], torch.Tensor]) -> Solver:
    """A method that takes one weight at a time, as one that takes all that share their input."""
    return lambda weights, statistics, pattern: [function(weight, statistics, pattern) for weight in weights]


SOLVERS: dict[str, Solver] = {
    "magnitude": each(lambda weight, statistics, pattern: magnitude(weight, pattern)),
    "wanda": each(wanda),
    "ria": each(ria),
    "sparsegpt": sparsegpt,
    "admm": admm,
}
"""Each method: linears that share their input, what is known of it, and the pattern -> the pruned weights."""
ROUNDED_SOLVERS: dict[str, RoundedSolver] = {"sparsegpt": sparsegpt_rounded, "admm": admm_rounded}
"""The methods that round what they keep to grids themselves; what the others keep GPTQ rounds."""


def prune_group(
    method: str, weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern
) -> list[torch.Tensor]:
    """Prune linears (out_features_i, in_features) that share their input, whose statistics are of the method's kind."""
    return SOLVERS[method](weights, statistics, pattern)


def round_group(
    method: str, weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern, spec: GridSpec,
    *, refit: bool = False,
) -> Rounded:  # fmt: skip
    """`prune_group` that puts what it keeps on grids: the pruned weights and the grids.

    Args:
        statistics: with the Hessian; without any, weights are rounded to the nearest.
        refit: solve for the kept weights anew, on the mask that the method chose without grids; admm ends so anyway.
    """
    if refit and method != "admm":
        return refit_rounded(weights, prune_group(method, weights, statistics, pattern), statistics, spec)
    if method in ROUNDED_SOLVERS:
        return ROUNDED_SOLVERS[method](weights, statistics, pattern, spec)
    return quantise_pruned(prune_group(method, weights, statistics, pattern), statistics, spec)


def scores(method: str, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """How much each weight counts, in float32: RIA's relative importance for `ria`, else Wanda's score.

    Where nothing is known of the inputs, a weight's size is its score.
    """
    if method == "ria":
        return relative_importance(weight, statistics)
    size = weight.abs().float()
    return size * statistics.input_norms() if statistics.num_tokens and statistics.kind != "none" else size
