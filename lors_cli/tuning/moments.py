"""How large the inputs of linears are, and their projections on given directions, from a forward pass.

Legend: X (tokens, C) input of a linear, A (r, C) directions; C in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@torch.no_grad()
def channel_rms(
    model: PreTrainedModel, linears: dict[str, nn.Linear], batches: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The root mean square of every input channel of every linear, over the tokens of the samples.

    Args:
        model: in which the linears are.
        linears: by full name.
        batches: collated samples; padding is left out.

    Returns:
        (C,) float32 by name; a linear that no token came to is left out.
    """
    return _root_mean_squares(model, linears, batches, lambda name, X: X)


@torch.no_grad()
def projection_rms(
    model: PreTrainedModel,
    linears: dict[str, nn.Linear],
    batches: list[dict[str, torch.Tensor]],
    directions: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The root mean square of X·Aᵀ, column by column, over the tokens of the samples.

    Args:
        model: in which the linears are.
        linears: by full name.
        batches: collated samples; padding is left out.
        directions: A by name.

    Returns:
        (r,) float32 by name; a linear that no token came to is left out.
    """
    return _root_mean_squares(model, linears, batches, lambda name, X: X @ directions[name].T)


def _root_mean_squares(
    model: PreTrainedModel,
    linears: dict[str, nn.Linear],
    batches: list[dict[str, torch.Tensor]],
    look: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(linears, 0)

    def see(name: str, X: torch.Tensor) -> None:
        seen = look(name, X).square().sum(0)
        sums[name] = seen if name not in sums else sums[name].add_(seen)
        counts[name] += X.shape[0]

    with _seen_by(linears, see):
        for sample in _single_samples(batches):
            inputs = {key: value.to(model.device) for key, value in sample.items() if key != "labels"}
            model.base_model(**inputs, use_cache=False)
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


@contextmanager
def _seen_by(linears: dict[str, nn.Linear], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with each linear's name and its inputs (tokens, C) float32, as long as this lasts."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0].reshape(-1, args[0].shape[-1]).float())

    handles: list[Any] = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single_samples(batches: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Each sample as a batch of its own, without its padding."""
    for batch in batches:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {key: value[row : row + 1, :length] for key, value in batch.items()}
