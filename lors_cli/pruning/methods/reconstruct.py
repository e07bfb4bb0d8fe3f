"""Reconstruction: a pruned block's kept weights are tuned until the block gives what the dense one gives.

Pruning methods make up for the error of each linear on its own; here gradients go through the whole block, attention
and non-linearities included, so that linears make up for each other. Weights on a grid stay on one: they are rounded to
it in every forward pass, gradients go straight through, and the scales are tuned too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.models.blocks import PrunableWeight
from lors_cli.output import console
from lors_cli.pruning.methods.statistics import NOT_FINITE

if TYPE_CHECKING:
    from torch import nn

RATE = 0.0075
"""The first step's size, as a share of the root mean square of a parameter's kept weights; this and those below for one
sample a step, for more of them times the root of their number."""
GRID_RATE = 0.01
"""The same of weights on a grid, which have half of its step to go before anything changes."""
SCALE_RATE = 0.0015
"""The first step's size, as a share of a scale."""
BETAS = (0.9, 0.95)

Run = Callable[["Substituted", torch.Tensor, int], torch.Tensor]
Inputs = Callable[[], "tuple[torch.Tensor, torch.Tensor, int]"]


@dataclass
class Substituted:
    """A module, not changed, that is called with other tensors in place of some of its parameters, by their names."""

    module: nn.Module
    tensors: dict[str, torch.Tensor]

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The module's output."""
        return torch.func.functional_call(self.module, self.tensors, args, kwargs)


