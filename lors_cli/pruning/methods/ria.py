"""RIA: relative importance (a weight's share of its row and of its column) times a power of its input's norm.

Legend: W (R, C) weight, X (tokens, C) its inputs, R out_features, C in_features.
"""

from __future__ import annotations

import torch

from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, keep_largest

ACTIVATION_POWER = 0.5


def ria(W: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
    """The weight with the lowest relative importance set to zero; unstructured compares over the whole weight.

    Source: RIA §3, ICLR 2024, “Plug-and-Play: an efficient post-training pruning method for large language models”;
    its channel permutation is `lors_cli.pruning.methods.permutation`.
    """
    return W * keep_largest(relative_importance(W, statistics), pattern, per_row=False)


def relative_importance(W: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """(|W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|)·‖X_j‖₂^0.5, in float32."""
    size = W.abs().float()
    tiny = 1e-12  # a row or column of zeros has importance 0, not 0/0
    relative = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * statistics.input_norms() ** ACTIVATION_POWER
