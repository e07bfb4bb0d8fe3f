"""Bad steps are left out, counted and limited; training checkpoints stay few and whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lors_cli.errors import UsageError
from lors_cli.files import records
from lors_cli.models.sources import model_fingerprint
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training import checkpoints
from lors_cli.tuning.training.checkpoints import whole_checkpoints
from lors_cli.tuning.training.guards import WARM_UP, WINDOW, StepGuard
from lors_cli.tuning.training.trainer import AdapterTrainer

Spoil = Callable[..., None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Multiplies the loss of some steps (counted from 1) by a factor, in their last micro-batch."""
    original = AdapterTrainer.micro_batch

    def install(*steps: int, factor: float = float("nan"), dies_at: int = 0) -> None:
        calls: list[int] = []

        def micro_batch(self: AdapterTrainer, *args: Any) -> torch.Tensor:
            step = self.step + 1
            if step == dies_at:
                raise RuntimeError("killed")
            calls.append(step)
            loss = self.loss
            if step in steps and calls.count(step) == 2:
                self.loss = lambda *inputs: loss(*inputs) * factor
            try:
                return original(self, *args)
            finally:
                self.loss = loss

        monkeypatch.setattr(AdapterTrainer, "micro_batch", micro_batch)

    return install


def log_rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "log.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    return [json.loads(line) for line in text.splitlines()]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_a_bad_step_changes_neither_weights_nor_the_optimisers_state(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, spoil: Spoil, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = ModelConfig(path=str(sparse_checkpoint)), replace(
        config, max_bad_steps=1, save_steps=1, keep_checkpoints=20, weight_decay=0.1
    )  # fmt: skip
    tune(config, model, tmp_path / "whole")
    spoil(5)
    record = tune(config, model, tmp_path / "tune")
    folders = [tmp_path / "tune/checkpoints" / f"checkpoint-{step}" for step in (3, 4, 5, 6)]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    states = [tensors_in(torch.load(folder / "optimizer.pt", weights_only=True)) for folder in folders]
    assert len(states[0]) > 10
    equal = [all(torch.equal(first[name], second[name]) for name in first) for first, second in pairwise(weights)]
    assert equal == [False, True, False]
    equal = [all(torch.equal(*pair) for pair in zip(first, second, strict=True)) for first, second in pairwise(states)]
    assert equal == [False, True, False]
    rows, undisturbed = log_rows(tmp_path / "tune"), log_rows(tmp_path / "whole")
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    assert rows[4]["loss"] is None
    assert rows[4]["grad_norm"] is None
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows if row["step"] != 5)
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in undisturbed]
    assert rows[:4] == [{**row, "tokens_per_s": rows[at]["tokens_per_s"]} for at, row in enumerate(undisturbed[:4])]
    assert record.metrics["bad_steps"] == 1
    assert record.metrics["steps"] == 8
    assert "step 5 is left out (1 of at most 1): the loss or its gradient is not finite" in capsys.readouterr().err


def test_too_many_bad_steps_end_the_run_and_a_higher_limit_goes_on(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, spoil: Spoil
) -> None:
    model, config = ModelConfig(path=str(sparse_checkpoint)), replace(config, max_bad_steps=1)
    spoil(2, 5)
    with pytest.raises(UsageError, match=r"broke at step 5: .*bad step 2, max_bad_steps is 1") as caught:
        tune(config, model, tmp_path / "tune")
    assert "checkpoint-3 is kept" in str(caught.value)
    spoil(2, 5)
    record = tune(replace(config, max_bad_steps=2), model, tmp_path / "tune")
    assert record.metrics["bad_steps"] == 2
    spoil(2, 5)
    tune(replace(config, max_bad_steps=9), model, tmp_path / "whole")
    tuned, whole = (tmp_path / name / "model.safetensors" for name in ("tune", "whole"))
    assert tuned.read_bytes() == whole.read_bytes()


