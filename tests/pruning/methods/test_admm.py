"""ADMM and refitting against least squares solved row by row."""

from __future__ import annotations

import pytest
import torch

from lors_cli.errors import UsageError
from lors_cli.pruning.methods import prune_group, refit_group
from lors_cli.pruning.methods.admm import DAMPING, admm
from lors_cli.pruning.methods.refit import DAMPING as REFIT_DAMPING
from lors_cli.pruning.methods.refit import refit
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.sparsity import Pattern, num_violations

TWO_OF_FOUR = Pattern.parse("2:4")
HALF = Pattern.parse("unstructured", 0.5)


def correlated_inputs(width: int, tokens: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(tokens, width, generator=generator) @ (mixing + 0.3 * torch.eye(width))


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics("hessian")
    statistics.update(x)
    return statistics


def dense(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def damped_error(W: torch.Tensor, W0: torch.Tensor, H: torch.Tensor, damping: float) -> float:
    H = H.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    difference = (W - W0).double()
    return float((difference @ H * difference).sum())


def exact_refit(W0: torch.Tensor, mask: torch.Tensor, H: torch.Tensor, damping: float) -> torch.Tensor:
    """Every row's normal equations on its own support, in float64."""
    H = H.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    solution = torch.zeros_like(W0, dtype=torch.float64)
    for row in range(len(W0)):
        kept = mask[row].nonzero().flatten()
        solution[row, kept] = torch.linalg.solve(H[kept][:, kept], (H @ W0[row].double())[kept])
    return solution


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF])
def test_refit_is_the_least_squares_solution_on_the_mask(pattern: Pattern) -> None:
    W0, statistics = dense(12, 32), statistics_of(correlated_inputs(32))
    (pruned,) = prune_group("wanda", [W0], statistics, pattern)
    H = statistics.hessian()
    solved = refit(W0, pruned, H, iterations=100)
    expected = exact_refit(W0, pruned != 0, H, REFIT_DAMPING)
    torch.testing.assert_close(solved.double(), expected, rtol=1e-3, atol=1e-3)
    assert bool((solved[pruned == 0] == 0).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria", "admm"])
def test_refit_lowers_every_methods_error_and_keeps_its_zeros(method: str) -> None:
    weights, statistics = [dense(12, 64), dense(8, 64, seed=1)], statistics_of(correlated_inputs(64))
    pruned = prune_group(method, weights, statistics, TWO_OF_FOUR)
    refitted = refit_group(weights, pruned, statistics)
    H = statistics.hessian()
    for W0, before, after in zip(weights, pruned, refitted, strict=True):
        assert bool((after[before == 0] == 0).all())
        errors = [damped_error(W, W0, H, REFIT_DAMPING) for W in (before, after)]
        assert errors[1] < errors[0] * (1.0001 if method == "admm" else 0.99)


def test_a_refit_of_what_is_solved_already_changes_nothing() -> None:
    W0, statistics = dense(4, 32), statistics_of(correlated_inputs(32))
    (pruned,) = prune_group("wanda", [W0], statistics, TWO_OF_FOUR)
    once = refit(W0, pruned, statistics.hessian(), iterations=100)
    twice = refit(W0, once, statistics.hessian(), iterations=100)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(twice).all())


def test_admm_converges_to_least_squares_once_its_mask_is_kept() -> None:
    W0, statistics = dense(12, 32), statistics_of(correlated_inputs(32))
    (pruned,) = admm([W0], statistics, TWO_OF_FOUR, iterations=2000, mask_iterations=5)
    H = statistics.hessian()
    norms = H.diagonal().sqrt()
    scaled = H / norms[:, None] / norms
    expected = exact_refit(W0 * norms, pruned != 0, scaled, DAMPING) / norms
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-2, atol=1e-2)


def test_admm_beats_sparsegpt_on_correlated_inputs() -> None:
    W0, statistics = dense(64, 128), statistics_of(correlated_inputs(128, tokens=2000))
    H = statistics.hessian()
    errors = {
        method: damped_error(prune_group(method, [W0], statistics, TWO_OF_FOUR)[0], W0, H, 0.0)
        for method in ("wanda", "sparsegpt", "admm")
    }
    assert errors["admm"] < errors["sparsegpt"] < errors["wanda"]


def test_admm_of_uncorrelated_inputs_is_wandas_choice() -> None:
    W0 = dense(8, 16)
    statistics = InputStatistics("hessian", total=torch.diag(torch.linspace(1, 4, 16)), num_samples=1)
    (pruned,) = admm([W0], statistics, TWO_OF_FOUR)
    (expected,) = prune_group("wanda", [W0], statistics, TWO_OF_FOUR)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern.parse("1:4"), Pattern.parse("4:8"), HALF])
def test_admm_keeps_the_pattern_in_every_stacked_weight(pattern: Pattern) -> None:
    weights = [dense(12, 64), dense(8, 64, seed=1).bfloat16(), dense(4, 64, seed=2)]
    for W0, pruned in zip(weights, admm(weights, statistics_of(correlated_inputs(64)), pattern), strict=True):
        assert pruned.dtype == W0.dtype
        assert num_violations(pruned, pattern) == 0
        assert float((pruned == 0).float().mean()) == pytest.approx(pattern.sparsity, abs=0.01)


def test_dead_inputs_and_few_tokens_are_no_trouble() -> None:
    x = correlated_inputs(32, tokens=10)
    x[:, 5] = 0
    weights = [dense(8, 32)]
    statistics = statistics_of(x)
    (pruned,) = admm(weights, statistics, TWO_OF_FOUR)
    assert bool(torch.isfinite(pruned).all())
    (refitted,) = refit_group(weights, [pruned], statistics)
    assert bool(torch.isfinite(refitted).all())


def test_broken_inputs_are_refused() -> None:
    x = correlated_inputs(16)
    x[0, 0] = float("nan")
    with pytest.raises(UsageError, match="NaN or Inf"):
        admm([dense(4, 16)], statistics_of(x), TWO_OF_FOUR)
    with pytest.raises(UsageError, match="NaN or Inf"):
        refit(dense(4, 16), dense(4, 16), statistics_of(x).hessian())
