"""Run calibration sequences through a model one decoder block at a time.

Blocks get the very keyword arguments that the model itself passes them, captured once and handed through untouched:
masks and rotary tables differ between families and, in some, between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError
from lors_cli.pruning.statistics import InputStatistics, Kind

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class BlockArguments:
    """What the model passes to one block besides the hidden states: (positional, keyword) by batch size."""

    by_batch_size: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output hidden states.

        Args:
            hidden: (samples, tokens, hidden_size).
        """
        positional, keyword = self.by_batch_size[hidden.shape[0]]
        output = block(hidden, *positional, **keyword)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def capture(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[BlockArguments]]:
    """The first block's input for every batch, and every block's other arguments.

    The blocks themselves are not run: each is replaced, for the while, by a recorder that hands its input on.

    Args:
        model: a causal LM.
        blocks: its decoder blocks.
        batches: (samples, tokens) int64 each.

    Returns:
        Hidden states (samples, tokens, hidden_size) a batch, on the model's device, and the arguments a block.
    """
    device = next(model.parameters()).device
    arguments = [BlockArguments() for _ in blocks]
    inputs: list[torch.Tensor] = []
    with _recorders(blocks, arguments, inputs):
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
    return inputs, arguments


@contextmanager
def _recorders(
    blocks: Sequence[nn.Module], arguments: list[BlockArguments], inputs: list[torch.Tensor]
) -> Iterator[None]:
    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, *positional: Any, **keyword: Any) -> torch.Tensor:
            if index == 0:
                inputs.append(hidden_states.clone())
            arguments[index].by_batch_size.setdefault(hidden_states.shape[0], (positional, keyword))
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


@dataclass
class InputGroup:
    """Linears of a block that read the very same tensor, and what is known of it."""

    names: list[str]
    statistics: InputStatistics


class InputRecorder:
    """Collects statistics once a group of linears that share an input (q/k/v, gate/up).

    Which linears share is seen in the first batch: they are called with the same tensor object.

    Args:
        linears: a block's linears by name.
        kind: which statistics.
    """

    def __init__(self, linears: dict[str, nn.Linear], kind: Kind) -> None:
        self.kind = kind
        self.groups: list[InputGroup] = []
        self._linears = linears
        self._seen: list[tuple[torch.Tensor, InputGroup]] = []
        self._handles = {name: linear.register_forward_pre_hook(self._first_hook(name))
                         for name, linear in linears.items()}  # fmt: skip

    def end_batch(self) -> None:
        """Close a batch; after the first, only one linear a group keeps listening."""
        self._seen.clear()
        if not self._handles:
            return
        reached = {name for group in self.groups for name in group.names}
        unused = [name for name in self._linears if name not in reached]
        if unused:
            raise UsageError(f"not supported: {unused[0]} is never called in its block's forward pass.")
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        self._leaders = [self._linears[group.names[0]].register_forward_pre_hook(self._hook(group))
                         for group in self.groups]  # fmt: skip

    def close(self) -> None:
        """Remove every hook."""
        for handle in [*self._handles.values(), *getattr(self, "_leaders", [])]:
            handle.remove()

    def _first_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for tensor, group in self._seen:
                if tensor is args[0]:
                    if name not in group.names:
                        group.names.append(name)
                    return
            for group in self.groups:
                if name in group.names:  # called again in the same pass, with another input
                    group.statistics.update(args[0])
                    return
            group = InputGroup([name], InputStatistics(self.kind))
            group.statistics.update(args[0])
            self.groups.append(group)
            self._seen.append((args[0], group))  # holds the tensor, so that no other can take its place

        return hook

    def _hook(self, group: InputGroup) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            group.statistics.update(args[0])

        return hook
