"""The held-out loss: its value, what is kept by it, and runs that are broken off around it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import MODELS, killed_at, log
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lors_cli.data.tokens import tuning_data
from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.recipe.schema import DistillConfig, ModelConfig, TuneConfig
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training import trainer as trainer_module
from lors_cli.tuning.training.checkpoints import remove_others, whole_checkpoints, write_checkpoint
from lors_cli.tuning.training.trainer import AdapterTrainer
from lors_cli.tuning.training.validation import Validation


@pytest.fixture
def model(sparse_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(sparse_checkpoint), dtype="float32")


@pytest.fixture
def validated(config: TuneConfig) -> TuneConfig:
    """Fourteen steps, a held-out loss after every second, of seven rows."""
    return replace(config, max_steps=14, val_size=7, eval_steps=2, init="kaiming", keep_checkpoints=1)


@pytest.fixture
def best_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses that are best after step 6; which weights they are of does not matter to what is kept."""
    losses = {2: 5.0, 4: 4.0, 6: 3.0, 8: 3.5, 10: 3.0, 12: 3.2, 14: 3.1}
    original = AdapterTrainer.validate

    def validate(self: AdapterTrainer, row: dict[str, Any]) -> bool:
        monkeypatch.setattr(trainer_module, "held_out_loss", lambda *args: losses[self.step])
        return original(self, row)

    monkeypatch.setattr(AdapterTrainer, "validate", validate)


def assert_same(first: Path, second: Path) -> None:
    for name in MODELS:
        assert (first / name).read_bytes() == (second / name).read_bytes(), second / name
    keys = ("step", "loss", "val_loss")
    rows = [[{key: row[key] for key in keys if key in row} for row in log(out)] for out in (first, second)]
    assert rows[0] == rows[1]
    metrics = [json.loads((out / "stage.json").read_text())["metrics"] for out in (first, second)]
    timeless = [{key: value for key, value in found.items() if key != "tokens_per_s"} for found in metrics]
    assert timeless[0] == timeless[1]


