"""Grids of few bits that weights are rounded to: a code each, and a scale for every group of a row's inputs.

A value is scale · (code − zero), in float32, rounded once to the weight's dtype. On grids of 4 bits, and symmetric ones
of 8, its code is found again from it, bfloat16 included. Zeros of a sparse weight need no code: its mask says where
they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHRINKS = 16
LEAST_SHRINK = 0.6
"""Scales tried for a group: its whole range and down to this share of it, which cuts the largest values off."""


@dataclass(frozen=True)
class GridSpec:
    """What a grid looks like, whatever weight it is for.

    Args:
        bits: of a code.
        group_size: consecutive inputs of a row that share a scale; the last group of a row may be smaller.
        symmetric: the zero point is the middle code, 2^(bits−1), and not stored.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def num_codes(self) -> int:
        """How many values a group can take."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The code of 0 on a symmetric grid."""
        return 1 << (self.bits - 1)

    def num_groups(self, columns: int) -> int:
        """Groups in a row of so many inputs."""
        return -(-columns // self.group_size)


@dataclass(frozen=True)
class Grid:
    """The grid of one weight (R, C).

    Args:
        scales: (R, groups), in the weight's dtype.
        zeros: (R, groups) uint8, the codes of 0; None on a symmetric grid.
    """

    spec: GridSpec
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def codes(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The codes of the values next to a weight's, ties to even: (R, columns) uint8.

        Args:
            weight: (R, columns), which are the columns from `first` on.
        """
        scales, zeros = self.spread(first, weight.shape[1])
        return (weight.float() / scales).round_().add_(zeros).clamp_(0, self.spec.num_codes - 1).byte()

    def values(self, codes: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What codes (R, columns) stand for, in the scales' dtype."""
        scales, zeros = self.spread(first, codes.shape[1])
        return ((codes.float() - zeros) * scales).to(self.scales.dtype)

    def rounded(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """A weight's (R, columns) nearest values on the grid, in the scales' dtype."""
        return self.values(self.codes(weight, first), first)

    def of_rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.spec, self.scales[rows], None if self.zeros is None else self.zeros[rows])

    def spread(self, first: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Scale and zero point of each of some columns, in float32."""
        size = self.spec.group_size
        groups = slice(first // size, -(-(first + num_columns) // size))
        inside = slice(first - groups.start * size, first - groups.start * size + num_columns)
        scales = self.scales[:, groups].float().repeat_interleave(size, dim=1)[:, inside]
        if self.zeros is None:
            return scales, self.spec.middle
        return scales, self.zeros[:, groups].float().repeat_interleave(size, dim=1)[:, inside]


def bits_a_weight(spec: GridSpec, weights: Iterable[tuple[int, int, float]], scale_bits: int = 16) -> float:
    """What a weight takes when it is packed: its share of codes, a bit of the mask, and of scales and zero points.

    Args:
        weights: out_features, in_features and the share that is kept of each.
        scale_bits: of the model's number format.
    """
    group_bits, total, number = scale_bits + (0 if spec.symmetric else 8), 0.0, 0
    for rows, columns, kept in weights:
        total += rows * (columns * (spec.bits * kept + 1) + spec.num_groups(columns) * group_bits)
        number += rows * columns
    return total / number


def packed_metrics(spec: GridSpec, weights: Iterable[tuple[int, int, float]], scale_bits: int) -> dict[str, Any]:
    """What records and `lors inspect` say of weights on grids; arguments as of `bits_a_weight`.

    Args:
        weights: those that can be packed; without any nothing is said of bits.
    """
    weights = list(weights)
    bits = {"bits_a_weight": round(bits_a_weight(spec, weights, scale_bits), 4)} if weights else {}
    return {"quantize": asdict(spec), **bits}


def fit_grid(
    weight: torch.Tensor,
    mask: torch.Tensor,
    spec: GridSpec,
    *,
    importance: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Grid:
    """The grid on which a weight's kept values lose least: for each group the best of some scales.

    Args:
        weight: (R, C).
        mask: (R, C) bool, what is kept; the others have no say.
        importance: (C,), how much an input's error counts, such as the Hessian's diagonal. Default: all alike.
        dtype: of the scales, and of the weight to come. Default: the weight's.

    Source: GPTQ's search for a grid that cuts the largest values off, arXiv:2210.17323 and its code.
    """
    import torch

    dtype = weight.dtype if dtype is None else dtype
    size, groups = spec.group_size, spec.num_groups(weight.shape[1])
    lacking = groups * size - weight.shape[1]

    def grouped(matrix: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(matrix, (0, lacking)).unflatten(1, (groups, size))

    kept = grouped(mask)
    values = grouped(weight.float().masked_fill(~mask, 0))  # 0 is on every grid, and so costs nothing
    counts = grouped(importance.float()[None]) if importance is not None else None
    if spec.symmetric:
        low = -values.abs().amax(-1, keepdim=True)
        steps = -low / (spec.middle - 1)
    else:
        low = values.amin(-1, keepdim=True).clamp_max(0)
        steps = (values.amax(-1, keepdim=True).clamp_min(0) - low) / (spec.num_codes - 1)
    tried: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for shrink in torch.linspace(1, LEAST_SHRINK, SHRINKS).tolist():
        scales = (steps * shrink).to(dtype).float()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.full_like(scales, spec.middle)
        if not spec.symmetric:
            zeros = (-low * shrink / scales).round_().clamp_(0, spec.num_codes - 1)
        codes = (values / scales).round_().add_(zeros).clamp_(0, spec.num_codes - 1)
        errors = ((codes - zeros) * scales - values).square_()
        total = (errors if counts is None else errors * counts).mul_(kept).sum(-1, keepdim=True)
        tried.append((scales, zeros, total))
    all_scales, all_zeros, totals = (torch.cat(parts, dim=-1) for parts in zip(*tried, strict=True))
    best = totals.argmin(-1, keepdim=True)
    scales, zeros = all_scales.gather(-1, best).squeeze(-1), all_zeros.gather(-1, best).squeeze(-1)
    return Grid(spec, scales.to(dtype), None if spec.symmetric else zeros.byte())
