"""Sums statistics of what the weights of a decoder block read, while the block runs.

Linears and Conv1D are heard through hooks. Fused experts run through `forward_experts` for the while: an expert's
inputs are those of the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lors_cli.errors import UsageError
from lors_cli.models.blocks import PrunableWeight
from lors_cli.pruning.methods.statistics import InputStatistics, Kind
from lors_cli.pruning.walk.calibration import replaced
from lors_cli.pruning.walk.experts import forward_experts

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], None]
Clock = Callable[[str], AbstractContextManager[None]]


def _no_clock(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


class BlockDone(Exception):
    """Every input of this batch is known: the rest of the block's forward pass need not be run."""


@dataclass
class InputGroup:
    """Weights of a block that read the very same tensors, and what is known of these."""

    names: list[str]
    statistics: InputStatistics


class InputRecorder:
    """Collects statistics once a group of weights that share an input (q/k/v, gate/up); each expert's are its own.

    Which weights share is seen in the first batch: they are called with the same tensor objects. `groups` is complete
    from the end of the first batch on, in the order the block calls them, experts last; an expert that no token
    reached has `statistics.num_tokens == 0`.

    Args:
        weights: a block's prunable weights by name.
        kind: which statistics.
        stop_after_last: raise `BlockDone` out of the block as soon as a batch's last input is known, from the second
            batch on. It has no effect where the block has fused experts, or calls a weight more than once a pass.
        clock: counts the time of summing as phase “statistics”.
    """

    def __init__(
        self, weights: dict[str, PrunableWeight], kind: Kind, *, stop_after_last: bool = False, clock: Clock = _no_clock
    ) -> None:
        self.kind = kind
        self._clock = clock
        self.groups: list[InputGroup] = []
        self._weights = weights
        self._experts = {(weight.module, weight.key, weight.expert): InputGroup([name], InputStatistics(kind))
                         for name, weight in weights.items() if weight.expert is not None}  # fmt: skip
        self._may_stop = stop_after_last and not self._experts
        self._seen: dict[int, tuple[torch.Tensor, InputStatistics]] = {}
        self._calls: dict[str, list[int]] = {}
        self._reached: set[str] = set()
        self._listening = ExitStack()
        self._listen({name: partial(self._first, name) for name, weight in weights.items() if weight.expert is None})

    def end_batch(self) -> None:
        """Close a batch; after the first, only one weight a group keeps listening.

        Raises:
            UsageError: a weight was not called at all, which is named.
        """
        self._reached.clear()
        if self.groups:
            return
        called = {self._weights[name].module for name in self._calls}
        called |= {module for (module, _, _), group in self._experts.items() if group.statistics.num_tokens}
        unused = [name for name, weight in self._weights.items() if weight.module not in called]
        if unused:
            raise UsageError(f"not supported: {unused[0]} is never called in its block's forward pass.")
        self.groups = [*self._shared(), *self._experts.values()]
        self._may_stop &= all(len(inputs) == 1 for inputs in self._calls.values())
        self._seen.clear()
        self._listen({group.names[0]: partial(self._later, group) for group in self.groups
                      if group.names[0] in self._calls})  # fmt: skip

    def close(self) -> None:
        """Remove every hook and give experts their own forward back."""
        self._listening.close()

    def _listen(self, hooks: dict[str, Hook]) -> None:
        """Hear the named weights and all experts, and nothing else."""
        self.close()
        for experts in dict.fromkeys(module for module, _, _ in self._experts):
            forward = partial(forward_experts, experts, partial(self._routed, experts))
            self._listening.enter_context(replaced({experts: forward}))
        for name, hook in hooks.items():
            self._listening.callback(self._weights[name].module.register_forward_pre_hook(hook).remove)

    def _first(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """In the first batch: sum each tensor once, and note who reads it."""
        key = id(args[0])
        if key not in self._seen:
            statistics = InputStatistics(self.kind)
            with self._clock("statistics"):
                statistics.update(args[0])
            self._seen[key] = args[0], statistics  # holds the tensor, so that no other can take its place
        self._calls.setdefault(name, []).append(key)

    def _later(self, group: InputGroup, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        with self._clock("statistics"):
            group.statistics.update(args[0])
        self._reached.add(group.names[0])
        if self._may_stop and len(self._reached) == len(self.groups):
            raise BlockDone

    def _routed(self, experts: nn.Module, expert: int, key: str, x: torch.Tensor) -> None:
        group = self._experts.get((experts, key, expert))
        if group is not None:  # not one to skip
            with self._clock("statistics"):
                group.statistics.update(x)

    def _shared(self) -> list[InputGroup]:
        """Weights that were called with the same tensors in the first batch."""
        names: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in self._calls.items():
            names.setdefault(tuple(inputs), []).append(name)
        return [InputGroup(group, _together([self._seen[key][1] for key in inputs])) for inputs, group in names.items()]


def _together(parts: Sequence[InputStatistics]) -> InputStatistics:
    """The statistics of several inputs as one; those of a single input are handed on as they are."""
    if len(parts) == 1:
        return parts[0]
    totals = [part.total for part in parts if part.total is not None]
    total = torch.stack(totals).sum(0) if totals else None
    num_samples, num_tokens = (sum(getattr(part, key) for part in parts) for key in ("num_samples", "num_tokens"))
    return InputStatistics(parts[0].kind, total, num_samples, num_tokens)