def test_the_count_and_the_medians_survive_a_kill(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, spoil: Spoil
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    config = replace(config, max_bad_steps=1, max_steps=20, learning_rate=1e-3, spike_factor=50.0)
    spoil(14, factor=1e4)
    tune(config, model, tmp_path / "whole")
    spoil(14, factor=1e4, dies_at=14)
    with pytest.raises(RuntimeError, match="killed"):
        tune(config, model, tmp_path / "tune")
    spoil(14, factor=1e4, dies_at=17)  # the medians of steps 1 to 12 come from the checkpoint
    with pytest.raises(RuntimeError, match="killed"):
        tune(config, model, tmp_path / "tune")
    spoil()
    record = tune(config, model, tmp_path / "tune")
    assert record.metrics["bad_steps"] == 1
    rows = log_rows(tmp_path / "tune")
    assert [row["step"] for row in rows if "skipped" in row] == [14]
    assert rows[13]["loss"] > 1000
    tuned, whole = (tmp_path / name / "model.safetensors" for name in ("tune", "whole"))
    assert tuned.read_bytes() == whole.read_bytes()
    spoil(14, factor=1e4, dies_at=17)
    with pytest.raises(RuntimeError, match="killed"):
        tune(config, model, tmp_path / "again")
    spoil(18)
    with pytest.raises(UsageError, match=r"broke at step 18: .*bad step 2, max_bad_steps is 1"):
        tune(config, model, tmp_path / "again")


def middle(values: list[float]) -> float:
    """The median, by sorting."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def test_a_spike_is_a_multiple_of_the_median_of_recent_good_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (2 * torch.rand(400, generator=generator) ** 8 + 0.01).tolist()
    norms = (3 * torch.rand(400, generator=generator) ** 8 + 0.01).tolist()
    guard, good, bad = StepGuard(400, 20.0), [], 0
    for loss, norm in zip(losses, norms, strict=True):
        recent = good[-WINDOW:]
        expected = len(recent) >= WARM_UP and (
            loss > 20 * middle([pair[0] for pair in recent]) or norm > 20 * middle([pair[1] for pair in recent])
        )
        assert guard.is_bad(loss, norm) == expected
        bad += expected
        if not expected:
            good.append((loss, norm))
        copy = StepGuard(400, 20.0)
        copy.restore(json.loads(json.dumps(guard.state())))
        guard = copy
    assert 20 < bad == guard.bad_steps < 380


def test_without_a_factor_only_what_is_not_finite_is_bad() -> None:
    guard = StepGuard(2)
    for loss, norm, bad in (
        (1.0, 1.0, False), (1e30, 1e30, False), (float("nan"), 1.0, True), (1.0, float("inf"), True), (1.0, 1.0, False),
    ):  # fmt: skip
        assert guard.is_bad(loss, norm) == bad
    assert not guard.exceeded
    assert guard.is_bad(float("-inf"), 0.0)
    assert guard.exceeded


def test_only_spike_factor_is_part_of_the_fingerprint(sparse_checkpoint: Path, config: TuneConfig) -> None:
    def fingerprint(**changes: Any) -> str:
        return stage_fingerprint(replace(config, **changes), "base", None)

    assert fingerprint() == fingerprint(max_bad_steps=5) == fingerprint(keep_checkpoints=7)
    assert len({fingerprint(), fingerprint(spike_factor=10.0), fingerprint(spike_factor=20.0)}) == 3


# Disk use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_only_so_many_checkpoints_lie_there_and_never_none(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    config = replace(config, max_steps=12, save_steps=1, keep_checkpoints=keep)
    out, model = tmp_path / "tune", ModelConfig(path=str(sparse_checkpoint))
    fingerprint = stage_fingerprint(config, model_fingerprint(model), None)
    seen, most = [], 0

    def watched(path: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        most = max(most, len(list((out / "checkpoints").glob("checkpoint-*"))))
        if path.name.startswith("checkpoint-") and path.exists():
            seen.append(path.name)
            newer = [folder.name for folder in whole_checkpoints(out / "checkpoints", fingerprint) if folder != path]
            assert len(newer) == keep
        original(path, *args, **kwargs)

    original = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", watched)
        tune(config, model, out)
    assert seen == [f"checkpoint-{step}" for step in range(1, 13 - keep)]
    assert most == keep + 1
    left = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert left == sorted(f"checkpoint-{step}" for step in range(13 - keep, 13))


def test_a_whole_checkpoint_is_not_replaced_by_one_of_the_same_step(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "tune", []
    original = AdapterTrainer.save

    def twice(self: AdapterTrainer) -> None:
        original(self)
        folder = self.folder / f"checkpoint-{self.step}"
        kept.append(folder.stat().st_ino)
        original(self)
        assert folder.stat().st_ino == kept[-1]
        assert not (self.folder / ".partial").exists()

    monkeypatch.setattr(AdapterTrainer, "save", twice)
    record = tune(replace(config, keep_checkpoints=1), ModelConfig(path=str(sparse_checkpoint)), out)
    assert len(kept) == 3
    assert records.is_finished(out, record.fingerprint)
