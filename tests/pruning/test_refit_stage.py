"""`refit: true` through the whole stage, and what else solves for kept weights, on grids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lors_cli.grid import GridSpec, fit_grid
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.grids import load_grids
from lors_cli.pruning.methods import statistics_kind
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig, QuantizeConfig
from lors_cli.sparsity import Pattern, keep_largest


def test_refit_changes_the_kept_weights_and_not_the_first_blocks_mask(
    checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    plain = PruneConfig(method="magnitude", calibration=CalibrationConfig(dataset=str(token_file)))
    refitted = replace(plain, refit=True)
    assert (statistics_kind(plain), statistics_kind(refitted)) == ("none", "hessian")
    records = [
        prune(config, ModelConfig(path=str(checkpoint)), tmp_path / str(config.refit)) for config in (plain, refitted)
    ]
    assert records[0].fingerprint != records[1].fingerprint
    assert all(record.metrics["violations"] == 0 for record in records)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("False", "True")]
    before, after = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "admm"},
        {"method": "admm", "pattern": "unstructured", "sparsity": 0.5},
        {"method": "wanda", "refit": True},
        {"method": "magnitude", "refit": True, "channel_permutation": True},
        {"method": "sparsegpt", "reconstruct_epochs": 2},
        {"method": "wanda", "refit": True, "reconstruct_epochs": 1, "skip": ("*.o_proj",)},
    ],
)
@pytest.mark.parametrize("quantize", [QuantizeConfig(group_size=32), QuantizeConfig(group_size=32, symmetric=False)])
def test_what_solves_for_kept_weights_leaves_them_on_grids(
    settings: dict[str, Any], quantize: QuantizeConfig, checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    calibration = CalibrationConfig(dataset=str(token_file), batch_size=4)
    model = ModelConfig(path=str(checkpoint), dtype="bfloat16")
    record = prune(PruneConfig(calibration=calibration, quantize=quantize, **settings), model, tmp_path)
    tensors, grids = load_file(tmp_path / "model.safetensors"), load_grids(tmp_path)
    assert grids.keys() == {layer["name"] for layer in record.metrics["layers"]}
    for name, grid in grids.items():
        weight = tensors[f"{name}.weight"]
        assert weight.dtype == grid.scales.dtype == torch.bfloat16
        assert grid.values(grid.codes(weight)).equal(weight)
    assert record.metrics["violations"] == 0
    assert record.metrics["sparsity"] >= 0.5


@pytest.mark.parametrize("settings", [{"method": "admm"}, {"method": "wanda", "refit": True}])
def test_an_expert_without_tokens_is_rounded_to_the_nearest(
    settings: dict[str, Any], build: Any, word_tokenizer: Any, token_file: Path, tmp_path: Path
) -> None:
    dense = build("Mixtral", num_local_experts=64, num_experts_per_tok=1)
    dense.save_pretrained(tmp_path / "dense")
    word_tokenizer.save_pretrained(tmp_path / "dense")
    config = PruneConfig(calibration=CalibrationConfig(dataset=str(token_file)), quantize=QuantizeConfig(group_size=32),
                         **settings)  # fmt: skip
    record = prune(config, ModelConfig(path=str(tmp_path / "dense")), tmp_path / "out")
    name = next(name for name, tokens in record.metrics["few_tokens"].items() if not tokens)
    pruned = prunable_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))[name].matrix
    mask = keep_largest(prunable_weights(dense)[name].matrix.abs(), Pattern.parse("2:4"), per_row=False)
    weight = prunable_weights(dense)[name].matrix * mask
    assert pruned.equal(fit_grid(weight, mask, GridSpec(4, 32)).rounded(weight))
