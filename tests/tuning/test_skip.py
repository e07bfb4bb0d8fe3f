"""Pruned layers that tuning skips: no adapter, not a bit changed, and part of what ties an adapter to its base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.inspection import inspect
from lors_cli.models.size import model_size
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.sparsity import Pattern
from lors_cli.tuning import estimate
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.merge import merge
from lors_cli.tuning.stage import tune

SKIP = ("model.layers.0.*", "*.down_proj")


def is_out(name: str) -> bool:
    return name.startswith("model.layers.0.") or "down_proj" in name


@pytest.mark.parametrize("method", ["lors", "sqft", "spp", "hira", "lora"])
def test_skipped_layers_stay_bit_equal_and_have_no_adapter(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tune"
    config = replace(config, method=method, skip=SKIP, max_steps=2, learning_rate=0.1)  # type: ignore[arg-type]
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    before, after = (load_file(folder / "model.safetensors") for folder in (sparse_checkpoint, out))
    for name, weight in before.items():
        if "_proj" in name:
            assert torch.equal(weight, after[name]) == is_out(name), name
    names = [name.removesuffix(".weight") for name in before if "_proj" in name]
    assert sorted(record.metrics["skipped_layers"]) == sorted(name for name in names if is_out(name))
    adapted = json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]
    assert sorted(adapted) == sorted(name for name in names if not is_out(name))
    assert "skipped: 8 layers get no adapter: model.layers.0." in capsys.readouterr().err
    if method != "lora":
        found = inspect(ModelConfig(path=str(out)))
        assert (len(found["layers"]), found["violations"], found["sparsity"]) == (14, 0, record.metrics["sparsity"])
        merge(str(sparse_checkpoint), out / "adapter", tmp_path / "merged")
        assert (tmp_path / "merged/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_base_whose_skipped_layers_have_other_zeros_is_refused(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    tune(replace(config, skip=SKIP, max_steps=1), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    base = AutoModelForCausalLM.from_pretrained(sparse_checkpoint).requires_grad_(False)
    weight = prunable_weights(base)["model.layers.1.mlp.down_proj"].matrix
    weight[0, 1], weight[0, 0] = 0.0, 1.0
    with pytest.raises(UsageError, match="zeros lie elsewhere"):
        load_adapter(base, tmp_path / "tune/adapter")


def test_the_digest_without_anything_skipped_is_what_it_was(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    whole = tune(replace(config, max_steps=1), model, tmp_path / "whole")
    stored = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert "skipped_modules" not in stored
    assert "skipped_layers" not in whole.metrics
    partly = tune(replace(config, max_steps=1, skip=SKIP), model, tmp_path / "partly")
    assert whole.metrics["base_mask"] == partly.metrics["base_mask"], "the same zeros are in both"
    assert whole.fingerprint != partly.fingerprint


def test_globs_that_leave_nothing_or_match_nothing(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    with pytest.raises(UsageError, match=r"model\.layer\.0\.\* is the name of no layer"):
        tune(replace(config, skip=("model.layer.0.*",)), model, tmp_path / "tune")
    with pytest.raises(UsageError, match="leaves no layer"):
        tune(replace(config, skip=("*",)), model, tmp_path / "tune")


def test_a_model_of_which_pruning_skipped_layers_is_tuned_where_it_is_sparse(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    path = sparse_checkpoint / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoint)
    for name, weight in prunable_weights(model).items():
        if name.endswith("o_proj"):
            weight.matrix[weight.matrix == 0] = 0.01
    model.save_pretrained(sparse_checkpoint)
    config = replace(config, skip=("*.q_proj",), max_steps=1, learning_rate=0.1)
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert len(record.metrics["layers"]) == 12
    assert len(record.metrics["skipped_layers"]) == 2
    before, after = load_file(path), load_file(tmp_path / "tune/model.safetensors")
    same = {name.split(".")[-2] for name in before if "_proj" in name and torch.equal(before[name], after[name])}
    assert same == {"q_proj", "o_proj"}
    pruned = inspect(ModelConfig(path=str(sparse_checkpoint)))
    records.staging_dir(sparse_checkpoint)
    records.publish(sparse_checkpoint, records.StageRecord("prune", "f" * 64, {}, {"path": "p"}, pruned, {}, 1, {}))
    merge(str(sparse_checkpoint), tmp_path / "tune/adapter", tmp_path / "merged")
    merged = inspect(ModelConfig(path=str(tmp_path / "merged")), Pattern.parse("2:4"))
    assert (merged["violations"], merged["dense_layers"]) == (0, pruned["dense_layers"])
    assert "2 linear layers, embeddings and output head are dense" in (tmp_path / "merged/README.md").read_text()


def test_estimates_know_what_is_skipped(sparse_checkpoint: Path, config: TuneConfig) -> None:
    size = model_size(ModelConfig(path=str(sparse_checkpoint)))
    assert size is not None
    some, wide = replace(config, skip=SKIP, rank=16), replace(config, rank=16)
    fewer = sum(16 * (rows + columns) for name, rows, columns, _ in size.layers if is_out(name))
    for optim, state in (("adamw", 8), ("adamw_8bit", 2)):
        needed = [estimate.needs(replace(each, optim=optim, init="kaiming"), size) for each in (wide, some)]  # type: ignore[arg-type]
        assert needed[0].memory - needed[1].memory == (8 + state) * fewer
        assert needed[0].disk - needed[1].disk == 3 * (4 + state) * fewer
    operations = [estimate.operations(each, size, None) for each in (wide, some)]
    assert operations[1] < operations[0]  # type: ignore[operator]
