"""What a pruning method knows of a layer's inputs.

Legend: X (tokens, C) inputs of a linear, C in_features, H (C, C) the layer-wise Hessian 2·XᵀX / n, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lors_cli.errors import UsageError
from lors_cli.machine import processes
from lors_cli.pruning.facts import CAST_BYTES, Kind

NOT_FINITE = "the calibration inputs of a layer hold NaN or Inf; the model or its dtype is broken."
PANEL_COLUMNS = 128


@dataclass
class InputStatistics:
    """Sums over the calibration inputs that one group of linears shares.

    Of the symmetric XᵀX only the upper triangle is summed, in panels of rows; `hessian` mirrors it.
    """

    kind: Kind
    """What is summed: nothing, XᵀX's diagonal, or XᵀX; in float32."""
    total: torch.Tensor | None = None
    """(C,) or (C, C), None before the first input."""
    num_samples: int = 0
    num_tokens: int = 0
    _hessian: torch.Tensor | None = field(default=None, repr=False)

    def update(self, x: torch.Tensor) -> None:
        """Add one batch of inputs (samples, tokens, C), or (tokens, C) of one sample, of any float dtype."""
        assert self._hessian is None, "inputs came after the Hessian was asked for"
        self.num_samples += x.shape[0] if x.dim() > 2 else 1
        rows = x.reshape(-1, x.shape[-1])
        self.num_tokens += rows.shape[0]
        if self.kind == "none":
            return
        if self.total is None:
            self.total = self._zeros(rows.shape[1], rows.device)
        for part in rows.split(max(1, CAST_BYTES // (4 * rows.shape[1]))):
            X = part.float()
            if self.kind == "norm":
                self.total.add_((X.square_() if X is not part else X.square()).sum(0))
            else:
                _add_upper(self.total, X)

    def _zeros(self, width: int, device: torch.device) -> torch.Tensor:
        return torch.zeros((width,) if self.kind == "norm" else (width, width), device=device)

    def add_up(self, width: int, device: torch.device) -> None:
        """Add what all processes have seen; called once, by all of them, after the last input.

        `width` is C, `device` that of the sums: this process may have seen no input.
        """
        if processes.num_processes() == 1:
            return
        if self.total is None and self.kind != "none":
            self.total = self._zeros(width, device)
        if self.total is not None:
            processes.add_up(self.total)
        counts = processes.add_up(torch.tensor([self.num_samples, self.num_tokens], device=device))
        self.num_samples, self.num_tokens = counts.tolist()

    def input_norms(self) -> torch.Tensor:
        """‖X_j‖₂ of every input channel, (C,) float32.

        Raises:
            UsageError: an input was NaN or infinite.
        """
        assert self.total is not None
        squares = self.total if self.kind == "norm" else self.total.diagonal()
        if self._hessian is not None:
            squares = squares * (self.num_samples / 2)
        if not bool(squares.isfinite().all()):
            raise UsageError(NOT_FINITE)
        return squares.sqrt()

    def hessian(self) -> torch.Tensor:
        """H = 2·XᵀX / n, (C, C) float32, made in place of the sums: not to be written to, and no input comes after it.

        Raises:
            UsageError: an input was NaN or infinite.

        Source: SparseGPT §3.1, arXiv:2301.00774.
        """
        assert self.kind == "hessian"
        assert self.total is not None
        if self._hessian is None:
            if not bool(self.total.isfinite().all()):
                raise UsageError(NOT_FINITE)
            _mirror(self.total.mul_(2.0 / self.num_samples))
            self._hessian = self.total
        return self._hessian

    def permute(self, permutation: torch.Tensor) -> None:
        """Reorder the input channels, as the weights that read them are: new channel j is old permutation[j]."""
        if self.total is None:
            return
        if self.kind == "hessian":
            H = self.hessian()
            H.copy_(H[permutation][:, permutation])
        else:
            self.total = self.total[permutation]


def _panels(width: int) -> list[slice]:
    """Slices of the rows of an upper triangle: at most 16, of at least `PANEL_COLUMNS`."""
    step = max(PANEL_COLUMNS, -(-width // 16))
    return [slice(first, min(first + step, width)) for first in range(0, width, step)]


def _add_upper(total: torch.Tensor, X: torch.Tensor) -> None:
    """Add XᵀX to the upper triangle of `total` (C, C); what is left of a panel's first column is not touched."""
    for rows in _panels(X.shape[1]):
        total[rows, rows.start :].addmm_(X[:, rows].T, X[:, rows.start :])


def _mirror(total: torch.Tensor) -> None:
    """Copy the upper triangle of `total` (C, C) to the lower one."""
    for rows in _panels(total.shape[0]):
        total[rows.stop :, rows].copy_(total[rows, rows.stop :].T)
        corner = total[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
