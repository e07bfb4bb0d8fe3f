"""Reconstruction: a pruned block's kept weights are tuned until the block gives what the dense one gives.

Pruning methods make up for the error of each linear on its own; here gradients go through the whole block, attention
and non-linearities included, so that linears make up for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lors_cli.errors import UsageError
from lors_cli.models.blocks import PrunableWeight
from lors_cli.output import console
from lors_cli.pruning.methods.statistics import NOT_FINITE

if TYPE_CHECKING:
    from torch import nn

RATE = 0.005
"""The first step's size, as a share of the root mean square of a parameter's kept weights."""
BETAS = (0.9, 0.95)

Run = Callable[["nn.Module | Substituted", torch.Tensor, int], torch.Tensor]
Inputs = Callable[[], "tuple[torch.Tensor, int]"]


@dataclass
class Substituted:
    """A module, not changed, that is called with other tensors in place of some of its parameters, by their names."""

    module: nn.Module
    tensors: dict[str, torch.Tensor]

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The module's output."""
        return torch.func.functional_call(self.module, self.tensors, args, kwargs)


def reconstruct(
    block: nn.Module, dense: nn.Module, weights: Sequence[PrunableWeight], run: Run, inputs: Sequence[Inputs],
    *, epochs: int, seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Minimise the squared difference to the dense block's outputs, as a share of theirs, by Adam; zeros are kept.

    The kept weights are held in float32 meanwhile and rounded to their dtype in every forward pass. The rate falls
    linearly to 0.

    Args:
        dense: a copy of the block from before it was pruned.
        weights: the block's prunable weights; the parameters that hold them are what is tuned.
        run: (block, X, number of the batch) -> the block's output, X (samples, tokens, hidden_size).
        inputs: give X and number of each step, drawn in random order; on what the pruned blocks before put out.

    Returns:
        Mean loss of the first and of the last epoch.

    Raises:
        UsageError: a loss is not finite.

    Source: EBFT §3 (block-wise reconstruction of sparse models), arXiv:2402.12419; here Adam, with steps in
    proportion to each parameter's weights.
    """
    holders = {(weight.module, weight.key) for weight in weights}
    names = [f"{prefix}.{key}" for prefix, module in block.named_modules()
             for key, _ in module.named_parameters(recurse=False) if (module, key) in holders]  # fmt: skip
    stored = dict(block.named_parameters())
    kept = {name: stored[name] != 0 for name in names}
    masters = {name: stored[name].detach().float().requires_grad_() for name in names if kept[name].any()}
    optimizer = torch.optim.Adam(
        [{"params": [master], "lr": RATE * float(master.detach()[kept[name]].square().mean().sqrt())}
         for name, master in masters.items()], betas=BETAS, eps=1e-20,  # gradients may be of any size
    )  # fmt: skip
    steps = epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def step(x: torch.Tensor, batch: int) -> float:
        with torch.no_grad():
            target = run(dense, x, batch).float()
        with torch.enable_grad():
            cast = {name: master.to(stored[name].dtype) for name, master in masters.items()}
            output = run(Substituted(block, cast), x, batch)
            loss = (output.float() - target).square().sum() / target.square().sum()
            if not bool(loss.isfinite()):
                raise UsageError(NOT_FINITE)
            optimizer.zero_grad()
            (loss * loss.new_tensor(float(target.numel()))).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, master in masters.items():
                master.mul_(kept[name])
        return float(loss.detach())

    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator).tolist()
        losses.append(sum(step(*inputs[number]()) for number in order) / len(inputs))
    for name, master in masters.items():
        stored[name].data.copy_(master.detach())
    console.detail(f"  reconstruction: mean loss {losses[0]:.3g} in the first epoch, {losses[-1]:.3g} in the last")
    return losses[0], losses[-1]
