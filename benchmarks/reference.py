"""What the reference codes compute, in our own words: the arithmetic of locuslab/wanda's SparseGPT and Wanda.

Their plan, kept here for comparison: one calibration sequence a forward pass; every linear sums statistics of its own
in its own forward hook, though q/k/v and gate/up read the same input; SparseGPT's columns are updated one by one; a
second pass of the pruned block makes the next block's inputs. Their logging of losses is left out, which favours them.

Names in shapes: R out_features, C in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import PhaseTimer, linears_of
from torch import nn

from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.walk.calibration import BlockArguments, capture
from lors_cli.sparsity import Pattern

BLOCK_COLUMNS = 128
DAMPING = 0.01
METHODS = ("sparsegpt", "wanda")


class RunningHessian:
    """One linear's H = 2·XᵀX / n in float32, rescaled whenever another sequence comes in.

    Args:
        weight: (R, C).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        columns = weight.shape[1]
        self.hessian = torch.zeros(columns, columns, device=weight.device)
        self.num_samples = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Count one batch in: (samples, tokens, C)."""
        seen = self.num_samples
        self.num_samples += inputs.shape[0]
        self.hessian *= seen / self.num_samples
        columns = math.sqrt(2 / self.num_samples) * inputs.flatten(0, -2).t().float()
        self.hessian += columns.matmul(columns.t())


class RunningNorms:
    """One linear's mean over sequences of ‖X_j‖², rescaled whenever another sequence comes in.

    Args:
        weight: (R, C).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.squares = torch.zeros(weight.shape[1], device=weight.device)
        self.num_samples = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Count one batch in: (samples, tokens, C)."""
        seen = self.num_samples
        self.num_samples += inputs.shape[0]
        self.squares *= seen / self.num_samples
        columns = inputs.flatten(0, -2).t().float()
        self.squares += columns.norm(p=2, dim=1) ** 2 / self.num_samples


def sparsegpt(weight: torch.Tensor, statistics: RunningHessian, pattern: Pattern) -> torch.Tensor:
    """Prune one linear column by column.

    Args:
        weight: (R, C), left as it is.
        statistics: of its inputs; the Hessian is used up.
        pattern: N:M, or a share of each 128 columns.

    Returns:
        (R, C) in the weight's dtype.
    """
    work = weight.clone().float()
    hessian = statistics.hessian
    del statistics.hessian
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    work[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    hessian = torch.linalg.cholesky(hessian)
    hessian = torch.cholesky_inverse(hessian)
    factor = torch.linalg.cholesky(hessian, upper=True)  # U with H⁻¹ = UᵀU
    del hessian
    for start in range(0, work.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, work.shape[1])
        part, errors = _prune_columns(work[:, start:stop].clone(), factor[start:stop, start:stop], pattern)
        work[:, start:stop] = part
        work[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return work.to(weight.dtype)


def _prune_columns(columns: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one block of columns (R, 128); the pruned block and the errors that columns to its right make up for."""
    pruned, errors = torch.zeros_like(columns), torch.zeros_like(columns)
    if pattern.structured:
        gone = torch.zeros_like(columns, dtype=torch.bool)
    else:
        saliency = columns**2 / factor.diagonal().reshape(1, -1) ** 2
        threshold = saliency.flatten().sort()[0][int(saliency.numel() * pattern.sparsity)]
        gone = saliency <= threshold
    for i in range(columns.shape[1]):
        if pattern.m is not None and i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            _mark_lowest(gone, i, columns[:, group] ** 2 / factor.diagonal()[group].reshape(1, -1) ** 2, pattern)
        old = columns[:, i]
        new = old.clone()
        new[gone[:, i]] = 0
        pruned[:, i] = new
        error = (old - new) / factor[i, i]
        columns[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
        errors[:, i] = error
    return pruned, errors


def wanda(weight: torch.Tensor, statistics: RunningNorms, pattern: Pattern) -> torch.Tensor:
    """Set the lowest |W|·‖X_j‖ of each row, or of each M of a row, to zero.

    Args:
        weight: (R, C), left as it is.
        statistics: of its inputs.
        pattern: N:M, or a share of each row.

    Returns:
        (R, C) in the weight's dtype.
    """
    scores = weight.abs() * statistics.squares.reshape(1, -1).sqrt()
    gone = torch.zeros_like(scores, dtype=torch.bool)
    if pattern.m is not None:
        for first in range(0, scores.shape[1], pattern.m):
            _mark_lowest(gone, first, scores[:, first : first + pattern.m].float(), pattern)
    else:
        order = scores.sort(dim=-1, stable=True)[1]
        gone.scatter_(1, order[:, : int(scores.shape[1] * pattern.sparsity)], True)
    pruned = weight.clone()
    pruned[gone] = 0
    return pruned


def _mark_lowest(gone: torch.Tensor, first: int, scores: torch.Tensor, pattern: Pattern) -> None:
    """Mark all but the N highest of the M scores (R, M) of the group that starts at column `first`."""
    assert pattern.n is not None
    assert pattern.m is not None
    lowest = scores.topk(pattern.m - pattern.n, dim=1, largest=False)[1]
    gone.scatter_(1, first + lowest, True)


_STATISTICS: dict[str, Callable[[torch.Tensor], Any]] = {"sparsegpt": RunningHessian, "wanda": RunningNorms}
_PRUNERS: dict[str, Callable[[torch.Tensor, Any, Pattern], torch.Tensor]] = {"sparsegpt": sparsegpt, "wanda": wanda}


@torch.no_grad()
def prune_block(
    block: nn.Module,
    hidden: list[torch.Tensor],
    arguments: BlockArguments,
    method: str,
    pattern: Pattern,
    timer: PhaseTimer,
) -> list[torch.Tensor]:
    """Prune one decoder block in place.

    Args:
        block: a decoder block.
        hidden: its inputs, (1, tokens, hidden_size) a sequence.
        arguments: what the model passes it besides.
        method: one of `METHODS`.
        pattern: how many weights stay.
        timer: gets the phases `forward`, `statistics` and `solve`.

    Returns:
        The pruned block's outputs, one tensor a sequence.
    """
    linears = linears_of(block)
    statistics = {name: _STATISTICS[method](linear.weight) for name, linear in linears.items()}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            with timer.phase("statistics"):
                statistics[name].add(inputs[0])

        return add

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    with timer.phase("forward"):
        for number, sequence in enumerate(hidden):
            arguments.run(block, sequence, number)
    for handle in handles:
        handle.remove()
    with timer.phase("solve"):
        for name, linear in linears.items():
            linear.weight.data = _PRUNERS[method](linear.weight.data, statistics.pop(name), pattern)
    with timer.phase("forward"):
        return [arguments.run(block, sequence, number) for number, sequence in enumerate(hidden)]


def prune_reference(model: Any, batches: Sequence[torch.Tensor], method: str, pattern: Pattern) -> dict[str, float]:
    """Prune a causal LM in place as the reference codes do.

    Args:
        model: causal LM; forwards run in its dtype.
        batches: calibration tokens (samples, tokens) each; they are run sequence by sequence.
        method: one of `METHODS`.
        pattern: how many weights stay.

    Returns:
        Seconds a phase: `inputs` (of the first block), `forward`, `statistics`, `solve`.
    """
    _, blocks = decoder_blocks(model)
    timer = PhaseTimer(model.device)
    with timer.phase("inputs"):
        hidden, arguments = capture(model, list(blocks), [row[None] for batch in batches for row in batch])
    for block, own_arguments in zip(blocks, arguments, strict=True):
        hidden = prune_block(block, hidden, own_arguments, method, pattern, timer)
    return timer.seconds
