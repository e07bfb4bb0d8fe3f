"""Coordinate descent over codes and scales, against plain loops in float64 and all the codes there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.pruning.methods import prune_group, refit_group, round_group
from lors_cli.pruning.methods.admm import admm, admm_rounded
from lors_cli.pruning.methods.gptq import gptq
from lors_cli.pruning.methods.refit import DAMPING, descend, refit_rounded
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, num_violations

SPECS = [GridSpec(4, 32), GridSpec(4, 32, symmetric=False), GridSpec(8, 32)]


def hessian(width: int, tokens: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.3 * torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    return 2 * x.T @ x


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W0 = torch.randn(rows, columns, generator=generator)
    return W0, torch.rand(rows, columns, generator=generator) < 0.5, hessian(columns)


def damped(H: torch.Tensor) -> torch.Tensor:
    H = H.double()
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def cost(W: torch.Tensor, W0: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Of every row."""
    difference = (W.double() - W0.double()) @ damped(H)
    return (difference * (W.double() - W0.double())).sum(1)


def naive_pass(W0: torch.Tensor, W: torch.Tensor, M: torch.Tensor, H: torch.Tensor, grid: Grid) -> list[list[float]]:
    """One pass in float64, number by number; the weights."""
    H, size, last = damped(H), grid.spec.group_size, grid.spec.num_codes - 1
    result = W.double().tolist()
    for row in range(len(W0)):
        codes = grid.codes(W)[row].tolist()
        for group in range(grid.scales.shape[1]):
            columns = range(group * size, min(W0.shape[1], group * size + size))
            zero = grid.spec.middle if grid.zeros is None else int(grid.zeros[row, group])
            levels = {j: (codes[j] - zero) * bool(M[row, j]) for j in columns}

            def pull(j: int, row: int = row) -> float:
                return sum(float(H[j, k]) * (float(W0[row, k]) - result[row][k]) for k in range(W0.shape[1]))

            energy = sum(levels[i] * levels[j] * float(H[i, j]) for i in columns for j in columns)
            scale = float(grid.scales[row, group])
            if energy:
                scale += sum(levels[j] * pull(j) for j in columns) / energy
            for j in columns:
                result[row][j] = levels[j] * scale
            for j in columns:
                if M[row, j]:
                    best = result[row][j] + pull(j) / float(H[j, j])
                    points = [(code - zero) * scale for code in range(last + 1)]
                    result[row][j] = min(points, key=lambda point, best=best: abs(point - best))
    return result


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("columns", [32, 72])
def test_a_pass_is_that_of_a_plain_loop(spec: GridSpec, columns: int) -> None:
    W0, M, H = problem(4, columns)
    grid = fit_grid(W0, M, spec)
    start = grid.rounded(W0) * M
    found, _ = descend(W0, start, M, H, grid, passes=1)
    expected = torch.tensor(naive_pass(W0, start, M, H, grid), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_no_pass_raises_the_objective_of_any_row(spec: GridSpec, dtype: torch.dtype) -> None:
    W0, M, H = problem(32, 80)
    grid = fit_grid(W0, M, spec, dtype=dtype)
    costs = [cost(descend(W0, W0 * M, M, H, grid, passes=passes)[0], W0, H) for passes in range(4)]
    assert costs[0].equal(cost(grid.rounded(W0) * M, W0, H))
    for before, after in itertools.pairwise(costs):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(costs[-1].sum()) < 0.8 * float(costs[0].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("columns", [32, 80])
def test_the_result_lies_on_its_grid_and_keeps_the_zeros(columns: int, spec: GridSpec, dtype: torch.dtype) -> None:
    W0, M, H = problem(16, columns)
    start = fit_grid(W0, M, spec, dtype=dtype)
    as_given = start.scales.clone()
    found, grid = descend(W0, W0 * M, M, H, start)
    assert start.scales.equal(as_given)
    assert found.dtype == grid.scales.dtype == dtype
    assert grid.rounded(found).equal(found)
    assert not found[~M].any()
    assert not grid.scales.equal(start.scales)
    assert grid.zeros is start.zeros


def test_against_all_codes_of_a_few_weights() -> None:
    """Once passes change nothing, no other code of one weight is better; the best of all is little better."""
    spec = GridSpec(2, 8)
    W0, M, H = problem(24, 6)
    start = fit_grid(W0, M, spec)
    found, grid = descend(W0, W0 * M, M, H, start, passes=50)
    points = torch.tensor([*itertools.product([-2.0, -1.0, 0.0, 1.0], repeat=6)])
    costs, best = cost(found, W0, H), []
    for row in range(24):
        candidates = points[~points[:, ~M[row]].any(1)] * grid.scales[row]
        all_costs = cost(candidates, W0[row], H)
        neighbours = (candidates != found[row]).sum(1) == 1
        assert not neighbours.any() or float(all_costs[neighbours].min()) >= float(costs[row]) * (1 - 1e-5)
        best.append(float(all_costs.min()))
    optimum = torch.tensor(best, dtype=torch.float64)
    assert bool((costs >= optimum * (1 - 1e-5)).all())
    assert float((costs - optimum).sum()) < 0.1 * float((cost(start.rounded(W0) * M, W0, H) - optimum).sum())


def test_inputs_that_are_always_zero_and_groups_of_nothing_are_no_trouble() -> None:
    W0, M, H = problem(4, 64)
    M[:, :32] = False
    H[40], H[:, 40] = 0, 0
    for hessian_ in (H, torch.zeros_like(H)):
        found, grid = descend(W0, W0 * M, M, hessian_, fit_grid(W0, M, GridSpec(4, 32)))
        assert bool(found.isfinite().all())
        assert bool((grid.scales > 0).all())
        assert not found[:, :32].any()


@pytest.mark.parametrize("pattern", [Pattern.parse("2:4"), Pattern.parse("unstructured", 0.5)], ids=str)
@pytest.mark.parametrize("spec", [GridSpec(4, 32), GridSpec(4, 64, symmetric=False)])
def test_admm_and_refit_on_grids_lose_less_than_gptq_after_them(pattern: Pattern, spec: GridSpec) -> None:
    W0, _, H = problem(48, 96)
    for method, refitted in (("admm", False), ("wanda", True)):
        statistics = InputStatistics("hessian", total=H.clone() / 2, num_samples=1, num_tokens=200)
        (found,), (grid,) = round_group(method, [W0], statistics, pattern, spec, refit=refitted)
        pruned = prune_group(method, [W0], statistics, pattern)
        solved = refit_group([W0], pruned, statistics)
        (after,), _ = gptq(solved, [pruned[0] != 0], statistics, spec)
        assert grid.rounded(found).equal(found)
        assert method == "admm" or not found[pruned[0] == 0].any()
        assert num_violations(found, pattern) == 0
        assert float(cost(found, W0, H).sum()) < float(cost(after, W0, H).sum())
        if method == "admm":  # which ends in it
            assert round_group(method, [W0], statistics, pattern, spec, refit=True)[0][0].equal(found)


def test_admm_chooses_masks_for_rounded_weights() -> None:
    """Its masks with rounding inside lose less, once refitted and rounded, than those without."""
    W0, _, H = problem(48, 96)
    statistics = InputStatistics("hessian", total=H.clone() / 2, num_samples=1, num_tokens=200)
    for pattern in (Pattern.parse("2:4"), Pattern.parse("unstructured", 0.5)):
        found, _ = admm_rounded([W0], statistics, pattern, GridSpec(3, 32))
        apart, _ = refit_rounded([W0], admm([W0], statistics, pattern), statistics, GridSpec(3, 32))
        assert not (found[0] != 0).equal(apart[0] != 0)
        assert float(cost(found[0], W0, H).sum()) < float(cost(apart[0], W0, H).sum())


def test_stacked_weights_each_get_their_own_grid() -> None:
    W0, M, H = problem(12, 64)
    statistics = InputStatistics("hessian", total=H.clone() / 2, num_samples=1, num_tokens=200)
    pruned = W0 * M
    together = refit_rounded([W0[:4], W0[4:]], [pruned[:4], pruned[4:]], statistics, GridSpec(4, 32))
    (alone,), (grid,) = refit_rounded([W0[4:]], [pruned[4:]], statistics, GridSpec(4, 32))
    torch.testing.assert_close(together[1][1].scales, grid.scales, rtol=1e-4, atol=0)
    torch.testing.assert_close(together[0][1], alone, rtol=1e-4, atol=1e-4)
