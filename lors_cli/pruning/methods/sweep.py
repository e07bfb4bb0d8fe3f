"""The sweep of SparseGPT and GPTQ: weights go or are rounded column by column, and those to the right make up for it.

Legend: W (R, C) weight, H (C, C) = 2·XᵀX / n Hessian, U (C, C) upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU),
R out_features, C in_features. The sweep works on Wᵀ, so that a column of W is one contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.output import console
from lors_cli.pruning.methods.statistics import NOT_FINITE

BLOCK_COLUMNS = 128
STRIP_COLUMNS = 16
DAMPING = 0.01
FLOAT64_COLUMNS = 4096
"""Hessians up to this width are factored in float64: with inputs of very unequal sizes float32 keeps few digits of
the inverse. Wider ones take float32, whose half memory counts there."""


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U (C, C) of the damped Hessian's inverse, H⁻¹ = UᵀU, in float32.

    Damping is 0.01 × the mean diagonal. Where float32 fails (wide matrices), float64 is tried, then ten-fold damping
    until the matrix is positive definite; each step is logged. An input that was always 0 gets a 1 on the diagonal.

    Raises:
        UsageError: H holds NaN or infinities.
    """
    if H.device.type == "mps":  # has no float64
        return inverse_factor(H.cpu()).to(H.device)
    diagonal = torch.where(H.diagonal() == 0, 1, H.diagonal())
    mean = diagonal.double().mean()
    damping = DAMPING
    dtype = torch.float64 if len(H) <= FLOAT64_COLUMNS else torch.float32
    while True:
        damped = H.to(dtype, copy=True)
        damped.diagonal().copy_(diagonal.to(dtype) + damping * mean.to(dtype))
        U, failed = _factor_of_inverse(damped)
        del damped
        if not failed:
            return U.float()
        if not bool(torch.isfinite(H).all()):
            raise UsageError(NOT_FINITE)
        if dtype == torch.float32:
            dtype = torch.float64
            console.info("  Hessian not positive definite in float32: trying float64")
        else:
            damping *= 10
            console.warn(f"Hessian not positive definite: damping raised to {damping:g} × its mean diagonal")


