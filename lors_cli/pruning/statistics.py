"""What a pruning method knows of a layer's inputs.

Legend: X (tokens, C) inputs of a linear, C in_features, H (C, C) the layer-wise Hessian 2·XᵀX / n, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lors_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["none", "norm", "hessian"]
NOT_FINITE = "the calibration inputs of a layer hold NaN or Inf; the model or its dtype is broken."


@dataclass
class InputStatistics:
    """Sums over the calibration inputs that one group of linears shares.

    Args:
        kind: what is summed: nothing, XᵀX's diagonal, or all of XᵀX; in float32.
        total: (C,) or (C, C), None before the first input.
        num_samples: calibration sequences seen.
        num_tokens: rows of X seen.
    """

    kind: Kind
    total: torch.Tensor | None = None
    num_samples: int = 0
    num_tokens: int = 0

    def update(self, x: torch.Tensor) -> None:
        """Add one batch of inputs.

        Args:
            x: (samples, tokens, C), or (tokens, C) for one sample, any float dtype.
        """
        self.num_samples += x.shape[0] if x.dim() > 2 else 1
        rows = x.reshape(-1, x.shape[-1])
        self.num_tokens += rows.shape[0]
        if self.kind == "none":
            return
        X = rows.float()
        if self.kind == "norm":
            squares = X.square_().sum(0) if X is not rows else X.square().sum(0)
            self.total = squares if self.total is None else self.total.add_(squares)
        elif self.total is None:
            self.total = X.T @ X
        else:
            self.total.addmm_(X.T, X)

    def input_norms(self) -> torch.Tensor:
        """‖X_j‖₂ of every input channel.

        Returns:
            (C,) float32.

        Raises:
            UsageError: an input was NaN or infinite.
        """
        assert self.total is not None
        squares = self.total if self.kind == "norm" else self.total.diagonal()
        if not bool(squares.isfinite().all()):
            raise UsageError(NOT_FINITE)
        return squares.sqrt()

    def hessian(self) -> torch.Tensor:
        """H = 2·XᵀX / n.

        Returns:
            (C, C) float32, a new tensor.

        Raises:
            UsageError: an input was NaN or infinite.

        Source: SparseGPT §3.1, arXiv:2301.00774.
        """
        assert self.kind == "hessian"
        assert self.total is not None
        if not bool(self.total.isfinite().all()):
            raise UsageError(NOT_FINITE)
        return self.total * (2.0 / self.num_samples)
