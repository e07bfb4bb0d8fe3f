"""Tuning of every architecture: adapters in its blocks, zeros kept, and the checkpoint computes what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lors_cli.errors import UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.stage import tune

Build = Callable[..., PreTrainedModel]
Sparse = Callable[..., Path]


@pytest.fixture
def sparse(tmp_path: Path, build: Build, word_tokenizer: PreTrainedTokenizerFast) -> Sparse:
    """Saves a 2:4 model of an architecture with its tokenizer, and rows to tune it on."""

    def make(name: str) -> Path:
        model = build(name).requires_grad_(False)
        for weight in prunable_weights(model).values():
            weight.matrix[:, 0::4] = 0
            weight.matrix[:, 3::4] = 0
        model.save_pretrained(tmp_path / "sparse")
        word_tokenizer.save_pretrained(tmp_path / "sparse")
        rows = [{"instruction": f"w{index + 2} w5", "input": "", "output": "w7 w9 w11"} for index in range(8)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / "sparse"

    return make


def tuned(folder: Path, **settings: Any) -> Path:
    data = TuneDataConfig(dataset=str(folder.parent / "rows.jsonl"), max_length=32)
    config = TuneConfig(rank=4, max_steps=2, batch_size=4, learning_rate=1e-2, data=data, **settings)
    tune(config, ModelConfig(path=str(folder), dtype="float32"), folder.parent / "tuned")
    return folder.parent / "tuned"


TUNED = [name for name in ARCHITECTURES if name != "Qwen2"]
"""All but Qwen2, whose tokenizer class knows no tokenizer of words; what it has beside Llama, biases, others have."""


@pytest.mark.parametrize("architecture", TUNED)
def test_every_architecture(architecture: str, sparse: Sparse, batches: list[torch.Tensor]) -> None:
    folder = sparse(architecture)
    if architecture == "GPT-2":
        with pytest.raises(UsageError, match=r"adapters go on nn\.Linear only"):
            tuned(folder)
        return
    out = tuned(folder)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, out))
    weights = prunable_weights(after)
    linears = {name for name, weight in weights.items() if isinstance(weight.module, torch.nn.Linear)}
    changed = {name for name, weight in prunable_weights(before).items()
               if not torch.equal(weight.matrix, weights[name].matrix)}  # fmt: skip
    assert changed == linears
    for name, weight in prunable_weights(before).items():
        assert torch.equal(weight.matrix == 0, weights[name].matrix == 0)
    trained = load_adapter(before, out / "adapter")
    with torch.no_grad():
        assert torch.equal(trained(input_ids=batches[0]).logits, after(input_ids=batches[0]).logits)


@pytest.mark.parametrize("method", ["sqft", "sqft-gc", "spp", "spp-gc", "hira", "hira-gc", "lora"])
def test_blocks_that_add_to_the_output_of_a_linear_in_place(method: str, sparse: Sparse) -> None:
    out = tuned(sparse("Falcon-40B"), method=method)
    losses = json.loads((out / "stage.json").read_text())["metrics"]
    assert losses["last_loss"] < losses["first_loss"]


def test_norms_of_a_vision_tower_are_not_trained(sparse: Sparse) -> None:
    from safetensors.torch import load_file

    out = tuned(sparse("Gemma3-vision"), train_norms=True)
    shifts = [name for name in load_file(out / "adapter" / "adapter_model.safetensors") if name.endswith(".shift")]
    assert len(shifts) == 2 * 6 + 1  # four around the parts of a block, two in its attention; the last one
    assert all(".language_model." in name for name in shifts)
