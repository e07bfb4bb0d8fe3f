"""A packed base: that no plain weight is held, and that tuning on it gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.lors import LorsLinear, PackedLorsLinear
from lors_cli.tuning.stage import stage_fingerprint, tune


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """2:4, some groups with fewer than two non-zeros, every pair of positions among them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    dropped = torch.rand(weight.shape, generator=generator).argsort(-1)[..., :2]
    weight.scatter_(2, dropped, 0.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    return weight.view(rows, columns).to(dtype)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_gives_the_same_bits_and_holds_no_plain_weight(dtype: torch.dtype, pattern: str) -> None:
    results = []
    for layer_class in (LorsLinear, PackedLorsLinear):
        torch.manual_seed(1)
        linear = nn.Linear(64, 48).to(dtype)
        linear.weight.data.copy_(_weight(48, 64, dtype))
        if pattern == "unstructured":
            linear.weight.data[:, :3] = torch.tensor([1.0, 0.0, 2.0])
            linear.weight.data[1, :8] = 3.0
        layer = layer_class(linear, 4, 4.0)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(3, 5, 64).to(dtype).requires_grad_(True)
        layer(x).square().sum().backward()
        assert x.grad is not None
        results.append([layer(x), x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.merged_weight(), layer.weight])
    for plain, small in zip(*results, strict=True):
        torch.testing.assert_close(small, plain, rtol=0, atol=0)
    assert {name for name, _ in layer.named_parameters()} == {"bias", "lora_A", "lora_B"}
    assert all(buffer.numel() <= 48 * 32 + 80 for buffer in layer.buffers())


def test_tuning_on_it_writes_the_same_files(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    small = replace(config, base="packed", merged_cache="off")
    tune(config, model, tmp_path / "plain")
    tune(small, model, tmp_path / "small")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert stage_fingerprint(config, "m", None) == stage_fingerprint(small, "m", None)


def test_other_methods_are_refused(config: TuneConfig) -> None:
    with pytest.raises(ValueError, match="base: packed is for method: lors"):
        replace(config, method="sqft", init="kaiming", base="packed")
