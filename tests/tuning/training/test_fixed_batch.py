"""Loss before and after training, of the same samples; and a word when training has moved nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lors_cli.data.tokens import tuning_data
from lors_cli.models.loading import load_tokenizer
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning import tune
from lors_cli.tuning.training import fixed_batch


def mean_loss(model: Any, samples: list[dict[str, list[int]]]) -> float:
    """Of every label of the samples, one at a time, by torch's own cross-entropy of all logits."""
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        wanted = labels[0, 1:]
        chosen = wanted != -100
        total += float(torch.nn.functional.cross_entropy(logits[chosen], wanted[chosen], reduction="sum"))
        count += int(chosen.sum())
    return total / count


@pytest.fixture
def samples(config: TuneConfig, sparse_checkpoint: Path) -> list[dict[str, list[int]]]:
    tokenizer = load_tokenizer(ModelConfig(path=str(sparse_checkpoint)))
    return list(tuning_data(config, tokenizer, model_max_length=512, data_dir=None).samples)


@pytest.mark.parametrize("method", ["lors", "spp", "lora"])
def test_losses_are_those_of_the_models_on_disk(
    sparse_checkpoint: Path, config: TuneConfig, samples: Any, tmp_path: Path, method: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    chosen: list[fixed_batch.FixedBatch] = []
    choose = fixed_batch.choose
    monkeypatch.setattr(fixed_batch, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    config = replace(config, method=method, train_norms=method == "lors")
    metrics = tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune").metrics
    picked = [samples[index] for index in chosen[0].indices]
    assert metrics["loss_samples"] == len(picked) == min(16, len(samples))
    for name, folder in (("loss_before", sparse_checkpoint), ("loss_after", tmp_path / "tune")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        rounding = 1e-4 if method == "lors" else 2e-3  # the others' outputs are summed in bfloat16
        assert metrics[name] == pytest.approx(mean_loss(model, picked), rel=rounding)
    assert metrics["loss_after"] < metrics["loss_before"]
    assert metrics["moved"] > 0.5


def test_what_is_held_out_is_never_trained_on(
    sparse_checkpoint: Path, config: TuneConfig, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.tuning.training import sampling

    taken: set[int] = set()
    sample_at = sampling.sample_at
    monkeypatch.setattr(sampling, "sample_at", lambda there, index: taken.add(index) or sample_at(there, index))
    chosen: list[fixed_batch.FixedBatch] = []
    choose = fixed_batch.choose
    monkeypatch.setattr(fixed_batch, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    base = ModelConfig(path=str(sparse_checkpoint))
    few = replace(config, max_steps=1, batch_size=2, init_samples=2)
    assert len(samples) >= 2 + 2 + 16
    metrics = tune(few, base, tmp_path / "few").metrics
    assert metrics["loss_held_out"] is True
    assert not taken & set(chosen[0].indices)
    whole = replace(config, max_steps=None, epochs=1.0)
    assert tune(whole, base, tmp_path / "whole").metrics["loss_held_out"] is False
    assert taken > set(chosen[1].indices)


def test_it_changes_no_bit_of_the_training(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelConfig(path=str(sparse_checkpoint))
    tune(config, base, tmp_path / "with")
    monkeypatch.setattr(fixed_batch, "measure", lambda *_, **__: 0.0)
    tune(config, base, tmp_path / "without")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_run_that_moved_nothing_says_so(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SPP at a rate that bfloat16 rounds away once showed a loss of 4.21 → 4.96."""
    base = ModelConfig(path=str(sparse_checkpoint), dtype="bfloat16")
    metrics = tune(replace(config, method="spp", learning_rate=1e-9), base, tmp_path / "tune").metrics
    assert metrics["moved"] == 0.0
    assert metrics["loss_before"] == metrics["loss_after"]
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err).split())
    assert "warning: 0 % of the weights moved: learning_rate is too low for spp." in said
    shown = f"loss {metrics['loss_before']:.4f} → {metrics['loss_before']:.4f} on 16 samples"
    assert shown in said
    assert json.loads((tmp_path / "tune" / "stage.json").read_text())["metrics"]["moved"] == 0.0
    assert "| loss_before |" in (tmp_path / "tune" / "README.md").read_text()
