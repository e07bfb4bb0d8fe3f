"""The LoRS operator against autograd of the formula it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lors_cli.errors import UsageError
from lors_cli.tuning.lors import LorsLinear, lors_linear, masked_merge


def _case(
    dtype: torch.dtype = torch.float64, rows: int = 24, columns: int = 16, rank: int = 4
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(rows, columns)
    weight[draw(rows, columns) < 0] = 0
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    return {"x": draw(2, 5, columns).to(dtype), "weight": weight.to(dtype), "bias": draw(rows).to(dtype),
            "lora_A": draw(rank, columns).to(adapter), "lora_B": draw(rows, rank).to(adapter)}  # fmt: skip


def _straight_through(case: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Y of the masked merge whose mask the adapters' gradients do not see, by plain autograd."""
    dense = case["weight"] + scale * case["lora_B"] @ case["lora_A"]
    mask = (case["weight"] != 0).to(dense.dtype)
    merged = dense * mask
    # value: the masked merge; gradient to the adapters: as if nothing were masked
    through = dense - dense.detach() + merged.detach()
    return F.linear(case["x"], through, case["bias"])


def test_forward_and_gradients_equal_autograd_of_the_unfused_formula() -> None:
    case, scale = _case(), 1.7
    leaves = ("x", "lora_A", "lora_B", "bias")
    upstream = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    ours = {key: case[key].clone().requires_grad_(key in leaves) for key in case}
    y = lors_linear(*(ours[key] for key in ("x", "weight", "bias", "lora_A", "lora_B")), scale)
    (y * upstream).sum().backward()

    theirs = {key: case[key].clone().requires_grad_(key in leaves) for key in case}
    expected = _straight_through(theirs, scale)
    (expected * upstream).sum().backward()

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for key in leaves:
        torch.testing.assert_close(ours[key].grad, theirs[key].grad, rtol=1e-11, atol=1e-11)
    assert ours["weight"].grad is None


def test_adapter_gradients_are_those_of_plain_lora_around_the_same_dy() -> None:
    case, scale = _case(), 0.5
    ours = {key: case[key].clone().requires_grad_(key.startswith("lora")) for key in case}
    upstream = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = lors_linear(*(ours[key] for key in ("x", "weight", "bias", "lora_A", "lora_B")), scale)
    y.backward(upstream)
    A, B = (case[key].clone().requires_grad_() for key in ("lora_A", "lora_B"))
    lora = F.linear(case["x"], case["weight"]) + scale * (case["x"] @ A.T) @ B.T
    lora.backward(upstream)
    torch.testing.assert_close(ours["lora_A"].grad, A.grad)
    torch.testing.assert_close(ours["lora_B"].grad, B.grad)


def test_saved_for_backward_is_the_input_and_nothing_else() -> None:
    case = _case(torch.float32, rows=64, columns=32)
    linear = nn.Linear(32, 64)
    linear.weight.data.copy_(case["weight"])
    layer = LorsLinear(linear, rank=4, alpha=8)
    x = case["x"].clone().requires_grad_()
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum().backward()
    extra = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
    assert sum(tensor.numel() * tensor.element_size() for tensor in extra) == x.numel() * x.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 700])
