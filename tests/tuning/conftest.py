"""A tiny sparse Llama on disk, and a small file of instructions to tune it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lors_cli.models.blocks import prunable_weights
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig


@pytest.fixture(scope="session")
def sparse_llama() -> Callable[..., PreTrainedModel]:
    """Makes a random two-block Llama whose block linears are 2:4."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, pad_token_id=257,
            bos_token_id=256, eos_token_id=257,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
        for weight in prunable_weights(model).values():
            weight.matrix[:, 0::4] = 0
            weight.matrix[:, 3::4] = 0
        return model

    return make


@pytest.fixture
def sparse_checkpoint(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    """The sparse Llama as an ordinary checkpoint folder, bfloat16."""
    folder = tmp_path / "sparse"
    sparse_llama(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Forty short instruction rows."""
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number * 7 % 10}"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(instructions: Path) -> TuneConfig:
    """A short run on those rows."""
    return TuneConfig(
        rank=4, alpha=4.0, learning_rate=5e-2, max_steps=8, batch_size=4, per_device_batch_size=2, init_samples=4,
        save_steps=3, data=TuneDataConfig(dataset=str(instructions), max_length=320),
    )  # fmt: skip
