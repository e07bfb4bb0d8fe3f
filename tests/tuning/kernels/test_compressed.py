"""A compressed 2:4 base: what it stores, that nothing is lost, and that tuning on it gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lors_cli.errors import UsageError
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.attach import attach
from lors_cli.tuning.kernels import compressed
from lors_cli.tuning.kernels.compressed import compress, decompress
from lors_cli.tuning.lors import CompressedLorsLinear, LorsLinear
from lors_cli.tuning.stage import stage_fingerprint, tune


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """2:4, some groups with fewer than two non-zeros, every pair of positions among them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    dropped = torch.rand(weight.shape, generator=generator).argsort(-1)[..., :2]
    weight.scatter_(2, dropped, 0.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    return weight.view(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [4, 12, 64])
def test_every_value_and_zero_comes_back(dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "TILE_ELEMENTS", 7 * columns)
    weight = _weight(50, columns, dtype)
    small = compress(weight)
    torch.testing.assert_close(decompress(small), weight, rtol=0, atol=0)
    assert small.values.shape == (50, columns // 2)
    out = torch.full_like(weight, float("nan"))
    assert decompress(small, out=out) is out
    torch.testing.assert_close(out, weight, rtol=0, atol=0)


def test_it_takes_nine_sixteenths_of_the_memory_in_bfloat16() -> None:
    weight = _weight(32, 64)
    small = compress(weight)
    assert (small.values.nbytes + small.positions.nbytes) * 16 == weight.numel() * 2 * 9


def test_another_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="more than two"):
        compress(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    with pytest.raises(ValueError, match="6 inputs"):
        compress(torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_gives_the_same_bits_and_holds_no_plain_weight(dtype: torch.dtype) -> None:
    results = []
    for layer_class in (LorsLinear, CompressedLorsLinear):
        torch.manual_seed(1)
        linear = nn.Linear(64, 48).to(dtype)
        linear.weight.data.copy_(_weight(48, 64, dtype))
        layer = layer_class(linear, 4, 4.0)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(3, 5, 64).to(dtype).requires_grad_(True)
        layer(x).square().sum().backward()
        assert x.grad is not None
        results.append([layer(x), x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.merged_weight(), layer.weight])
    for plain, small in zip(*results, strict=True):
        torch.testing.assert_close(small, plain, rtol=0, atol=0)
    assert {name for name, _ in layer.named_parameters()} == {"bias", "lora_A", "lora_B"}
    assert all(buffer.numel() <= 48 * 32 for buffer in layer.buffers())


def test_a_model_of_another_pattern_is_refused_by_its_layers_name() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(UsageError, match=r"base: compressed is for 2:4 weights, and that of 0 is none"):
        attach(model, ["0"], 2, 2.0, use_rslora=True, compressed=True)


def test_tuning_on_it_writes_the_same_files(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    small = replace(config, base="compressed", merged_cache="off")
    tune(config, model, tmp_path / "plain")
    tune(small, model, tmp_path / "small")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert stage_fingerprint(config, "m", None) == stage_fingerprint(small, "m", None)


def test_other_methods_are_refused(config: TuneConfig) -> None:
    with pytest.raises(ValueError, match="base: compressed is for method: lors"):
        replace(config, method="sqft", init="kaiming", base="compressed")
