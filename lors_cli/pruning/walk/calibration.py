"""Run calibration sequences through a model one decoder block at a time.

Blocks get the very keyword arguments that the model itself passes them, captured once and handed through untouched:
masks and rotary tables differ between families and, in some, between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class BlockArguments:
    """What the model passes to one block besides the hidden states: (positional, keyword) by batch size."""

    by_batch_size: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def run(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """The output hidden states (samples, tokens, hidden_size) of a block, or of what stands for it."""
        positional, keyword = self.by_batch_size[hidden.shape[0]]
        output = block(hidden, *positional, **keyword)
        return output[0] if isinstance(output, tuple) else output


class _Captured(Exception):
    """The last block was reached: nothing after it need be run."""


def first_inputs(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[torch.Tensor],
    device: torch.device,
    arguments: list[BlockArguments],
) -> Iterator[torch.Tensor]:
    """The first block's input for every batch, made one at a time; every block's other arguments are noted.

    The blocks themselves are not run: each is replaced, for the while, by a recorder that hands its input on. What
    comes after the last one is not run either.

    Args:
        model: a causal LM; only what comes before its blocks need have weights.
        blocks: its decoder blocks.
        batches: (samples, tokens) int64 each.
        device: where to run.
        arguments: one a block, filled here: complete once a batch of each size was run.
    """
    for batch in batches:
        yield _first_input(model, blocks, batch.to(device), arguments)


def capture(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[BlockArguments]]:
    """`first_inputs` of all batches and every block's other arguments, on the device of a model that is there whole."""
    arguments = [BlockArguments() for _ in blocks]
    device = next(model.parameters()).device
    return list(first_inputs(model, blocks, batches, device, arguments)), arguments


@torch.no_grad()
def _first_input(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batch: torch.Tensor, arguments: list[BlockArguments]
) -> torch.Tensor:
    first: list[torch.Tensor] = []
    with _recorders(blocks, arguments, first), suppress(_Captured):
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return first[0]


@contextmanager
def _recorders(
    blocks: Sequence[nn.Module], arguments: list[BlockArguments], first: list[torch.Tensor]
) -> Iterator[None]:
    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *positional: Any, **keyword: Any) -> torch.Tensor:
            if index == 0:
                first.append(hidden_states.clone())
            arguments[index].by_batch_size.setdefault(hidden_states.shape[0], (positional, keyword))
            if index == len(blocks) - 1:
                raise _Captured
            return hidden_states

        return forward

    originals = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if "forward" in vars(block):
                del block.forward
            if block.forward != original:
                block.forward = original