@pytest.mark.parametrize("tiles", [False, True])
def test_merge_rounds_once_from_the_exact_sum(
    dtype: torch.dtype, rows: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles:
        monkeypatch.setattr("lors_cli.tuning.kernels.masked_merge._addmm_rounds_once", lambda *_: False)
    case = _case(dtype, rows=rows, columns=48)
    merged = masked_merge(case["weight"], case["lora_A"], case["lora_B"], 0.25)
    A, B = (case[key].to(dtype).double() for key in ("lora_A", "lora_B"))
    exact = case["weight"].double() + 0.25 * (B @ A)
    exact[case["weight"] == 0] = 0
    assert merged.dtype == dtype
    assert bool((merged[case["weight"] == 0] == 0).all())
    # one rounding: within half a unit in the last place of the exact value (plus float32's own error)
    limit = exact.abs() * (torch.finfo(dtype).eps / 2 * 1.01 + 1e-6 * (dtype != torch.float64)) + 1e-6
    assert bool(((merged.double() - exact).abs() <= limit).all())


def test_merge_by_tiles_equals_merge_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lors_cli.tuning.kernels.masked_merge._addmm_rounds_once", lambda *_: False)
    case = _case(torch.bfloat16, rows=100, columns=64)
    at_once = masked_merge(case["weight"], case["lora_A"], case["lora_B"], 2.0)
    monkeypatch.setattr("lors_cli.tuning.kernels.on_grid.TILE_ELEMENTS", 64 * 17)
    torch.testing.assert_close(
        masked_merge(case["weight"], case["lora_A"], case["lora_B"], 2.0), at_once, rtol=0, atol=0
    )


def test_the_mask_is_the_weights_own_where_a_narrower_result_would_lose_it() -> None:
    weight = torch.tensor([[1e-9, 0.0]])
    merged = torch.empty(1, 2, dtype=torch.float16)
    masked_merge(weight, torch.ones(1, 2), torch.ones(1, 1), 2.0, out=merged)
    assert merged.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_linear_gives_the_same_outputs_bit_for_bit(dtype: torch.dtype) -> None:
    case = _case(dtype, rows=64, columns=32)
    linear = nn.Linear(32, 64).to(dtype)
    linear.weight.data.copy_(case["weight"])
    layer = LorsLinear(linear, rank=4, alpha=16)
    layer.lora_B.data.normal_()
    assert torch.equal(layer(case["x"]), layer.to_linear()(case["x"]))


def test_a_new_layer_computes_what_the_linear_did() -> None:
    linear = nn.Linear(32, 64, bias=False)
    x = torch.randn(7, 32)
    expected = linear(x)
    layer = LorsLinear(linear, rank=4, alpha=16)
    assert torch.equal(layer(x), expected)
    assert layer.weight is linear.weight
    assert not layer.weight.requires_grad


def test_scale_is_alpha_over_the_root_of_the_rank_by_default() -> None:
    linear = nn.Linear(8, 8)
    assert math.isclose(LorsLinear(linear, 16, 16).scale, 4.0)
    assert math.isclose(LorsLinear(linear, 16, 16, use_rslora=False).scale, 1.0)


def test_adapters_stay_float32_around_a_bfloat16_weight() -> None:
    layer = LorsLinear(nn.Linear(32, 64).bfloat16(), rank=4, alpha=16)
    layer.lora_B.data.normal_()
    layer(torch.randn(3, 32, dtype=torch.bfloat16)).float().sum().backward()
    for adapter in (layer.lora_A, layer.lora_B):
        assert adapter.dtype == torch.float32
        assert adapter.grad is not None
        assert adapter.grad.dtype == torch.float32


def test_non_contiguous_inputs_and_any_leading_shape() -> None:
    case = _case()
    wide = torch.randn(16, 3, 2, 5, dtype=torch.float64)
    x = wide.permute(3, 1, 2, 0)
    y = lors_linear(x, case["weight"], None, case["lora_A"], case["lora_B"], 1.0)
    merged = masked_merge(case["weight"], case["lora_A"], case["lora_B"], 1.0)
    torch.testing.assert_close(y, x @ merged.T)


def test_autocast_chooses_the_dtype_of_products_and_gradients_stay_in_the_parameters_own() -> None:
    layer = LorsLinear(nn.Linear(32, 64), rank=4, alpha=16)
    layer.lora_B.data.normal_()
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        plain = layer.to_linear()(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.merged_weight().sum(0).expand_as(x), rtol=0.05, atol=0.05)


def test_a_weight_that_wants_a_gradient_is_refused() -> None:
    case = _case()
    with pytest.raises(UsageError, match="must not require"):
        lors_linear(case["x"], case["weight"].requires_grad_(), None, case["lora_A"], case["lora_B"], 1.0)


def test_gradient_of_the_input_uses_the_masked_weight() -> None:
    case = _case()
    x = case["x"].clone().requires_grad_()
    y = lors_linear(x, case["weight"], None, case["lora_A"], case["lora_B"], 3.0)
    y.sum().backward()
    merged = masked_merge(case["weight"], case["lora_A"], case["lora_B"], 3.0)
    torch.testing.assert_close(x.grad, merged.sum(0).expand_as(x))
