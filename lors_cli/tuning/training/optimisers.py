"""The optimiser and the schedule of its learning rates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lors_cli.models.quiet import quiet_libraries
from lors_cli.recipe.schema import TuneConfig


def make_optimizer(config: TuneConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW on groups of parameters with rates of their own, its state in 32 or in 8 bits."""
    if config.optim == "adamw_8bit":
        return _adamw_8bit(config, groups)
    return torch.optim.AdamW(groups, lr=config.peak_learning_rate, betas=_betas(config))


def _betas(config: TuneConfig) -> tuple[float, float]:
    first, second = config.adam_betas
    return first, second


def _adamw_8bit(config: TuneConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; its kernels write past autograd, so that a parameter's version is counted up here.

    By the version the layers see that their kept merged weight is out of date.
    """
    with quiet_libraries():
        from bitsandbytes.optim import AdamW8bit
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.peak_learning_rate, betas=_betas(config))

    def changed(*_: Any) -> None:
        torch.autograd.graph.increment_version([each for group in groups for each in group["params"]])

    optimizer.register_step_post_hook(changed)
    return optimizer


def make_schedule(config: TuneConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """The warm-up, and what follows it."""
    warmup = config.warmup_steps
    if config.lr_schedule == "linear":  # which transformers has without a floor
        floor = config.min_learning_rate / config.peak_learning_rate
        return LambdaLR(optimizer, partial(_linear, warmup=warmup, num_steps=num_steps, floor=floor))
    if config.lr_schedule == "constant":
        return get_scheduler("constant_with_warmup", optimizer, warmup)
    return get_scheduler("cosine_with_min_lr", optimizer, warmup, num_steps, {"min_lr": config.min_learning_rate})


def _linear(step: int, *, warmup: int, num_steps: int, floor: float) -> float:
    """The share of the peak at a step: up from 0 in the warm-up, then down to `floor`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    return max(1 - done, 0.0) * (1 - floor) + floor