def _factor_of_inverse(H: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The upper Cholesky factor of H⁻¹, and whether it failed; at most two matrices of H's size beside H."""
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        return L, True
    inverse = torch.cholesky_inverse(L)
    del L
    U, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return U, bool(failed) or not bool(torch.isfinite(U).all())


class Masks:
    """What stays, decided for `width` columns at a time when the sweep comes to the first of them.

    Args:
        width: 128 or less, or all of them where the mask is known.
        choose: (their first column, their values (width, R)) -> an (R,) bool for each column.
        step: the sweep's blocks and strips are multiples of it, so that the values of `width` columns are up to date.
    """

    def __init__(
        self, width: int, choose: Callable[[int, torch.Tensor], Sequence[torch.Tensor]], step: int = 1
    ) -> None:
        self.step = step
        self._width, self._choose = width, choose
        self._first = 0
        self._chosen: Sequence[torch.Tensor] = ()

    def at(self, i: int, Wt: torch.Tensor) -> torch.Tensor:
        """What stays of column i, (R,) bool."""
        if i % self._width == 0:
            self._first, self._chosen = i, self._choose(i, Wt[i : i + self._width])
        return self._chosen[i - self._first]

    def end(self, stop: int, num_columns: int) -> int:
        """How far values must be known to predict the columns before `stop`."""
        if stop <= self._first + self._width:
            return stop
        return min(-(-stop // self._width) * self._width, num_columns)

    def predicted(self, first: int, values: torch.Tensor, count: int) -> torch.Tensor:
        """(count, R) bool of the columns from `first` on: what is decided, and what would be with `values` as they are.

        Args:
            first: a column whose mask is decided.
            values: of the columns from there to `end`.
        """
        known = first - self._first
        masks = [*self._chosen[known : known + count]]
        for start in range(self._first + self._width, first + count, self._width):
            masks += self._choose(start, values[start - first : start - first + self._width])
        return torch.stack(masks[:count])


class Rounding:
    """The grids that a sweep's weight is rounded to, each fitted when the sweep comes to the group's first column.

    Args:
        dtype: that the weight will have.
        U: an error in column j costs its square over U_jj², what the columns to its right cannot make up for.
    """

    def __init__(self, spec: GridSpec, dtype: torch.dtype, U: torch.Tensor) -> None:
        self.spec = spec
        self._dtype = dtype
        self._importance = (U.diagonal().min() / U.diagonal()).square()
        self._fitted: list[Grid] = []

    def fit(self, first: int, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Fit the group of columns from `first` on to what is kept of their values, both (columns, R)."""
        importance = self._importance[first : first + len(values)]
        grid = fit_grid(values.T.contiguous(), mask.T.contiguous(), self.spec, importance=importance, dtype=self._dtype)
        self._fitted.append(replace(grid, spec=replace(self.spec, group_size=1)))  # which serves its columns one by one

    def __call__(self, column: torch.Tensor) -> torch.Tensor:
        """A column's (R,) nearest values on the grid of the group that it is in."""
        return self._fitted[-1].rounded(column[:, None])[:, 0].to(column.dtype)

    def grids(self, rows: Sequence[int]) -> list[Grid]:
        """The grids of the stacked weights, which have so many rows each."""
        scales = torch.cat([grid.scales for grid in self._fitted], dim=1).split([*rows])
        if self.spec.symmetric:
            return [Grid(self.spec, part) for part in scales]
        zeros = torch.cat([grid.zeros for grid in self._fitted if grid.zeros is not None], dim=1).split([*rows])
        return [Grid(self.spec, part, zero) for part, zero in zip(scales, zeros, strict=True)]


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Wᵀ (C, R) of weights (R_i, C) that share their input, in float32."""
    return torch.cat([weight.T.float() for weight in weights], dim=1)


def unstacked(Wt: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of Wᵀ (C, R) that are in the places of `weights`, in their dtypes."""
    parts = Wt.T.split([len(weight) for weight in weights])
    return [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]


def sweep(Wt: torch.Tensor, U: torch.Tensor, masks: Masks, rounding: Rounding | None = None) -> None:
    """Prune Wᵀ (C, R) in place, block by block of columns of W, and round what is kept.

    What a weight loses, as it goes or is rounded, is spread over the columns to its right.
    """
    width = _multiple(BLOCK_COLUMNS, masks.step)
    for start in range(0, len(Wt), width):
        stop = min(start + width, len(Wt))
        errors = _sweep_block(Wt, U, start, stop, masks, rounding)
        Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)


def _sweep_block(
    Wt: torch.Tensor, U: torch.Tensor, start: int, stop: int, masks: Masks, rounding: Rounding | None
) -> torch.Tensor:
    """Sweep over one block of columns in place; the errors (columns, R) that the columns to its right make up for.

    Columns of a narrow strip are updated one by one, the rest of the block by one product a strip.
    """
    errors = torch.empty_like(Wt[start:stop])
    width = _multiple(STRIP_COLUMNS, masks.step)
    for first in range(start, stop, width):
        last = min(first + width, stop)
        for i in range(first, last):
            keep, column, error = masks.at(i, Wt), Wt[i], errors[i - start]
            if rounding is not None and i % rounding.spec.group_size == 0:
                count = min(rounding.spec.group_size, len(Wt) - i)
                values = Wt[i : masks.end(i + count, len(Wt))].clone()  # without what is still to be spread:
                values[last - i :].addmm_(U[first:i, last : i + len(values)].T, errors[first - start : i - start],
                                          alpha=-1)  # fmt: skip
                values[stop - i :].addmm_(U[start:first, stop : i + len(values)].T, errors[: first - start], alpha=-1)
                mask = masks.predicted(i, values, count)
                rounding.fit(i, _pruned_ahead(values[:count], U[i : i + count, i : i + count], mask), mask)
            kept = (column if rounding is None else rounding(column)) * keep
            torch.sub(column, kept, out=error).div_(U[i, i])
            column.copy_(kept)
            if i + 1 < last:
                Wt[i + 1 : last].addr_(U[i, i + 1 : last], error, alpha=-1)
        Wt[last:stop].addmm_(U[first:last, last:stop].T, errors[first - start : last - start], alpha=-1)
    return errors


def _pruned_ahead(group: torch.Tensor, U: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A group of columns (columns, R), changed in place to what it would be if it were pruned alone and not rounded.

    Grids that are fitted to this lose 1 to 2 % less of a layer's outputs than those fitted to the values before.
    """
    sweep(group, U, Masks(len(mask), lambda first, values: mask.unbind()))
    return group


def _multiple(width: int, step: int) -> int:
    """The largest multiple of `step` up to `width`, at least `step` itself."""
    return max(step, width // step * step)
