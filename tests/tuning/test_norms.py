"""Trained norms: float32 shifts beside frozen parameters, on disk with the adapter, merged without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.norms import merge_norms, norm_parameters, norm_shifts, train_norms
from lors_cli.tuning.stage import tune

IDS = torch.arange(40).reshape(2, 20)


def test_norms_are_found_by_what_they_own(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    assert norm_parameters(sparse_llama()) == [
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight", "model.norm.weight",
    ]  # fmt: skip
    config = OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
                       max_position_embeddings=32, word_embed_proj_dim=16)  # fmt: skip
    names = norm_parameters(AutoModelForCausalLM.from_config(config))
    assert len(names) == 6
    assert all("layer_norm" in name for name in names)


def test_a_shift_starts_at_nothing_and_its_gradient_is_that_of_the_parameter_in_its_unit(
    sparse_llama: Callable[..., PreTrainedModel],
) -> None:
    plain, trained = sparse_llama(torch.float64), sparse_llama(torch.float64)
    names = norm_parameters(plain)
    units = {}
    for index, name in enumerate(names):
        for model in (plain, trained):
            model.get_parameter(name).mul_(0.1 * (index + 1))
        units[name] = float(plain.get_parameter(name).square().mean().sqrt())
    train_norms(trained, names)
    assert torch.equal(plain(IDS).logits, trained(IDS).logits)
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    plain(IDS, labels=IDS).loss.backward()
    trained(IDS, labels=IDS).loss.backward()
    for name, shift in norm_shifts(trained).items():
        torch.testing.assert_close(shift.grad, units[name] * plain.get_parameter(name).grad)
    assert [name for name, parameter in trained.named_parameters() if parameter.requires_grad] == [
        f"{name.rpartition('.')[0]}.parametrizations.weight.0.shift" for name in names
    ]


def test_small_steps_add_up_in_a_bfloat16_model(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = sparse_llama(torch.bfloat16)
    train_norms(model, ["model.norm.weight"])
    (shift,) = norm_shifts(model).values()
    before = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        for _ in range(100):
            shift.add_(1e-3)  # a quarter of a bfloat16 step at 1
    assert shift.dtype == torch.float32
    torch.testing.assert_close(model.model.norm.weight.float(), before.float() + 0.1, rtol=0, atol=4e-3)


def test_merged_norms_are_ordinary_parameters_with_the_same_logits(
    sparse_llama: Callable[..., PreTrainedModel],
) -> None:
    model = sparse_llama(torch.bfloat16)
    names, classes = list(dict(model.named_parameters())), [type(module) for module in model.modules()]
    train_norms(model, norm_parameters(model))
    with torch.no_grad():
        for shift in norm_shifts(model).values():
            shift.normal_(std=0.1)
    expected = model(IDS).logits
    merge_norms(model)
    assert norm_shifts(model) == {}
    assert list(dict(model.named_parameters())) == names
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("method", ["lors", "spp"])
def test_tuning_trains_norms_saves_and_merges_them(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, method: str
) -> None:
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    config = replace(config, method=method, train_norms=True, init="kaiming")  # type: ignore[arg-type]
    tune(config, model, out)
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (sparse_checkpoint, out))
    moved = [
        name for name in norm_parameters(base) if not torch.equal(base.get_parameter(name), tuned.get_parameter(name))
    ]
    assert moved == norm_parameters(base)
    assert tuned.get_parameter("model.norm.weight").dtype == torch.bfloat16
    content = json.loads((out / "adapter/adapter_config.json").read_text())
    assert content["trained_norms"] == norm_parameters(base)
    if method == "lors":  # SPP merges to rounding only
        adapted = load_adapter(base.requires_grad_(False), out / "adapter")
        assert torch.equal(adapted(IDS).logits, tuned(IDS).logits)


def test_norms_learn_at_their_own_rate(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    config = replace(config, init="kaiming", max_steps=1, learning_rate=1e-4, max_grad_norm=0, train_norms=True,
                     norms_lr_ratio=8.0, weight_decay=0.5)  # fmt: skip
    tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    tensors = load_file(tmp_path / "tune/adapter/adapter_model.safetensors")
    shifts = torch.cat([value for name, value in tensors.items() if name.endswith(".shift")])
    # AdamW's first step moves each entry by the learning rate, whatever the gradient's size
    assert float(shifts.abs().max()) == pytest.approx(8e-4, rel=1e-2)


def test_an_adapter_with_norms_that_the_model_lacks_is_refused(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    tune(replace(config, train_norms=True, max_steps=1), ModelConfig(path=str(sparse_checkpoint)), out)
    path = out / "adapter/adapter_config.json"
    content = json.loads(path.read_text())
    content["trained_norms"].append("model.layers.7.input_layernorm.weight")
    path.write_text(json.dumps(content))
    base = AutoModelForCausalLM.from_pretrained(sparse_checkpoint).requires_grad_(False)
    with pytest.raises(UsageError, match="another model"):
        load_adapter(base, out / "adapter")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="PEFT"):
        TuneConfig(method="lora", train_norms=True)
    with pytest.raises(ValueError, match="train_norms: true"):
        TuneConfig(norms_lr_ratio=2.0)
