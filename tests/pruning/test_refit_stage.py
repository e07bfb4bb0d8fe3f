"""`refit: true` through the whole stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lors_cli.pruning.methods import statistics_kind
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig


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
