"""Merged weights on a grid: the same bits by loops, by torch, in C, packed, and as a formula for compilers."""

from __future__ import annotations

import random

import pytest
import torch
from on_grids import SPECS, by_numbers, linear_on_a_grid, on_a_grid
from packed_cases import merged

from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.format import Packed, pack
from lors_cli.tuning.kernels import masked_merge as merging
from lors_cli.tuning.kernels.c_merge import masked_merge_in_c, why_not_in_c
from lors_cli.tuning.kernels.masked_merge import how_merged, masked_merge, masked_merge_formula
from lors_cli.tuning.kernels.on_grid import lies_on, round_to_grid
from lors_cli.tuning.kernels.rounding import PERIOD, Rounding

ROUNDINGS: list[Rounding] = ["nearest", "stochastic"]
DTYPES = [torch.bfloat16, torch.float32]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("kernels_of_the_module")


def case(
    dice: random.Random, rows: int, columns: int, rank: int, dtype: torch.dtype, spec: GridSpec
) -> tuple[torch.Tensor, Grid, torch.Tensor, torch.Tensor]:
    """W on a grid, with zeros of both signs, the grid, and adapters whose products are a few of its steps."""
    torch.manual_seed(dice.randrange(1 << 30))
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < 0.5] = 0.0
    weight, grid = on_a_grid(weight.to(dtype), spec)
    weight[(weight == 0) & (torch.rand(rows, columns) < 0.3)] = -0.0
    return weight, grid, torch.randn(rank, columns).to(dtype), (torch.randn(rows, rank) * 0.3).to(dtype)


def expected_of(
    weight: torch.Tensor, grid: Grid, A: torch.Tensor, B: torch.Tensor, scale: float, rounding: Rounding
) -> torch.Tensor:
    A, B = (A.float(), B.float() * scale) if len(A) == 1 else (A.float() * scale, B.float())
    return by_numbers(merged(weight.float(), A, B, None), weight, grid, rounding)


