"""The tuning stage as a whole: what it writes, how it goes on, how it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lors_cli import run_dir
from lors_cli.errors import SparsityError, UsageError
from lors_cli.recipe import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning import trainer as trainer_module
from lors_cli.tuning import tune
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.trainer import AdapterTrainer, whole_checkpoints

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def config(instructions: Path) -> TuneConfig:
    return TuneConfig(
        rank=4, alpha=4.0, learning_rate=5e-2, max_steps=8, batch_size=4, per_device_batch_size=2, init_samples=4,
        save_steps=3, data=TuneDataConfig(dataset=str(instructions), max_length=320),
    )  # fmt: skip


def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def test_tuning_lowers_the_loss_and_keeps_every_zero(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    base, tuned = _model(sparse_checkpoint), _model(out)
    changed = 0
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if "proj" in name:
            assert bool((after[before == 0] == 0).all()), name
            changed += int((after != before).sum())
        else:
            assert torch.equal(before, after), name
    assert changed > 1000
    assert record.metrics["violations"] == 0
    assert record.metrics["sparsity"] >= 0.5
    assert record.metrics["last_loss"] < record.metrics["first_loss"] - 0.5
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["learning_rate"] == pytest.approx(5e-2)
    assert run_dir.is_finished(out, record.fingerprint)
    assert (out / "config.json").read_text() == (sparse_checkpoint / "config.json").read_text()


def test_adapter_and_merged_checkpoint_agree_bit_for_bit(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    adapted = load_adapter(_model(sparse_checkpoint).requires_grad_(False), out / "adapter")
    assert torch.equal(adapted(IDS).logits, _model(out)(IDS).logits)


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_a_resumed_run_equals_an_unbroken_one(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(config, model, tmp_path / "whole")
    original = AdapterTrainer.training_step
    calls = 0

    def dies(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if self.state.global_step == killed_at:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        tune(config, model, tmp_path / "broken")
    assert run_dir.read_record(tmp_path / "broken") is None
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    monkeypatch.setattr(AdapterTrainer, "training_step", original)
    tune(config, model, tmp_path / "broken")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
              for run in ("whole", "broken")]  # fmt: skip
    assert losses[0] == losses[1]


def test_a_run_killed_after_training_merges_without_training_again(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "publish", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            tune(config, model, out)
    steps: list[int] = []
    original = AdapterTrainer.training_step

    def counted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", counted)
    tune(config, model, out)
    assert steps == []
    tune(config, model, tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_checkpoints_hold_adapters_and_state_only_and_half_ones_are_passed_over(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    found = whole_checkpoints(out / "checkpoints", record.fingerprint)
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-8"]
    names = {file.name for file in found[-1].iterdir()}
    assert names == {
        "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "lors.json",
    }  # fmt: skip
    tensors = load_file(found[-1] / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(found[-1] / name, weights_only=True)
    (found[-1] / "optimizer.pt").unlink()
    assert whole_checkpoints(out / "checkpoints", record.fingerprint) == found[:1]
    assert whole_checkpoints(out / "checkpoints", "another") == []


def test_a_broken_loss_stops_with_the_last_checkpoint_kept(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AdapterTrainer.compute_loss

    def breaks(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", breaks)
    with pytest.raises(UsageError, match="broke at step 5") as caught:
        tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert "checkpoint-3 is kept" in str(caught.value)
    assert (tmp_path / "tune" / "checkpoints" / "checkpoint-3").is_dir()
    assert run_dir.read_record(tmp_path / "tune") is None


def test_an_interrupt_saves_and_the_same_call_goes_on(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    model = ModelConfig(path=str(sparse_checkpoint))
    original = trainer_module.LogCallback.on_log

    def interrupts(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer_module.LogCallback, "on_log", interrupts)
    with pytest.raises(KeyboardInterrupt):
        tune(config, model, tmp_path / "tune")
    assert (tmp_path / "tune" / "checkpoints" / "checkpoint-5").is_dir()
    monkeypatch.setattr(trainer_module.LogCallback, "on_log", original)
    tune(config, model, tmp_path / "tune")
    tune(config, model, tmp_path / "whole")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "tune"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_dense_model_is_refused(
    sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any, config: TuneConfig, tmp_path: Path
) -> None:
    model = sparse_llama()
    for parameter in model.parameters():
        parameter.data[parameter == 0] = 0.01
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="the model is dense"):
        tune(config, ModelConfig(path=str(tmp_path / "dense")), tmp_path / "tune")


def test_a_merge_that_breaks_the_pattern_publishes_nothing(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.tuning.lors import LorsLinear

    monkeypatch.setattr(LorsLinear, "merged_weight", lambda self: torch.ones_like(self.weight))
    with pytest.raises(SparsityError):
        tune(replace(config, max_steps=1), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert run_dir.read_record(tmp_path / "tune") is None
    assert not (tmp_path / "tune" / "model.safetensors").exists()


def test_epochs_count_the_steps_that_the_trainer_makes(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    from lors_cli.tuning import _num_steps

    by_epoch = replace(config, max_steps=None, epochs=1.5, batch_size=6, init="kaiming")
    record = tune(by_epoch, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert record.metrics["steps"] == _num_steps(by_epoch, 40) == 11


def test_gradient_checkpointing_changes_nothing_but_memory(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    plain = tune(config, model, tmp_path / "plain")
    checkpointed = tune(replace(config, gradient_checkpointing=True), model, tmp_path / "checkpointed")
    assert plain.fingerprint == checkpointed.fingerprint
    first, second = (tmp_path / name / "model.safetensors" for name in ("plain", "checkpointed"))
    assert first.read_bytes() == second.read_bytes()
