"""A scheduler's signal in the middle of a step: stop after the micro-batch, go on to the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import log

from lors_cli.errors import UsageError
from lors_cli.files import locks
from lors_cli.files.owners import Owner
from lors_cli.machine.signals import Stopped, stopping
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.randomness import random_state, restore_random_state
from lors_cli.tuning.training.trainer import AdapterTrainer


@pytest.fixture
def with_dropout(sparse_checkpoint: Path) -> ModelConfig:
    """The sparse model with dropout, which draws random numbers in every micro-batch."""
    path = sparse_checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.2}))
    return ModelConfig(path=str(sparse_checkpoint))


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 4), (signal.SIGUSR1, 4), (signal.SIGTERM, 1)])
def test_a_stop_within_a_step_gives_it_up_and_the_same_weights_come_out(
    with_dropout: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals, step: int,
) -> None:  # fmt: skip
    config = replace(config, per_device_batch_size=1, max_steps=6, keep_checkpoints=9)
    tune(config, with_dropout, tmp_path / "whole")
    original, calls = AdapterTrainer.micro_batch, []

    def signalled(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        calls.append(self.step + 1)
        if calls.count(step) == 2:  # of its four micro-batches
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # schedulers repeat themselves
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "micro_batch", signalled)
        with pytest.raises(Stopped) as caught:
            tune(config, with_dropout, tmp_path / "tune")
    assert caught.value.name == number.name
    assert calls == [done for done in range(1, step) for _ in range(4)] + [step] * 2
    kept = tmp_path / "tune/checkpoints" / f"checkpoint-{step - 1}"
    assert kept.is_dir()
    if step == 4:
        others = [tmp_path / "whole/checkpoints" / f"checkpoint-{number}" for number in (3, 6)]
        files = [folder / "rng_state.pth" for folder in (kept, *others)]
        draws = [torch.load(file, weights_only=False)["cpu"] for file in files]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[1], draws[2])
    tune(config, with_dropout, tmp_path / "tune")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "tune"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("how", ["step", "stop"])
def test_a_run_that_has_lost_its_folder_writes_nothing_more_there(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    original = AdapterTrainer.micro_batch

    def taken_over(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        if self.step == 2:
            another = replace(Owner.this_process(), host="node17")
            (tmp_path / locks.LOCK_NAME).write_text(json.dumps(asdict(another)))
            locks._held[tmp_path.resolve()]._seen = -math.inf
            if how == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", taken_over)
    with locks.hold(tmp_path), pytest.raises(UsageError, match="is no longer held by this process"):
        tune(replace(config, init="kaiming"), ModelConfig(path=str(sparse_checkpoint)), tmp_path)
    assert [row["step"] for row in log(tmp_path)] == [1, 2]
    assert not (tmp_path / "checkpoints").exists()


def test_signals_of_others_are_left_to_them() -> None:
    with stopping(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_disturb_the_winding_up() -> None:
    wound_up = []

    def work() -> None:
        with stopping():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                wound_up.append(True)

    with pytest.raises(Stopped):
        work()
    assert wound_up == [True]


def test_random_generators_go_back() -> None:
    import random

    import numpy as np

    state = random_state()
    first = (random.random(), float(np.random.rand()), torch.rand(3))
    restore_random_state(state)
    second = (random.random(), float(np.random.rand()), torch.rand(3))
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])
