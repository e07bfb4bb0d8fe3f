"""OWL's outlier ratios against counting, and the invariants of its allocation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lors_cli.errors import UsageError
from lors_cli.pruning.methods.owl import allocate, check_limits, outlier_ratio
from lors_cli.recipe.rules import OWL_SPREAD


def block(scales: tuple[float, float] = (1.0, 1.0)) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two heavy-tailed linears of different shapes."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(6, 10, generator=generator) ** 3, scales[1] * torch.randn(9, 4, generator=generator) ** 3]
    norms = [scales[0] * torch.rand(10, generator=generator), torch.rand(4, generator=generator)]
    return weights, norms


@pytest.mark.parametrize("threshold", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ratio_is_a_count_over_the_whole_block(threshold: float, dtype: torch.dtype) -> None:
    weights, norms = block((1.0, 10.0))
    weights = [weight.to(dtype) for weight in weights]
    scores = [
        abs(float(weight[i, j])) * float(norm[j])
        for weight, norm in zip(weights, norms, strict=True)
        for i in range(weight.shape[0])
        for j in range(weight.shape[1])
    ]
    mean = sum(scores) / len(scores)
    expected = sum(score > threshold * mean for score in scores) / len(scores)
    assert 0 < expected < 1
    assert outlier_ratio(weights, norms, threshold) == pytest.approx(expected, abs=1e-12)


def test_the_ratio_knows_no_units() -> None:
    weights, norms = block()
    tripled = [3 * norm for norm in norms]
    assert outlier_ratio(weights, tripled, 3.0) == outlier_ratio(weights, norms, 3.0) > 0


def test_a_block_of_zeros_has_no_outliers() -> None:
    assert outlier_ratio([torch.zeros(2, 3)], [torch.ones(3)]) == 0


BLOCKS = st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(1, 10**9)), min_size=1, max_size=60)
TARGETS = st.floats(0.05, 0.95).flatmap(
    lambda sparsity: st.tuples(st.just(sparsity), st.floats(0, min(sparsity, 1 - sparsity) * 0.999))
)


@given(BLOCKS, TARGETS)
def test_the_mean_the_interval_and_the_order_hold(blocks: list[tuple[float, int]], target: tuple[float, float]) -> None:
    ratios, sizes = zip(*blocks, strict=True)
    sparsity, spread = target
    shares = allocate(ratios, sizes, sparsity, spread)
    mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity, abs=1e-13)
    assert all(0 < share < 1 and sparsity - spread <= share <= sparsity + spread for share in shares)
    by_ratio = [share for _, share in sorted(zip(ratios, shares, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert by_ratio == sorted(by_ratio, reverse=True)
    if len(set(ratios)) == 1:
        assert shares == [sparsity] * len(ratios)
    else:
        assert max(abs(share - sparsity) for share in shares) == pytest.approx(spread, abs=1e-15)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**9)), min_size=1), st.floats(1e-6, 100))
def test_percent_or_share_is_one(blocks: list[tuple[int, int]], unit: float) -> None:
    ratios, sizes = zip(*blocks, strict=True)
    assert allocate([unit * ratio for ratio in ratios], sizes, 0.7) == pytest.approx(allocate(ratios, sizes, 0.7))


def test_ratios_that_lie_evenly_have_the_authors_allocation() -> None:
    ratios = [1.0, 2.0, 2.5, 3.0, 4.0]
    density = [(ratio - 1) / 3 * 2 * OWL_SPREAD for ratio in ratios]  # as released: stretched to a width of 2λ, …
    mean = sum(density) / len(density)
    expected = [1 - (value - mean + 1 - 0.7) for value in density]  # … then shifted to the mean density
    assert allocate(ratios, [1] * 5, 0.7) == pytest.approx(expected)
    assert allocate(ratios, [1] * 5, 0.7) == pytest.approx([0.78, 0.7 + 0.08 / 3, 0.7, 0.7 - 0.08 / 3, 0.62])


def test_larger_blocks_count_for_more() -> None:
    assert allocate([0.0, 1.0], [3, 1], 0.5, 0.09) == pytest.approx([0.53, 0.41])


@pytest.mark.parametrize(("sparsity", "spread"), [(0.95, 0.08), (0.08, 0.08), (0.5, 0.5), (0.5, -0.01), (0.05, 0.08)])
def test_limits_outside_the_unit_interval_are_refused_whatever_the_ratios(sparsity: float, spread: float) -> None:
    with pytest.raises(UsageError, match=f"OWL: sparsity {sparsity:g} with a spread of {spread:g} lets blocks have"):
        allocate([1.0, 1.0], [1, 1], sparsity, spread)
    with pytest.raises(UsageError, match="Use a spread from 0 to below"):
        check_limits(sparsity, spread)


def test_the_default_spread_fits_the_papers_sparsities() -> None:
    for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9):
        check_limits(sparsity, OWL_SPREAD)
