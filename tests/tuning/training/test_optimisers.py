"""Schedules of the learning rate by their formulas, and the optimiser with its state in 8 bits."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import killed_at, log

from lors_cli.errors import MissingError
from lors_cli.pipeline.plans import plan_single
from lors_cli.pipeline.preflight import troubles
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.optimisers import make_optimizer, make_schedule

PEAK = 8e-3


def rates(num_steps: int, **settings: Any) -> list[tuple[float, float]]:
    """What each step of a run is made with, of two groups of which one has three times the rate."""
    config = TuneConfig(learning_rate=PEAK, **settings)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (PEAK, 3 * PEAK)]
    optimizer = make_optimizer(config, groups)
    schedule = make_schedule(config, optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        first, second = schedule.get_last_lr()
        found.append((first, second))
        optimizer.step()
        schedule.step()
    return found


def expected(name: str, step: int, num_steps: int, warmup: int, floor: float) -> float:
    """The rate of a step, counted from 0, as the docs say it."""
    if step < warmup:
        return PEAK * step / warmup
    if name == "constant":
        return PEAK
    done = (step - warmup) / (num_steps - warmup)
    down = (1 + math.cos(math.pi * done)) / 2 if name == "cosine" else 1 - done
    return floor + (PEAK - floor) * down


@pytest.mark.parametrize(
    ("name", "floor"), [("cosine", 0.0), ("cosine", 1e-3), ("linear", 0.0), ("linear", 1e-3), ("constant", 0.0)]
)
@pytest.mark.parametrize(("num_steps", "warmup"), [(10, 0), (11, 4), (5, 1), (1, 0)])
def test_a_schedule_is_its_formula(name: str, floor: float, num_steps: int, warmup: int) -> None:
    found = rates(num_steps, lr_schedule=name, min_learning_rate=floor, warmup_steps=warmup)
    for step, (first, second) in enumerate(found):
        assert first == pytest.approx(expected(name, step, num_steps, warmup, floor), rel=1e-12, abs=1e-18), step
        assert second == pytest.approx(3 * first, rel=1e-12)


def test_the_schedules_differ_and_cosine_is_the_default() -> None:
    usual = rates(8)
    assert usual == rates(8, lr_schedule="cosine")
    assert len({tuple(rates(8, lr_schedule=name)) for name in ("cosine", "linear", "constant")}) == 3


def broken_and_whole(
    config: TuneConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[bytes, list[Any]]]:
    """Weights and losses of a run that was killed and went on, and of an unbroken one."""
    model = ModelConfig(path=str(base))
    killed_at(5, config, model, tmp_path / "broken", monkeypatch)
    found = []
    for name in ("broken", "whole"):
        tune(config, model, tmp_path / name)
        losses = [(row["loss"], row["learning_rate"]) for row in log(tmp_path / name)]
        found.append(((tmp_path / name / "model.safetensors").read_bytes(), losses))
    return found


@pytest.mark.parametrize("name", ["linear", "constant"])
def test_a_resumed_schedule_goes_on_where_it_was(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = replace(config, lr_schedule=name, warmup_steps=2)  # type: ignore[arg-type]
    broken, whole = broken_and_whole(config, sparse_checkpoint, tmp_path, monkeypatch)
    assert broken == whole
    assert len(whole[1]) == 8


def test_8_bit_states_are_kept_in_checkpoints_and_resumed_to_the_same_bits(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    config = replace(config, optim="adamw_8bit", rank=128, init="kaiming", keep_checkpoints=9)
    broken, whole = broken_and_whole(config, sparse_checkpoint, tmp_path, monkeypatch)
    assert broken == whole
    assert whole[1][-1][0] < whole[1][0][0] - 0.2
    stored = torch.load(tmp_path / "whole/checkpoints/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    kinds = {value.dtype for state in stored.values() for value in _tensors(state) if value.numel() >= 4096}
    assert kinds == {torch.uint8}


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors of a parameter's state, however deep."""
    found = []
    for value in state.values():
        if isinstance(value, dict):
            found += _tensors(value)
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def test_without_bitsandbytes_nothing_is_loaded_and_what_to_install_is_said(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    config, model = replace(config, optim="adamw_8bit"), ModelConfig(path=str(sparse_checkpoint))
    monkeypatch.setattr("lors_cli.tuning.training.sharding.load_model", None)
    with pytest.raises(MissingError, match="adamw_8bit needs the package bitsandbytes") as caught:
        tune(config, model, tmp_path / "tune")
    assert caught.value.exit_code == 3
    assert "pip install bitsandbytes" in str(caught.value.hint)
    plan = plan_single("tune", config, {"pruned": model}, tmp_path / "tune", None)
    assert [type(trouble.error) for trouble in troubles([plan], None)] == [MissingError]
    assert troubles([replace(plan, config=replace(config, optim="adamw"))], None) == []


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_a_step_is_adam_s_formula_with_the_betas_that_are_set(betas: tuple[float, float]) -> None:
    """arXiv:1412.6980, algorithm 1, on one number."""
    first, second = betas
    config = TuneConfig(learning_rate=PEAK, adam_betas=betas)
    weight = torch.nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))
    optimizer = make_optimizer(config, [{"params": [weight], "lr": PEAK, "weight_decay": 0.0}])
    expected_weight, mean, square = 0.5, 0.0, 0.0
    for step, gradient in enumerate((0.3, -1.0, 0.25, 4.0), 1):
        weight.grad = torch.full((1,), gradient, dtype=torch.float64)
        optimizer.step()
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        expected_weight -= PEAK * (mean / (1 - first**step)) / (math.sqrt(square / (1 - second**step)) + 1e-8)
        assert float(weight.detach()) == pytest.approx(expected_weight, rel=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_eight_bits_have_the_betas_too() -> None:
    config = TuneConfig(learning_rate=PEAK, adam_betas=(0.8, 0.95), optim="adamw_8bit")
    optimizer = make_optimizer(config, [{"params": [torch.zeros(8, requires_grad=True)], "lr": PEAK}])
    assert [tuple(group["betas"]) for group in optimizer.param_groups] == [(0.8, 0.95)]


@pytest.mark.parametrize(
    ("given", "said"),
    [([0.9], "two numbers"), ([0.9, 0.99, 0.999], "two numbers"), ([0.9, 1.0], "below 1"), ([-0.1, 0.9], "at least 0")],
)
def test_betas_that_are_none_are_refused(given: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=f"adam_betas: must be .*{said}"):
        TuneConfig(adam_betas=given)  # type: ignore[arg-type]