@torch.no_grad()
def independent_loss(folder: Path, config: TuneConfig) -> float:
    """Sample by sample, token by token, of a checkpoint as anyone loads it."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = tuning_data(config, tokenizer, model_max_length=512, data_dir=None).held_out
    assert len(held_out) == config.val_size
    total, count = 0.0, 0
    for sample in held_out:
        logits = network(torch.tensor([sample["input_ids"]])).logits[0].double()
        for place, label in enumerate(sample["labels"][1:]):
            if label != -100:
                total -= float(torch.log_softmax(logits[place], 0)[label])
                count += 1
    return total / count


@pytest.mark.parametrize("method", ["lors", "sqft"])
def test_the_held_out_loss_is_that_of_an_independent_loop(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, method: str
) -> None:
    config = replace(validated, method=method, max_steps=3)
    record = tune(config, model, tmp_path / "tune")
    rows = log(tmp_path / "tune")
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 3]
    assert rows[-1]["val_loss"] == pytest.approx(independent_loss(tmp_path / "tune", config), rel=1e-6)
    assert record.metrics["val_loss_last"] == round(rows[-1]["val_loss"], 6)
    assert record.metrics["val_loss_first"] == round(rows[1]["val_loss"], 6)
    assert (record.metrics["num_samples"], record.metrics["val_samples"]) == (33, 7)
    assert record.metrics["loss_held_out"]
    assert record.metrics["loss_after"] == pytest.approx(record.metrics["val_loss_last"], abs=2e-6)  # the same seven


def test_it_is_the_labels_loss_alone_where_a_teacher_is_learnt_from(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path
) -> None:
    teacher = DistillConfig(teacher=model.path, weight=0.9, temperature=3.0)
    config = replace(validated, max_steps=2, distill=teacher)
    tune(config, model, tmp_path / "tune")
    assert log(tmp_path / "tune")[-1]["val_loss"] == pytest.approx(
        independent_loss(tmp_path / "tune", config), rel=1e-6
    )


def test_the_models_own_loss_is_taken_where_the_head_cannot_be_chunked(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lors_cli.tuning.training.preparation.why_not_chunked", lambda *args: "of the test")
    tune(replace(validated, max_steps=2), model, tmp_path / "tune")
    found = log(tmp_path / "tune")[-1]["val_loss"]
    assert found == pytest.approx(independent_loss(tmp_path / "tune", validated), rel=1e-6)


def test_measuring_changes_no_bit_of_the_training(model: ModelConfig, validated: TuneConfig, tmp_path: Path) -> None:
    for every in (1, 14):
        tune(replace(validated, eval_steps=every), model, tmp_path / str(every))
    for name in MODELS:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "14" / name).read_bytes()
    losses = [[row["loss"] for row in log(tmp_path / every)] for every in ("1", "14")]
    assert losses[0] == losses[1]


def test_ten_losses_are_measured_when_nothing_is_said(validated: TuneConfig) -> None:
    samples = [{"input_ids": [1, 2], "labels": [1, 2]}]
    for num_steps, expected in ((1000, 100), (95, 10), (7, 1)):
        validation = Validation(replace(validated, eval_steps=None), samples, num_steps)
        due = [step for step in range(1, num_steps + 1) if validation.is_due(step)]
        assert due == sorted({*range(expected, num_steps + 1, expected), num_steps})
    assert not any(Validation(validated, [], 8).is_due(step) for step in range(1, 9))


@pytest.mark.usefixtures("best_in_the_middle")
def test_the_model_of_the_best_step_is_merged(model: ModelConfig, validated: TuneConfig, tmp_path: Path) -> None:
    best = tune(replace(validated, load_best_model_at_end=True), model, tmp_path / "best")
    last = tune(validated, model, tmp_path / "last")
    kept = load_file(tmp_path / "best/checkpoints/checkpoint-6/adapter_model.safetensors")
    merged = load_file(tmp_path / "best/adapter/adapter_model.safetensors")
    assert merged.keys() == kept.keys() != set()
    assert all(torch.equal(merged[name], tensor) for name, tensor in kept.items())
    assert (tmp_path / "best" / MODELS[0]).read_bytes() != (tmp_path / "last" / MODELS[0]).read_bytes()
    expected = {"val_loss_first": 5.0, "val_loss_best": 3.0, "val_loss_last": 3.1, "val_best_step": 6, "steps": 14}
    assert best.metrics.items() >= {**expected, "model_step": 6}.items()
    assert last.metrics.items() >= {**expected, "model_step": 14}.items()
    checkpoints = {path.name for path in (tmp_path / "best/checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-6", "checkpoint-14"}  # keep_checkpoints: 1, and the best
    card = (tmp_path / "best/README.md").read_text()
    assert "model_step | 6" in card
    assert "val_loss_best | 3.0" in card


@pytest.mark.usefixtures("best_in_the_middle")
@pytest.mark.parametrize(("patience", "steps"), [(1, 8), (2, 10), (3, 12), (4, 14), (5, 14)])
def test_training_ends_once_the_loss_has_not_improved_for_so_long(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, patience: int, steps: int
) -> None:
    config = replace(validated, early_stopping_patience=patience)
    record = tune(config, model, tmp_path / "tune")
    assert record.metrics["steps"] == steps
    assert record.metrics["model_step"] == 6
    assert record.config["load_best_model_at_end"] is True
    rates = [row["learning_rate"] for row in log(tmp_path / "tune")]
    assert rates[:steps] == sorted(rates, reverse=True)  # the schedule is that of the whole run
    again = tune(replace(config, load_best_model_at_end=False), model, tmp_path / "last")
    assert (again.metrics["steps"], again.metrics["model_step"]) == (steps, steps)


@pytest.mark.usefixtures("best_in_the_middle")
def test_a_killed_run_ends_in_the_same_bits(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(validated, early_stopping_patience=2)
    tune(config, model, tmp_path / "whole")
    for step in (1, 5, 6, 7, 9):
        broken = tmp_path / f"broken at {step}"
        killed_at(step, config, model, broken, monkeypatch)
        tune(config, model, broken)
        assert_same(tmp_path / "whole", broken)


def test_a_run_killed_between_real_losses_ends_in_the_same_bits(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate in (0.5, 1.0, 2.0, 0.7, 1.4):  # which of them passes its best loss depends on the processor's rounding
        config = replace(validated, early_stopping_patience=2, learning_rate=rate, warmup_steps=13)
        whole = tmp_path / str(rate)
        metrics = tune(config, model, whole).metrics
        best = metrics["model_step"]
        if 2 < best < metrics["steps"] < 14:
            break
    else:
        pytest.fail("rates so high are to pass their best losses")
    for step in (best - 1, best + 1):
        killed_at(step, config, model, tmp_path / f"broken {step}", monkeypatch)
        tune(config, model, tmp_path / f"broken {step}")
        assert_same(whole, tmp_path / f"broken {step}")
    expected = json.loads((whole / "stage.json").read_text())["metrics"]["val_loss_best"]
    assert independent_loss(whole, config) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("best_in_the_middle")
def test_a_run_that_ended_early_and_was_killed_while_publishing_trains_no_more(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(validated, early_stopping_patience=1)
    tune(config, model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(records, "publish", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            tune(config, model, tmp_path / "broken")
    monkeypatch.delattr(AdapterTrainer, "micro_batch")
    tune(config, model, tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("best_in_the_middle")
def test_without_the_best_checkpoint_those_after_it_are_of_no_use(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(validated, load_best_model_at_end=True)
    fingerprint = tune(config, model, tmp_path / "whole").fingerprint
    killed_at(13, config, model, tmp_path / "broken", monkeypatch)
    checkpoints = tmp_path / "broken/checkpoints"
    assert [path.name for path in whole_checkpoints(checkpoints, fingerprint)] == ["checkpoint-6", "checkpoint-12"]
    shutil.rmtree(checkpoints / "checkpoint-6")
    assert whole_checkpoints(checkpoints, fingerprint) == []
    tune(config, model, tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("at", [6, 14])
def test_a_stop_within_an_evaluation_saves_at_once_and_the_loss_is_measured_later(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = replace(validated, load_best_model_at_end=True)
    tune(config, model, tmp_path / "whole")
    original = AdapterTrainer.validate

    def interrupted(self: AdapterTrainer, row: dict[str, Any]) -> bool:
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(config, model, tmp_path / "broken")
    rows = log(tmp_path / "broken")
    assert rows[-1]["step"] == at - 1  # that of the step comes with its loss
    assert (tmp_path / f"broken/checkpoints/checkpoint-{at}").is_dir()
    if at == 6:  # killed again, before a later checkpoint is there
        killed_at(7, config, model, tmp_path / "broken", monkeypatch)
    tune(config, model, tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


STORED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def test_a_checkpoint_written_again_knows_the_outcome_and_stays(tmp_path: Path) -> None:
    """A stop within the evaluation of step 6 left it with the best one before; later ones dropped it with that."""

    def write(folder: Path) -> None:
        for name in STORED:
            (folder / name).touch()

    for step, best in ((3, 3), (6, 3), (6, 6), (9, 6), (12, 6)):
        state = {"best_step": best, "best_loss": 1.5, "without_gain": 0}
        marker = {"fingerprint": "f", "validation": state, "best_step": best, "unlogged": None}
        write_checkpoint(tmp_path, step, marker, write, keep=1)
        remove_others(tmp_path, "f")  # as a run that goes on does
        assert tmp_path / f"checkpoint-{step}" in whole_checkpoints(tmp_path, "f")
    assert [path.name for path in whole_checkpoints(tmp_path, "f")] == ["checkpoint-6", "checkpoint-12"]


def test_no_loss_that_is_not_finite_is_the_best(
    model: ModelConfig, validated: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "held_out_loss", lambda *args: float("nan"))
    record = tune(replace(validated, max_steps=2), model, tmp_path / "last")
    assert log(tmp_path / "last")[-1]["val_loss"] is None
    assert (record.metrics["val_loss_last"], record.metrics["val_best_step"]) == (None, None)
    with pytest.raises(UsageError, match="no held-out loss was finite"):
        tune(replace(validated, max_steps=2, load_best_model_at_end=True), model, tmp_path / "best")


def test_settings_are_in_the_fingerprint_where_they_act(validated: TuneConfig) -> None:
    def fingerprint(**changes: Any) -> str:
        return stage_fingerprint(replace(validated, **changes), "base", None)

    off = {"val_size": None, "eval_steps": None}
    assert fingerprint() == fingerprint(eval_steps=5) == fingerprint(eval_steps=None)  # no weight is moved by it
    assert fingerprint(val_size=7.0) == fingerprint() == fingerprint(report_to=("wandb",))
    patient = {"early_stopping_patience": 3}
    found = [fingerprint(**off), fingerprint(), fingerprint(val_size=8), fingerprint(load_best_model_at_end=True),
             fingerprint(**patient), fingerprint(**patient, eval_steps=5),
             fingerprint(**patient, load_best_model_at_end=False)]  # fmt: skip
    assert len(set(found)) == len(found)
    assert fingerprint(**patient) == fingerprint(**patient, load_best_model_at_end=True)


@pytest.mark.parametrize(
    "setting", [{"eval_steps": 2}, {"early_stopping_patience": 2}, {"load_best_model_at_end": True}]
)
def test_what_needs_held_out_samples_is_refused_without(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} needs val_size"):
        TuneConfig(**setting)


def test_a_size_between_samples_and_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\.5 is neither a number of samples nor a share below 1"):
        TuneConfig(val_size=2.5)