class Rounded(torch.autograd.Function):
    """A weight (R, C) rounded to a grid whose scales are given in float32, with gradients for both.

    Rounding to a code is passed straight through, being cut off at the grid's ends is not.

    Source: Learned step size quantization §2.1, arXiv:1902.08153.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest values on the grid with these scales, in the dtype of its own."""
        ctx.grid = replace(grid, scales=scales.to(grid.scales.dtype))
        ctx.save_for_backward(weight)
        return ctx.grid.rounded(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Of a value q·s: 1 and q − w/s inside the grid, 0 and q beyond its ends."""
        grid: Grid = ctx.grid
        zeros = grid.spec.middle if grid.zeros is None else grid.zeros[..., None].float()
        ratio = _grouped(ctx.saved_tensors[0], grid) / grid.scales[..., None].float()
        nearest = ratio.round()
        levels = (nearest + zeros).clamp_(0, grid.spec.num_codes - 1).sub_(zeros)
        inside = levels == nearest
        by_group = _grouped(grad.float(), grid)
        of_scales = levels.sub_(ratio.mul_(inside)).mul_(by_group).sum(-1)
        return by_group.mul(inside).flatten(1)[:, : grad.shape[1]], of_scales, None


def _grouped(matrix: torch.Tensor, grid: Grid) -> torch.Tensor:
    """A matrix (R, C) as (R, groups, group_size), the last group filled up with zeros."""
    size, groups = grid.spec.group_size, grid.scales.shape[1]
    return torch.nn.functional.pad(matrix, (0, groups * size - matrix.shape[1])).unflatten(1, (groups, size))


class Tuned:
    """A parameter that is tuned: its values in float32, and the logarithms of what its grids' scales are multiplied by.

    Args:
        stored: the parameter itself.
        weights: the matrices in it.
        grids: of weights by full name.
    """

    def __init__(self, stored: torch.Tensor, weights: Sequence[PrunableWeight], grids: dict[str, Grid]) -> None:
        self.stored, self.kept = stored, stored != 0
        tuned = {weight.expert for weight in weights}
        self.left = [] if None in tuned else [number for number in range(len(stored)) if number not in tuned]
        self.left_as = stored.detach()[self.left].float()
        """Experts that were skipped: their numbers, and what they are."""
        self.kept[self.left] = False
        self.master = stored.detach().float().requires_grad_()
        self.on_grid = {weight.expert: (weight, grids[weight.name]) for weight in weights if weight.name in grids}
        self.stretch = {expert: torch.zeros_like(grid.scales, dtype=torch.float32).requires_grad_()
                        for expert, (_, grid) in self.on_grid.items()}  # fmt: skip

    def groups(self, scale: float) -> list[dict[str, Any]]:
        """What the optimiser is to change, and how fast, all rates times `scale`."""
        size = scale * float(self.master.detach()[self.kept].square().mean().sqrt())
        return [{"params": [self.master], "lr": (GRID_RATE if self.on_grid else RATE) * size},
                *({"params": [stretch], "lr": scale * SCALE_RATE} for stretch in self.stretch.values())]  # fmt: skip

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: zeros are zeros again, and what was skipped is what it was."""
        self.master.mul_(self.kept)
        self.master[self.left] = self.left_as

    def rounded(self) -> torch.Tensor:
        """The parameter as it would be stored."""
        if None in self.on_grid:
            return self._matrix(self.master, None)
        if not self.on_grid:
            return self.master.to(self.stored.dtype)
        return torch.stack([self._matrix(part, expert) for expert, part in enumerate(self.master.unbind())])

    def grids(self) -> dict[str, Grid]:
        """The grids with the scales as they are now, by their weights' full names."""
        return {weight.name: replace(grid, scales=self._scales(expert).detach().to(grid.scales.dtype))
                for expert, (weight, grid) in self.on_grid.items()}  # fmt: skip

    def _scales(self, expert: int | None) -> torch.Tensor:
        return self.on_grid[expert][1].scales.float() * self.stretch[expert].exp()

    def _matrix(self, values: torch.Tensor, expert: int | None) -> torch.Tensor:
        """One matrix of the parameter, rounded; `values` and the result as they are stored."""
        if expert not in self.on_grid:
            return values.to(self.stored.dtype)
        weight, grid = self.on_grid[expert]
        rounded = Rounded.apply(values.T if weight.transposed else values, self._scales(expert), grid)
        return rounded.T if weight.transposed else rounded


def reconstruct(
    block: nn.Module, weights: Sequence[PrunableWeight], run: Run, inputs: Sequence[Inputs],
    *, epochs: int, seed: int, samples: int = 1, grids: dict[str, Grid] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Minimise the squared difference to the dense block's outputs, as a share of theirs, by Adam; zeros are kept.

    The kept weights are held in float32 meanwhile and rounded to their dtype or grid in every forward pass. The rate
    falls linearly to 0. Of several processes each has its part of every step's batch; gradients are summed.

    Args:
        weights: the block's prunable weights; the parameters that hold them are what is tuned.
        run: (the block with other tensors, X, number of the batch) -> its output, X (samples, tokens, hidden_size).
        inputs: give X, what the block is to put out, and number of each step (of this process's part of it), drawn in
            random order. X is what the pruned blocks before put out, the target what the dense model's block does, so
            that this one makes up for those before, too.
        samples: in a step, of all processes together.
        grids: those of weights that lie on one, by full name; the tuned ones take their place.

    Returns:
        Mean loss of the first and of the last epoch.

    Raises:
        UsageError: a loss is not finite.

    Source: EBFT §3 (block-wise reconstruction of sparse models), arXiv:2402.12419; here Adam, with steps in
    proportion to each parameter's weights.
    """
    grids = {} if grids is None else grids
    tuned = _tuned(block, weights, grids)
    optimizer = torch.optim.Adam(
        [group for parameter in tuned.values() for group in parameter.groups(math.sqrt(samples))],
        betas=BETAS, eps=1e-20, fused=True,  # gradients may be of any size
    )  # fmt: skip
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    steps = epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def step(x: torch.Tensor, target: torch.Tensor, batch: int) -> float:
        with torch.no_grad():
            target = target.float()
            told = torch.stack([target.square().sum(), target.new_tensor(float(target.numel()))])
            size, numel = processes.add_up(told)
        with torch.enable_grad():
            rounded = {name: parameter.rounded() for name, parameter in tuned.items()}
            output = run(Substituted(block, rounded), x, batch)
            loss = (output.float() - target).square().sum() / size
            optimizer.zero_grad()
            (loss * numel).backward()
        (total,) = processes.add_up_gradients(trained, [float(loss.detach())])
        if not math.isfinite(total):
            raise UsageError(NOT_FINITE)
        optimizer.step()
        schedule.step()
        for parameter in tuned.values():
            parameter.settle()
        return total

    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator).tolist()
        losses.append(sum(step(*inputs[number]()) for number in order) / len(inputs))
    for each in trained:
        processes.send_to_all(each.data, 0)
    for parameter in tuned.values():
        parameter.stored.data.copy_(parameter.rounded().detach())
        grids |= parameter.grids()
    console.detail(f"  reconstruction: mean loss {losses[0]:.3g} in the first epoch, {losses[-1]:.3g} in the last")
    return losses[0], losses[-1]


def _tuned(block: nn.Module, weights: Sequence[PrunableWeight], grids: dict[str, Grid]) -> dict[str, Tuned]:
    """The block's parameters that hold weights, by name, without those that are all zeros."""
    held: dict[tuple[nn.Module, str], list[PrunableWeight]] = {}
    for weight in weights:
        held.setdefault((weight.module, weight.key), []).append(weight)
    return {f"{prefix}.{key}": Tuned(stored, held[module, key], grids) for prefix, module in block.named_modules()
            for key, stored in module.named_parameters(recurse=False)
            if (module, key) in held and bool(stored.any())}  # fmt: skip
