"""Pruning and rounding in one sweep, and GPTQ on masks, against a float64 loop over columns, rows and scales.

Legend: W (R, C) weight, X (tokens, C) inputs, H (C, C) Hessian, R out_features, C in_features.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from lors_cli.grid import LEAST_SHRINK, SHRINKS, Grid, GridSpec, fit_grid
from lors_cli.pruning.methods import SOLVERS, prune_group, round_group
from lors_cli.pruning.methods.gptq import gptq, quantise_dense, quantise_pruned
from lors_cli.pruning.methods.sparsegpt import sparsegpt_rounded
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, num_violations

C = 300
DEAD = (0, 5, 6, 130, 299)
HALF = Pattern.parse("unstructured", 0.5)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(width: int = C, dead: tuple[int, ...] = ()) -> InputStatistics:
    """Of correlated inputs, with channels of different size."""
    mixing = normal(width, width, seed=7) / math.sqrt(width) + torch.eye(width)
    X = normal(2 * width, width, seed=8) @ mixing * torch.linspace(0.5, 2, width)
    X[:, [*dead]] = 0
    statistics = InputStatistics("hessian")
    statistics.update(X)
    return statistics


def damped(H: np.ndarray) -> np.ndarray:
    H = H.astype(np.float64)
    H[np.diag(H) == 0, np.diag(H) == 0] = 1.0
    return H + 0.01 * np.mean(np.diag(H)) * np.eye(len(H))


@cache
def first_rows(dead: tuple[int, ...]) -> list[np.ndarray]:
    """For every column j the first row of the inverse of H[j:, j:]."""
    H = damped(statistics_of(dead=dead).hessian().numpy())
    return [np.linalg.inv(H[j:, j:])[0] for j in range(C)]


def fitted(
    values: np.ndarray, kept: np.ndarray, costs: np.ndarray, spec: GridSpec, dtype: torch.dtype
) -> tuple[float, int]:
    """Scale and zero point of one row's group: of all that are tried the one whose kept values cost least."""
    values = [float(value) for value, keep in zip(values, kept, strict=True) if keep]
    costs = [float(cost) for cost, keep in zip(costs, kept, strict=True) if keep]
    most, least = max([0.0, *values]), min([0.0, *values])
    top, best = 2**spec.bits - 1, (math.inf, 1.0, 2 ** (spec.bits - 1))
    for number in range(SHRINKS):
        shrink = 1 - (1 - LEAST_SHRINK) * number / (SHRINKS - 1)
        span = max(most, -least) / (2 ** (spec.bits - 1) - 1) if spec.symmetric else (most - least) / top
        scale = float(torch.tensor(span * shrink).to(dtype)) or 1.0
        zero = 2 ** (spec.bits - 1) if spec.symmetric else min(max(round(-least * shrink / scale), 0), top)
        error = sum(cost * (on_grid(value, scale, zero, top) - value) ** 2
                    for value, cost in zip(values, costs, strict=True))  # fmt: skip
        if error < best[0]:
            best = (error, scale, zero)
    return best[1], best[2]


def on_grid(value: float, scale: float, zero: int, top: int) -> float:
    return scale * (min(max(round(value / scale) + zero, 0), top) - zero)


Choose = Callable[[np.ndarray, int, int], np.ndarray]
"""(weight as it stands, first column, last) -> what stays of these columns."""


def saliencies(inverses: list[np.ndarray], pattern: Pattern) -> Choose:
    """SparseGPT's choice: the lowest w² / [H⁻¹]₀₀ of M columns of a row, or of 128 columns, go."""

    def choose(W: np.ndarray, first: int, last: int) -> np.ndarray:
        saliency = np.array([W[:, j] ** 2 / inverses[j][0] for j in range(first, last)]).T
        keep = np.ones(saliency.shape, dtype=bool)
        if pattern.m is None:
            removed = math.floor(saliency.size * pattern.sparsity)
            keep.flat[np.argsort(saliency, axis=None, kind="stable")[:removed]] = False
        else:
            for i in range(len(W)):
                keep[i, np.argsort(saliency[i], kind="stable")[: pattern.m - int(pattern.n or 0)]] = False
        return keep

    return choose