def assert_same(found: torch.Tensor, expected: torch.Tensor, about: object = None) -> None:
    kind = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    wrong = found.contiguous().view(kind) != expected.contiguous().view(kind)
    assert not wrong.any(), f"{about}: {int(wrong.sum())} of {wrong.numel()} differ"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_rank_in_c_against_numbers(target: str, dtype: torch.dtype, rounding: Rounding) -> None:
    dice = random.Random(1)
    for _ in range(9):
        rows, columns, rank = dice.randint(1, 90), dice.randint(1, 300), dice.choice([1, 2, dice.randint(3, 40)])
        weight, grid, A, B = case(dice, rows, columns, rank, dtype, dice.choice(SPECS))
        scale = dice.choice([0.25, 1.0, 0.3, -1.7])
        expected = expected_of(weight, grid, A, B, scale, rounding)
        for base in (weight, pack(weight), pack(weight, None, grid)):
            out = torch.full_like(weight, 7)
            found = masked_merge_in_c(base, A, B, scale, out, target, grid=grid, rounding=rounding)
            assert_same(found, expected, (rows, columns, rank, scale, grid.spec, type(base)))
        assert lies_on(found, grid)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_the_formula_round_the_same_sums_alike(
    dtype: torch.dtype, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sums that are exact in float32, so that their order does not matter."""
    torch.manual_seed(2)
    for spec in SPECS:
        weight = torch.randint(-8, 9, (PERIOD * 2 + 9, 200)) / 8.0
        weight, grid = on_a_grid(torch.where(torch.rand(weight.shape) < 0.5, 0, weight).to(dtype), spec)
        A, B = torch.randint(-1, 2, (5, 200)) / 8, torch.randint(-3, 4, (len(weight), 5)) / 8
        expected = by_numbers(weight.float() + 0.5 * B @ A, weight, grid, rounding)
        assert_same(masked_merge(weight, A, B, 0.5, rounding=rounding, grid=grid), expected, spec)
        formula = masked_merge_formula(weight, A, B, 0.5, dtype, rounding, grid)
        assert_same(formula + 0.0, expected, spec)
        with monkeypatch.context() as patch:
            patch.setattr(merging, "why_not_in_c", lambda *_: "of the test")
            patch.setattr("lors_cli.tuning.kernels.on_grid.TILE_ELEMENTS", 200 * 64)
            for base in (weight, pack(weight), pack(weight, None, grid)):
                assert_same(masked_merge(base, A, B, 0.5, rounding=rounding, grid=grid) + 0.0, expected, spec)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("spec", SPECS)
def test_without_an_update_every_weight_stays(rounding: Rounding, spec: GridSpec) -> None:
    for dtype in DTYPES:
        weight, grid, A, B = case(random.Random(3), 70, 200, 4, dtype, spec)
        assert torch.equal(masked_merge(weight, A, torch.zeros_like(B), 1.0, rounding=rounding, grid=grid), weight)


def test_thresholds_keep_an_update_on_average_and_the_nearest_loses_it() -> None:
    linear, grid = linear_on_a_grid(256, 256, torch.bfloat16, GridSpec(4, 128))
    weight, kept = linear.weight.detach(), linear.weight != 0
    step = grid.scales.float().repeat_interleave(128, 1)
    inside = kept & ((weight / step).abs() < 6)  # the others may be cut off
    for share in (0.1, -0.3):
        total = weight.float() + share * step
        moved = {rounding: (round_to_grid(total, weight, grid, rounding).float() - weight.float()) / step
                 for rounding in ROUNDINGS}  # fmt: skip
        assert moved["stochastic"][inside].mean().item() == pytest.approx(share, abs=0.01)
        assert bool((moved["nearest"][inside].abs() < 0.1).all())


def test_codes_in_place_of_values_give_the_same_bits_into_any_dtype() -> None:
    weight, grid, A, B = case(random.Random(5), 70, 96, 6, torch.float32, SPECS[0])
    expected = masked_merge(weight, A, B, 0.5, rounding="stochastic", grid=grid)
    packed = pack(weight, None, grid)
    assert_same(masked_merge(packed, A, B, 0.5, rounding="stochastic", grid=grid), expected)
    half = torch.empty(weight.shape, dtype=torch.bfloat16)
    masked_merge(packed, A, B, 0.5, rounding="stochastic", grid=grid, out=half)
    assert torch.equal(half, expected.bfloat16())
    leaving = masked_merge(packed, A, B, 0.5)
    assert torch.equal(leaving, masked_merge(weight, A, B, 0.5))
    assert not lies_on(leaving, grid)
    assert isinstance(packed, Packed)
    assert packed.values.dtype == torch.uint8


@pytest.mark.parametrize("spec", SPECS)
def test_a_float_merge_of_codes_is_that_of_their_values(target: str, spec: GridSpec) -> None:
    dice = random.Random(9)
    for dtype in DTYPES:
        for columns, rank in ((2110, 40), (33, 3), (1024, 1)):
            weight, grid, A, B = case(dice, 37, columns, rank, dtype, spec)
            expected = masked_merge_in_c(weight, A, B, 0.5, torch.empty_like(weight), target)
            found = masked_merge_in_c(pack(weight, None, grid), A, B, 0.5, torch.full_like(weight, 7), target)
            assert_same(found, expected, (dtype, columns, rank))
            expected = masked_merge_in_c(weight, A, B, 0.5, torch.empty_like(weight), target, grid=grid)
            found = masked_merge_in_c(
                pack(weight, None, grid), A, B, 0.5, torch.full_like(weight, 7), target, grid=grid
            )
            assert_same(found, expected, (dtype, columns, rank))


def test_a_sum_that_is_no_number_stays_so_in_c_and_one_beyond_the_grid_is_cut(target: str) -> None:
    weight, grid, A, B = case(random.Random(6), 16, 64, 2, torch.float32, SPECS[0])
    weight[0, 0], weight[1, 1] = weight[weight != 0][0], weight[weight != 0][1]
    A[:, 0], A[:, 1] = float("nan"), 1e30
    B[1] = 1.0
    for rounding in ROUNDINGS:
        found = masked_merge_in_c(weight, A, B, 1.0, torch.empty_like(weight), target, grid=grid, rounding=rounding)
        assert torch.equal(found[:, 0].isnan(), weight[:, 0] != 0)
        assert found[1, 1] == grid.scales[1, 0] * 7


def test_how_it_is_merged_is_said() -> None:
    _, grid = linear_on_a_grid(4, 64, torch.bfloat16)
    assert why_not_in_c(CPU, torch.bfloat16, "nearest", 4, grid) == ""
    odd = Grid(GridSpec(4, 48), grid.scales)
    why = "there is none for symmetric grids of 4 bits in groups of 48"
    assert why_not_in_c(CPU, torch.bfloat16, "nearest", 4, odd) == why
    assert (
        how_merged(CPU, torch.bfloat16, "nearest", 4, odd) == f"float32 tiles, rounded to the grid (no C kernel: {why})"
    )
    assert how_merged(CPU, torch.bfloat16, "nearest", 4, grid).startswith("one pass in C")
