"""Rounding of merged weights to the grid that their base lies on, so that the tuned weight has its few bits too.

To the nearest value, ties to the even code; or, as in `rounding.py`, by thresholds: the update is counted in steps of
the grid, and a weight goes one step further up where the share of a step that is left over is above what its place
asks for. On average the update is there in full. A weight without an update stays as it is either way.

Legend: W (R, C) the base's weight, on its grid; total = W + s·B·A; W_t the merged weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lors_cli.grid import Grid
from lors_cli.tuning.kernels.rounding import LOW_BITS, PERIOD, Rounding, thresholds, thresholds_for

TILE_ELEMENTS = 1 << 18
"""Of a weight, rounded at a time by each thread."""


def round_to_grid(total: torch.Tensor, weight: torch.Tensor, grid: Grid, rounding: Rounding) -> torch.Tensor:
    """W_t without its mask, in the scales' dtype.

    Args:
        total: (rows, C) float32, its first row one of 0, 64, 128, … of the whole matrix.
        weight: (rows, C) W.
        grid: of these rows.
    """
    if rounding == "nearest":
        return grid.rounded(total)
    columns, device = total.shape[1], total.device
    make = thresholds if torch.compiler.is_compiling() else thresholds_for
    table = make(columns, device)[torch.arange(len(total), device=device) % PERIOD]
    scales, _ = grid.spread(0, columns)
    steps = ((total - weight.float()) / scales).add_((table + 0.5) / (LOW_BITS + 1)).floor_()
    return grid.values(steps.add_(grid.codes(weight)).clamp_(0, grid.spec.num_codes - 1).byte())


class RoundedToGrid(torch.autograd.Function):
    """W_t of a whole `total` (R, C) in float32, masked; its gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, total: torch.Tensor, weight: torch.Tensor, grid: Grid, rounding: Rounding) -> torch.Tensor:
        """(R, C) in the weight's dtype."""
        merged = torch.empty_like(weight)
        for rows in row_tiles(*weight.shape):
            part = weight[rows]
            merged[rows] = round_to_grid(total[rows], part, grid.of_rows(rows), rounding) * (part != 0)
        return merged

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of `total`."""
        return grad, None, None, None


@torch.no_grad()
def lies_on(weight: torch.Tensor, grid: Grid) -> bool:
    """Whether every value of a weight (R, C) that is not zero is one of its grid's, bit for bit."""
    if weight.dtype != grid.scales.dtype or grid.scales.shape != (len(weight), grid.spec.num_groups(weight.shape[1])):
        return False
    tiles = row_tiles(*weight.shape)
    return all(
        bool(((grid.of_rows(rows).rounded(weight[rows]) == weight[rows]) | (weight[rows] == 0)).all()) for rows in tiles
    )


def row_tiles(num_rows: int, num_columns: int, *, whole: bool = False) -> Iterator[slice]:
    """Rows that are worked on together, as many as a multiple of the thresholds' period; `whole`: all of them."""
    height = TILE_ELEMENTS * torch.get_num_threads() // num_columns
    height = num_rows if whole else max(1, height // PERIOD) * PERIOD
    return (slice(start, start + height) for start in range(0, num_rows, height))
