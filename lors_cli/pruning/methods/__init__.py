"""The pruning methods, and how a group of weights is handed to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lors_cli.pruning.facts import RECONSTRUCTION_SAMPLES, STATISTICS, statistics_kind
from lors_cli.pruning.methods.admm import admm
from lors_cli.pruning.methods.magnitude import magnitude
from lors_cli.pruning.methods.refit import refit
from lors_cli.pruning.methods.ria import relative_importance, ria
from lors_cli.pruning.methods.sparsegpt import sparsegpt
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.methods.wanda import wanda
from lors_cli.sparsity import Pattern

__all__ = ["RECONSTRUCTION_SAMPLES", "SOLVERS", "STATISTICS", "prune_group", "refit_group", "scores", "statistics_kind"]

Solver = Callable[[Sequence[torch.Tensor], InputStatistics, Pattern], list[torch.Tensor]]


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


def prune_group(
    method: str, weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern
) -> list[torch.Tensor]:
    """Prune linears (out_features_i, in_features) that share their input, whose statistics are of the method's kind."""
    return SOLVERS[method](weights, statistics, pattern)


def scores(method: str, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """How much each weight counts, in float32: RIA's relative importance for `ria`, else Wanda's score.

    Where nothing is known of the inputs, a weight's size is its score.
    """
    if method == "ria":
        return relative_importance(weight, statistics)
    size = weight.abs().float()
    return size * statistics.input_norms() if statistics.num_tokens and statistics.kind != "none" else size


def refit_group(
    weights: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor], statistics: InputStatistics
) -> list[torch.Tensor]:
    """`refit` of linears (out_features_i, in_features) that share their input, whose Hessian is known."""
    rows = [weight.shape[0] for weight in weights]
    solved = refit(torch.cat([*weights]), torch.cat([*pruned]), statistics.hessian())
    return [part.to(weight.dtype) for part, weight in zip(solved.split(rows), weights, strict=True)]
