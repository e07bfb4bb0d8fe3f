"""Stochastic rounding of merged weights: exact on average, fixed by place, nothing where there is no update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lors_cli.recipe.schema import TuneConfig
from lors_cli.tuning.kernels.masked_merge import masked_merge, masked_merge_formula
from lors_cli.tuning.kernels.rounding import PERIOD, Rounding, round_stochastically, thresholds
from lors_cli.tuning.lors import LorsLinear


def hash_by_hand(row: int, column: int) -> int:
    word = 2**32
    mixed = (row % PERIOD * 0x9E3779B1 + column * 0x85EBCA77) % word
    mixed ^= mixed >> 15
    mixed = mixed * 0x2C1B3C6D % word
    mixed ^= mixed >> 12
    mixed = mixed * 0x297A2D39 % word
    mixed ^= mixed >> 15
    return mixed % 65536


def case(rows: int, columns: int, size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    return weight, torch.randn(4, columns, generator=generator), size * torch.randn(rows, 4, generator=generator)


def test_thresholds_are_a_hash_of_row_and_column_and_even() -> None:
    found = thresholds(300, torch.device("cpu"))
    assert found.shape == (PERIOD, 300)
    assert all(int(found[row, column]) == hash_by_hand(row, column) for row in (0, 7, 63) for column in (0, 1, 299))
    shares = torch.histc(found.float(), bins=8, min=0, max=65536) / found.numel()
    assert bool(((shares - 1 / 8).abs() < 0.01).all())


def test_goes_to_a_neighbour_by_the_threshold_of_its_place() -> None:
    for rows in (1, PERIOD, PERIOD + 5):
        exact = torch.linspace(-3, 3, rows * 40).view(rows, 40)
        out = torch.empty(rows, 40, dtype=torch.bfloat16)
        assert round_stochastically(exact.clone(), out) is out
        rounded = out.float()
        table = thresholds(40, torch.device("cpu"))
        for row in range(0, rows, 7):
            for column in range(40):
                low = exact[row, column].view(torch.int32).bitwise_and(0xFFFF)
                down = exact[row, column].view(torch.int32) - low  # the neighbour nearer to zero
                is_up = int(low) + int(table[row % PERIOD, column]) > 0xFFFF
                assert bool(rounded[row, column] == down.view(torch.float32)) != is_up
                assert bool(rounded[row, column] == (down + 0x10000 * is_up).view(torch.float32))


def test_an_update_too_small_for_the_nearest_is_there_on_average() -> None:
    weight, A, B = case(256, 512, 1e-4)
    kept = weight != 0
    meant = (B.bfloat16().float() @ A.bfloat16().float())[kept]
    found = {}
    for rounding in ("nearest", "stochastic"):
        merged = masked_merge(weight, A, B, 1.0, rounding=rounding)  # type: ignore[arg-type]
        assert bool((merged[~kept] == 0).all())
        real = merged.float()[kept] - weight.float()[kept]
        found[rounding] = float(meant @ real / (meant @ meant))  # what of the update is there, along it
    assert found["nearest"] < 0.5
    assert abs(found["stochastic"] - 1) < 0.1


def test_without_an_update_nothing_changes() -> None:
    weight, A, B = case(70, 96, 0.0)
    torch.testing.assert_close(masked_merge(weight, A, B, 4.0, rounding="stochastic"), weight, rtol=0, atol=0)


def test_other_dtypes_are_rounded_to_the_nearest() -> None:
    weight, A, B = case(70, 96, 0.1)
    for dtype in (torch.float32, torch.float16, torch.float64):
        found = [masked_merge(weight.to(dtype), A, B, 1.0, rounding=rounding) for rounding in ("nearest", "stochastic")]  # type: ignore[arg-type]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_base_stays_as_it_is(dtype: torch.dtype, rounding: Rounding) -> None:
    weight, A, B = case(70, 96, 0.1)
    weight = weight.to(dtype)
    before, out = weight.clone(), torch.empty(70, 96, dtype=torch.bfloat16)
    masked_merge(weight, A, B, 1.0, rounding=rounding, out=out)
    assert torch.equal(weight, before)
    assert torch.equal(out, masked_merge_formula(before, A, B, 1.0, torch.bfloat16, rounding))


def test_a_float32_base_stays_as_it_is_under_autocast() -> None:
    linear = nn.Linear(96, 70, bias=False)
    with torch.no_grad():
        linear.weight.copy_(case(70, 96, 0.1)[0])
    layer = LorsLinear(linear, 4, 16)
    layer.rounding = "stochastic"
    nn.init.normal_(layer.lora_B, std=0.1)
    before = layer.weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(3, 96)).sum().backward()
    assert torch.equal(layer.weight, before)


def test_tiles_and_formula_have_the_same_bits() -> None:
    weight, A, B = case(200, 3000, 0.01)  # three tiles
    tiles = masked_merge(weight, A, B, 0.5, rounding="stochastic")
    formula = masked_merge_formula(weight, A, B, 0.5, torch.bfloat16, "stochastic")
    torch.testing.assert_close(tiles, formula, rtol=0, atol=0)
    assert bool((tiles != masked_merge(weight, A, B, 0.5)).any())


def test_a_layer_computes_with_the_weight_that_it_merges() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 70, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    layer = LorsLinear(linear, 4, 8.0)
    layer.rounding = "stochastic"
    nn.init.normal_(layer.lora_B, std=1e-3)
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    merged = layer.merged_weight()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, nn.functional.linear(x, merged), rtol=0, atol=0)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ merged, rtol=0, atol=0)
    torch.testing.assert_close(layer.to_linear().weight, merged, rtol=0, atol=0, check_dtype=True)


def test_lors_rounds_stochastically_unless_told_otherwise() -> None:
    assert TuneConfig().weight_rounding == "stochastic"
    assert TuneConfig(rounding="nearest").weight_rounding == "nearest"
    assert TuneConfig(method="sqft").weight_rounding == "nearest"
    with pytest.raises(ValueError, match="rounding: stochastic is for method: lors"):
        TuneConfig(method="sqft", rounding="stochastic")


def test_a_compiled_layer_has_the_same_bits() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 70, bias=False).bfloat16()
    layer = LorsLinear(linear, 4, 8.0)
    layer.rounding = "stochastic"
    nn.init.normal_(layer.lora_B, std=1e-3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, x2 = (torch.linspace(-1, 1, 288).view(3, 96).bfloat16().requires_grad_() for _ in range(2))
    y, expected = compiled(x), layer(x2)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=0)
