"""Tuning that is killed, and the weights and the log that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.trainer import AdapterTrainer

MODELS = ("model.safetensors", "adapter/adapter_model.safetensors")
"""The weights that a tuned model's folder holds."""


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def killed_at(step: int, config: TuneConfig, model: ModelConfig, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Tune until the first micro-batch after a step, which never comes."""
    original = AdapterTrainer.micro_batch

    def dies(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        if self.step == step:
            raise RuntimeError("killed")
        return original(self, *args)

    with patch.context() as patched:
        patched.setattr(AdapterTrainer, "micro_batch", dies)
        with pytest.raises(RuntimeError, match="killed"):
            tune(config, model, out)