def reference(
    W: torch.Tensor, inverses: list[np.ndarray], step: int, choose: Choose, spec: GridSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column by column: what stays is chosen every `step` columns, grids every `group_size`; then each row is rounded,
    and what it loses is spread by the optimal-brain-surgeon update over the columns to the right.

    Returns:
        The rounded weight, scales and zero points (R, groups).
    """
    dtype, W = W.dtype, W.double().numpy().copy()
    R, width = W.shape
    keep = np.zeros(W.shape, dtype=bool)
    shape = (R, -(-width // spec.group_size))
    scales, zeros = np.zeros(shape), np.zeros(shape, dtype=int)
    for j in range(width):
        if j % step == 0:
            keep[:, j : j + step] = choose(W, j, min(j + step, width))
        group, stop = j // spec.group_size, min(j + spec.group_size, width)
        if j % spec.group_size == 0:
            predicted = keep.copy()
            for first in range((j // step + 1) * step, stop, step):
                predicted[:, first : first + step] = choose(W, first, min(first + step, width))
            costs = np.array([1 / inverses[k][0] for k in range(j, stop)])
            ahead = W[:, :stop].copy()  # as the group would be pruned if nothing were rounded
            for k in range(j, stop):
                for i in range(R):
                    if not predicted[i, k]:
                        ahead[i, k:stop] -= ahead[i, k] / inverses[k][0] * inverses[k][: stop - k]
            for i in range(R):
                found = fitted(ahead[i, j:stop], predicted[i, j:stop], costs, spec, dtype)
                scales[i, group], zeros[i, group] = found
        for i in range(R):
            value = on_grid(W[i, j], scales[i, group], int(zeros[i, group]), 2**spec.bits - 1)
            value = float(torch.tensor(value, dtype=torch.float64).float().to(dtype)) if keep[i, j] else 0.0
            W[i, j:] -= (W[i, j] - value) / inverses[j][0] * inverses[j]
            W[i, j] = value
    return W, scales, zeros


@pytest.fixture
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeps run in float64, so that no value near the middle of two codes goes another way than in the loop."""
    for name in ("sparsegpt", "gptq"):
        module = importlib.import_module(f"lors_cli.pruning.methods.{name}")
        monkeypatch.setattr(
            module, "stacked", lambda weights: torch.cat([weight.T.double() for weight in weights], dim=1)
        )
        monkeypatch.setattr(
            module, "inverse_factor",
            lambda H: torch.linalg.cholesky(torch.linalg.inv(torch.from_numpy(damped(H.numpy()))), upper=True),
        )  # fmt: skip


def same(weight: torch.Tensor, grid: Grid, expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    values, scales, zeros = expected
    np.testing.assert_allclose(grid.scales.double().numpy(), scales, rtol=1e-6)
    if grid.zeros is not None:
        np.testing.assert_array_equal(grid.zeros.numpy(), zeros)
    np.testing.assert_allclose(weight.double().numpy(), values, rtol=1e-6)  # another code is 1/128 off at least
    assert grid.rounded(weight).equal(weight)


SPECS = [GridSpec(4, 32), GridSpec(4, 64, symmetric=False), GridSpec(4, 128), GridSpec(8, 128), GridSpec(3, 100),
         GridSpec(2, 200, symmetric=False)]  # fmt: skip


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "pattern", [Pattern.parse("2:4"), Pattern.parse("3:6"), Pattern.parse("75:150"), HALF], ids=str
)
def test_the_joint_sweep_is_the_loop(pattern: Pattern, spec: GridSpec) -> None:
    weights = [normal(2, C, seed=1), 10 * normal(1, C, seed=2)]
    found, grids = sparsegpt_rounded(weights, statistics_of(), pattern, spec)
    for weight, got, grid in zip(weights, found, grids, strict=True):
        choose = saliencies(first_rows(()), pattern)
        same(got, grid, reference(weight, first_rows(()), pattern.m or 128, choose, spec))
        assert num_violations(got, pattern) == 0


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("pattern", [Pattern.parse("2:4"), HALF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dead_inputs_and_bfloat16(pattern: Pattern, dtype: torch.dtype) -> None:
    W = normal(3, C).to(dtype)
    (got,), (grid,) = sparsegpt_rounded([W], statistics_of(dead=DEAD), pattern, GridSpec(4, 64))
    assert (got.dtype, grid.scales.dtype) == (dtype, dtype)
    without = W.clone()
    without[:, [*DEAD]] = 0
    choose = saliencies(first_rows(DEAD), pattern)
    same(got, grid, reference(without, first_rows(DEAD), pattern.m or 128, choose, GridSpec(4, 64)))
    assert int(got[:, [*DEAD]].count_nonzero()) == 0


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("method", "pattern"), [("wanda", Pattern.parse("2:4")), ("ria", Pattern.parse("3:6")),
                                                 ("magnitude", HALF)])  # fmt: skip
def test_gptq_on_the_mask_of_a_method_is_the_loop(method: str, pattern: Pattern, spec: GridSpec) -> None:
    weights = [normal(2, C, seed=1), 10 * normal(1, C, seed=2)]
    found, grids = round_group(method, weights, statistics_of(), pattern, spec)
    masked = prune_group(method, weights, statistics_of(), pattern)
    for pruned, got, grid in zip(masked, found, grids, strict=True):
        keep = (pruned != 0).numpy()
        same(got, grid, reference(pruned, first_rows(()), C, lambda W, first, last, keep=keep: keep, spec))
        assert not bool((got[pruned == 0] != 0).any())


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_a_dense_weight_is_the_loop(bits: int, symmetric: bool) -> None:
    W, spec = normal(3, C), GridSpec(bits, 128, symmetric)
    got, grid = quantise_dense(W, statistics_of(), spec)
    same(got, grid, reference(W, first_rows(()), C, lambda W, first, last: np.ones(W.shape, dtype=bool), spec))


def output_error(W: torch.Tensor, got: torch.Tensor, H: torch.Tensor) -> float:
    difference = (got.float() - W.float()).double()
    return float((difference @ H.double() * difference).sum())


@pytest.mark.parametrize("spec", [GridSpec(4, 32), GridSpec(3, 128, symmetric=False)], ids=str)
def test_sweeps_lose_less_than_rounding_to_the_nearest(spec: GridSpec) -> None:
    W, statistics, pattern = normal(32, C), statistics_of(), Pattern.parse("2:4")
    H = statistics.hessian()

    def nearest(weight: torch.Tensor) -> torch.Tensor:
        return fit_grid(weight, weight != 0, spec).rounded(weight)

    dense, _ = quantise_dense(W, statistics, spec)
    assert output_error(W, dense, H) < 0.8 * output_error(W, nearest(W), H)
    pruned = prune_group("wanda", [W], statistics, pattern)[0]
    (on_mask,), _ = quantise_pruned([pruned], statistics, spec)
    assert output_error(pruned, on_mask, H) < 0.95 * output_error(pruned, nearest(pruned), H)
    (joint,), _ = sparsegpt_rounded([W], statistics, pattern, spec)
    apart = nearest(SOLVERS["sparsegpt"]([W], statistics, pattern)[0])
    assert output_error(W, joint, H) < output_error(W, apart, H)


@pytest.mark.parametrize("statistics", [InputStatistics("none"), InputStatistics("hessian")])
def test_without_any_input_weights_go_to_the_nearest(statistics: InputStatistics) -> None:
    W, spec = normal(4, 80), GridSpec(4, 32)
    (pruned,), (grid,) = round_group("magnitude", [W], statistics, Pattern.parse("2:4"), spec)
    (expected,) = prune_group("magnitude", [W], statistics, Pattern.parse("2:4"))
    assert pruned.equal(fit_grid(expected, expected != 0, spec).rounded(expected))
    assert pruned.equal(grid.rounded(pruned))
    assert num_violations(pruned, Pattern.parse("2:4")) == 0


def test_a_mask_that_keeps_nothing_of_a_row() -> None:
    W, mask = normal(3, C), torch.rand(3, C, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1] = False
    (got,), (grid,) = gptq([W * mask], [mask], statistics_of(), GridSpec(4, 128, symmetric=False))
    assert bool(got.isfinite().all())
    assert int(got[1].count_nonzero()) == 0
    assert got.equal(grid.rounded(got))
