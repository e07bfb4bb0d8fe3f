"""Magnitude pruning: the smallest weights go.

Legend: W (R, C) weight, R out_features, C in_features.
"""

from __future__ import annotations

import torch

from lors_cli.sparsity import Pattern, keep_largest


def magnitude(W: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The weight with its smallest entries set to zero; unstructured compares over the whole weight."""
    return W * keep_largest(W.abs(), pattern, per_row=False)
