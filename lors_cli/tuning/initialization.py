"""Where the adapters start: along the loss gradient.

Legend: dW (R, C) loss gradient at a weight, A = lora_A (r, C), R out_features, C in_features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lors_cli.data.samples import IGNORED
from lors_cli.errors import UsageError
from lors_cli.output import progress
from lors_cli.tuning.baselines import check_inputs
from lors_cli.tuning.head import Loss, model_loss
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.sketch import GradientSketch, SketchedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_AT_ONCE = 8
"""At most one part in so many of all dW is in memory at a time (but always one layer)."""
SMALLEST_BUDGET = 64 << 20


def top_right_singular_vectors(dW: torch.Tensor, rank: int, *, seed: int = 0) -> torch.Tensor:
    """An orthonormal basis (r, C) of the directions of the input that dW (R, C) acts on most, in float32.

    Rows fall by singular value, each with its largest entry positive. Large matrices take a randomised range finder,
    started by `seed`.

    Raises:
        UsageError: the rank is above C.

    Source: truncated SVD by subspace iteration, Halko et al. Algorithm 5.1, arXiv:0909.4061.
    """
    num_rows, num_columns = dW.shape
    if rank > num_columns:
        raise UsageError(f"rank: {rank} is above a layer's {num_columns} inputs; choose a smaller rank.")
    width = 2 * rank + 16
    if width >= min(num_rows, num_columns):
        vectors = torch.linalg.svd(dW, full_matrices=True).Vh[:rank]
    else:
        with torch.random.fork_rng(devices=[dW.device] if dW.is_cuda else []):
            torch.manual_seed(seed)
            vectors = torch.svd_lowrank(dW, q=width, niter=4)[2].T[:rank]
    return _with_fixed_signs(vectors)


def _with_fixed_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Each row with its largest entry positive."""
    peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0)


def gradient_directions(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Linear | AdapterLinear],
    batches: list[dict[str, torch.Tensor]],
    rank: int,
    *,
    seed: int,
    exact: bool = False,
    loss: Loss = model_loss,
) -> dict[str, torch.Tensor]:
    """The top right singular vectors of the loss gradient dW of every linear, summed over the samples.

    By default they come from sketches that one forward and backward pass over the samples fills. Exactly, layers are
    taken a few at a time, so that never more than an eighth of all dW is in memory (a single layer where that is
    more); each group costs one pass.

    Args:
        model: the sparse model; as before afterwards.
        linears: by full name; their weights need no gradient before and after. Adapters on them are passed by.
        seed: of the sketches, or the SVD's random start.
        exact: form dW.

    Returns:
        (r, C) float32 by name.

    Raises:
        UsageError: a gradient is not finite, or the rank is too large.
    """
    check_inputs(rank, {name: linear.in_features for name, linear in linears.items()})
    with _checkpointing(model):
        if not exact:
            return _sketched_directions(model, linears, batches, rank, seed, loss)
        directions = {}
        groups = list(_layer_groups(linears))
        with progress.progress("gradient init", len(groups), "layer groups") as task:
            for group in groups:
                for name, dW in _summed_gradients(model, group, batches, loss).items():
                    _check_finite(name, dW)
                    directions[name] = top_right_singular_vectors(dW, rank, seed=seed)
                task.advance()
        return directions


def _sketched_directions(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear | AdapterLinear],
    batches: list[dict[str, torch.Tensor]], rank: int,
    seed: int, loss: Loss,
) -> dict[str, torch.Tensor]:  # fmt: skip
    sketches = {
        name: GradientSketch(
            linear.out_features, linear.in_features, rank, seed=seed + index, device=linear.weight.device
        )
        for index, (name, linear) in enumerate(linears.items())
    }
    try:
        for name, linear in linears.items():
            model.set_submodule(name, SketchedLinear(linear, sketches[name]))
        with progress.progress("gradient init", len(batches), "batches") as task:
            for _ in _backward_passes(model, batches, loss):
                task.advance()
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
    directions = {}
    for name in linears:
        sketch = sketches.pop(name)
        _check_finite(name, sketch.T)
        directions[name] = _with_fixed_signs(sketch.right_singular_vectors(rank))
    return directions


def _check_finite(name: str, gradient: torch.Tensor) -> None:
    if not bool(torch.isfinite(gradient).all()):
        raise UsageError(f"the loss gradient of {name} is not finite; try dtype: float32.")


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Blocks recompute their activations only in training mode; dropout, which knows that mode too, stays off."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    rates = []
    for block in modes:
        if getattr(block, "gradient_checkpointing", False):
            block.training = True  # of itself, not of what is in it
            rates += [(block, name, rate) for name, rate in vars(block).items()
                      if "dropout" in name and isinstance(rate, float)]  # fmt: skip
    for block, name, _ in rates:
        setattr(block, name, 0.0)
    try:
        yield
    finally:
        for block, name, rate in rates:
            setattr(block, name, rate)
        for module, mode in modes.items():
            module.training = mode


def _layer_groups(linears: Mapping[str, Any]) -> Iterator[dict[str, nn.Linear]]:
    """Runs of layers, last ones first: their backward passes are the shortest."""
    sizes = {name: 4 * linear.weight.numel() for name, linear in linears.items()}
    budget = max(SMALLEST_BUDGET, sum(sizes.values()) // SHARE_AT_ONCE)
    group: dict[str, nn.Linear] = {}
    used = 0
    for name, linear in reversed(list(linears.items())):
        if group and used + sizes[name] > budget:
            yield group
            group, used = {}, 0
        group[name] = linear
        used += sizes[name]
    yield group


def _summed_gradients(
    model: PreTrainedModel, group: dict[str, nn.Linear], batches: list[dict[str, torch.Tensor]], loss: Loss
) -> dict[str, torch.Tensor]:
    """dW (R, C) float32 of each layer of the group, one backward pass a batch."""
    totals = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in group.items()}

    def add(total: torch.Tensor, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    handles = []
    try:
        for name, linear in group.items():
            linear.weight.requires_grad_(True)
            handles.append(linear.weight.register_post_accumulate_grad_hook(partial(add, totals[name])))
        for _ in _backward_passes(model, batches, loss):
            pass
    finally:
        for handle in handles:
            handle.remove()
        for linear in group.values():
            linear.weight.requires_grad_(False)
    return totals


def _backward_passes(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], loss: Loss) -> Iterator[None]:
    """The loss over all samples, one batch after the other, and its gradient; yields after each."""
    num_labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    divisor = 1 if model.dtype == torch.float16 else num_labels  # directions do not know it, float16 would lose some
    for batch in batches:
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        loss(model, inputs, divisor).backward()
        yield
