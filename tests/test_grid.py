"""Grids of few bits against plain loops."""

from __future__ import annotations

import pytest
import torch

from lors_cli.grid import SHRINKS, GridSpec, fit_grid


def nearest(value: float, scale: float, zero: int, num_codes: int) -> float:
    """The value on a grid that is nearest, by looking at all."""
    return min((scale * (code - zero) for code in range(num_codes)), key=lambda point: abs(point - value))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (80, 32), (24, 128)])
def test_a_weight_goes_to_the_nearest_point_of_its_groups_grid(symmetric: bool, columns: int, group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, columns)
    grid = fit_grid(weight, torch.rand(3, columns) < 0.5, GridSpec(4, group_size, symmetric))
    rounded = grid.rounded(weight)
    for row in range(3):
        for column in range(columns):
            group = column // group_size
            zero = 8 if grid.zeros is None else int(grid.zeros[row, group])
            expected = nearest(float(weight[row, column]), float(grid.scales[row, group]), zero, 16)
            assert float(rounded[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_found_again_from_values(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(64, 96) * torch.rand(64, 1) * 0.1).to(dtype)
    grid = fit_grid(weight, weight != 0, GridSpec(bits, 32, symmetric))
    codes = torch.arange(1 << bits).repeat(64, 96 // 16 + 1)[:, :96].byte()
    assert grid.codes(grid.values(codes)).equal(codes)


def test_a_slice_of_columns_is_rounded_by_its_own_groups() -> None:
    torch.manual_seed(2)
    weight = torch.randn(5, 100)
    grid = fit_grid(weight, weight > 0, GridSpec(4, 32, symmetric=False))
    assert grid.rounded(weight[:, 30:71], first=30).equal(grid.rounded(weight)[:, 30:71])


def test_what_is_pruned_has_no_say_and_important_inputs_have_more() -> None:
    torch.manual_seed(3)
    weight, mask = torch.randn(4, 64), torch.rand(4, 64) < 0.5
    outlier = torch.where(mask, weight, 1000.0)
    spec = GridSpec(4, 64)
    assert fit_grid(outlier, mask, spec).scales.equal(fit_grid(weight, mask, spec).scales)
    importance = torch.rand(64) ** 8
    errors = [((fit_grid(weight, mask, spec, importance=counts).rounded(weight) - weight)[mask]).square()
              * importance.expand(4, 64)[mask] for counts in (importance, None)]  # fmt: skip
    assert errors[0].sum() < errors[1].sum()


def test_the_best_of_the_scales_is_taken() -> None:
    torch.manual_seed(4)
    weight = torch.randn(6, 32)
    grid = fit_grid(weight, torch.ones_like(weight, dtype=torch.bool), GridSpec(4, 32))
    error = (grid.rounded(weight) - weight).square().sum(1)
    for number in range(SHRINKS):
        scale = weight.abs().amax(1, keepdim=True) / 7 * (1 - 0.4 * number / (SHRINKS - 1))
        tried = ((weight / scale).round().clamp(-8, 7) * scale - weight).square().sum(1)
        assert bool((error <= tried * (1 + 1e-4)).all())


def test_a_group_of_nothing_has_a_scale_that_divides() -> None:
    weight = torch.zeros(2, 32)
    for symmetric in (True, False):
        grid = fit_grid(weight, weight != 0, GridSpec(4, 32, symmetric))
        assert grid.rounded(weight).equal(weight)
