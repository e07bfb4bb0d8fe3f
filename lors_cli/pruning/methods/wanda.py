"""Wanda: a weight counts by its size times the norm of its input.

Legend: W (R, C) weight, X (tokens, C) its inputs, R out_features, C in_features.
"""

from __future__ import annotations

import torch

from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, keep_largest


def wanda(W: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
    """The weight with the lowest |W|·‖X_j‖₂ set to zero, compared within each row or each M of a row.

    Source: Wanda §3, arXiv:2306.11695.
    """
    scores = W.abs().float() * statistics.input_norms()
    return W * keep_largest(scores, pattern, per_row=True)
