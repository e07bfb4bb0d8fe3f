"""Tuning where not all that is sparse can be adapted: experts stay as they are, a model of Conv1D is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from lors_cli.errors import UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.inspection import inspect
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.attach import adapter_layers, attach, base_mask
from lors_cli.tuning.head import causal_lm_loss, model_loss, why_not_chunked
from lors_cli.tuning.merge import merge
from lors_cli.tuning.stage import tune

SIZES = {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 257, "bos_token_id": 256,
    "eos_token_id": 257, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Mixtral": (MixtralConfig, {"intermediate_size": 48, "num_local_experts": 4}),
    "Qwen2-MoE": (Qwen2MoeConfig, {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
                                   "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "GPT-2": (GPT2Config, {"num_key_value_heads": None, "num_experts_per_tok": None}),
}  # fmt: skip
NUM_EXPERT_WEIGHTS = {"Mixtral": 16, "Qwen2-MoE": 8}
Make = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: Any) -> Make:
    """Saves a random model of a family with every prunable weight 2:4."""

    def sparse(name: str) -> Path:
        config_class, changes = CONFIGS[name]
        torch.manual_seed(0)
        settings = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
        model = AutoModelForCausalLM.from_config(config_class(**settings))
        for weight in prunable_weights(model).values():
            weight.matrix[:, 0::4] = 0
            weight.matrix[:, 3::4] = 0
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return sparse


@pytest.fixture
def config(instructions: Path) -> TuneConfig:
    return TuneConfig(
        rank=4, alpha=4.0, learning_rate=5e-2, max_steps=6, batch_size=4, per_device_batch_size=2, init_samples=4,
        data=TuneDataConfig(dataset=str(instructions), max_length=320),
    )  # fmt: skip


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


@pytest.mark.parametrize("name", NUM_EXPERT_WEIGHTS)
def test_linears_are_tuned_and_experts_stay(
    name: str, make: Make, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(console, "info", heard.append)
    base, out = make(name), tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(base)), out)

    expected = f"{NUM_EXPERT_WEIGHTS[name]} pruned weights stay as they are, first model.layers.0.mlp.experts.0.gate_up"
    assert len([message for message in heard if expected in message]) == 1
    assert record.metrics["last_loss"] < record.metrics["first_loss"]
    before, after = prunable_weights(load(base)), prunable_weights(load(out))
    for full_name, weight in before.items():
        assert bool((after[full_name].matrix[weight.matrix == 0] == 0).all()), full_name
        is_same = torch.equal(after[full_name].matrix, weight.matrix)
        assert is_same == ("experts" in full_name), full_name
    assert {layer["name"] for layer in record.metrics["layers"]} == set(before)
    found = inspect(ModelConfig(path=str(out)))
    assert (found["pattern"], found["violations"], len(found["layers"])) == ("2:4", 0, len(before))
    adapted = json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert set(adapted) == {full_name for full_name in before if "experts" not in full_name}


def test_routers_and_everything_else_stay_dense_and_unchanged(make: Make, config: TuneConfig, tmp_path: Path) -> None:
    base, out = make("Qwen2-MoE"), tmp_path / "tune"
    tune(replace(config, max_steps=2), ModelConfig(path=str(base)), out)
    before, after = load(base).state_dict(), load(out).state_dict()
    assert before.keys() == after.keys()
    for key in before:
        if "gate." in key or "norm" in key or "embed" in key or "experts." in key:
            assert torch.equal(before[key], after[key]), key


def test_a_loss_that_balances_routers_is_left_out(make: Callable[..., Path]) -> None:
    """It is a batch's and not a label's: the loss of a step would depend on how the step is cut."""
    network = load(make("Mixtral"))
    ids = torch.arange(24).view(2, 12) % 200
    batch = {"input_ids": ids, "labels": ids}
    losses = []
    for network.config.output_router_logits in (False, True):
        assert why_not_chunked(network, batch) == ""
        losses.append(float(model_loss(network, batch, torch.tensor(22.0)).detach()))
    assert losses[0] == losses[1] == pytest.approx(float(causal_lm_loss(network, batch).detach()), rel=1e-5)


def test_a_saved_adapter_merges_to_the_same_and_only_where_the_experts_zeros_are_the_same(
    make: Make, config: TuneConfig, tmp_path: Path
) -> None:
    base, out = make("Mixtral"), tmp_path / "tune"
    tune(replace(config, max_steps=2), ModelConfig(path=str(base)), out)
    merge(str(base), out / "adapter", tmp_path / "merged")
    tuned, merged = load(out).state_dict(), load(tmp_path / "merged").state_dict()
    assert all(torch.equal(tuned[key], merged[key]) for key in tuned)
    other = load(base)
    matrix = prunable_weights(other)["model.layers.1.mlp.experts.2.down_proj"].matrix
    matrix[0, 0], matrix[0, 1] = 1.0, 0.0
    with pytest.raises(UsageError, match="zeros lie elsewhere"):
        load_adapter(other, out / "adapter")


def test_the_mask_of_a_model_of_linears_is_that_of_its_adapted_layers(
    make: Make, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    for model in (sparse_llama(), load(make("Mixtral"))):
        names = [name for name in prunable_weights(model) if "experts" not in name]
        before = base_mask(model, {name: model.get_submodule(name) for name in names})
        attach(model, names, 4, 8.0, use_rslora=True)
        assert base_mask(model, adapter_layers(model)) == before


def test_a_model_without_sparse_linears_is_refused(make: Make, config: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nn\.Linear only.* transformer\.h\.0\.attn\.c_attn is a weight of Conv1D"):
        tune(config, ModelConfig(path=str(make("GPT-2"))), tmp_path / "tune")
    assert not (tmp_path / "tune").exists()
