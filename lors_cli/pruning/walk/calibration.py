"""Run calibration sequences through a model one decoder block at a time.

Blocks get the very arguments that the model itself passes them, captured for every batch and handed through untouched:
masks and rotary tables differ between families and, in some, between blocks; Gemma 3n's and 4's per-layer inputs differ
between texts. A mapping that blocks write to (keys and values that later ones share) is each batch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Forward = Callable[..., Any]
Place = tuple[Any, ...]
"""Where an argument stands: the block's index, the argument's name or number, its place in a tuple."""


@dataclass
class BlockArguments:
    """What the model passes to one block besides the hidden states: (positional, keyword) by batch number."""

    by_batch: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    empty: list[MutableMapping[Any, Any]] = field(default_factory=list)
    """Mappings among them that hold nothing before the blocks are run."""

    def run(self, block: Callable[..., Any], hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """The output hidden states (samples, tokens, hidden_size) of a block, or of what stands for it."""

        def here(place: Place, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(hidden.device)

        positional, keyword = self.by_batch[batch]
        named = {key: _map(here, (key,), value) for key, value in keyword.items()}
        output = block(hidden, *_map(here, (), positional), **named)
        return output[0] if isinstance(output, tuple) else output

    def apart(self, twins: dict[int, MutableMapping[Any, Any]]) -> BlockArguments:
        """The same for another run of the same texts, which mappings are not shared with: by id, its are `twins`."""

        def own(value: Any) -> Any:
            return twins.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

        by_batch = {number: (tuple(map(own, positional)), {key: own(value) for key, value in keyword.items()})
                    for number, (positional, keyword) in self.by_batch.items()}  # fmt: skip
        return BlockArguments(by_batch, [*map(own, self.empty)])

    @property
    def shared(self) -> bool:
        """Whether blocks have left anything for later ones, such as keys and values."""
        return any(map(len, self.empty))


class _Captured(Exception):
    """The head was reached: nothing after the blocks need be run."""


class _Misread(Exception):
    """The model does not hand on from block to block just what a block returned; says what it does."""


CHANGED = "it changes hidden states between its blocks"
_SECOND = object()
"""What stands for all that a block may return besides hidden states."""


def first_inputs(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: dict[int, torch.Tensor],
    device: torch.device,
    arguments: list[BlockArguments],
    aside: torch.device | None = None,
) -> Iterator[torch.Tensor]:
    """The first block's input for every batch, made one at a time; every block's other arguments are noted.

    The blocks themselves are not run: each is replaced, for the while, by a recorder that hands its input on. The head
    is not run either.

    Args:
        model: a causal LM; blocks and head need no weights.
        blocks: its decoder blocks.
        batches: (samples, tokens) int64 each, by number.
        device: where to run.
        arguments: one a block, filled here.
        aside: where to keep arguments that differ from text to text; None for the device.

    Raises:
        UsageError: the model does more between its blocks than hand hidden states on.
    """
    recorders = _Recorders(model, blocks, arguments, aside)
    for number, batch in batches.items():
        yield recorders.first_input(number, batch.to(device))


def capture(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[BlockArguments]]:
    """`first_inputs` of all batches and every block's other arguments, on the device of a model that is there whole."""
    arguments = [BlockArguments() for _ in blocks]
    device = next(model.parameters()).device
    return list(first_inputs(model, blocks, dict(enumerate(batches)), device, arguments)), arguments


class _Recorders:
    """Stand in for a model's blocks while it is called, note what they are given, and return what blocks return.

    Whether that is a tensor, or a tuple that starts with it, is found by trial: the next block has to be given what the
    one before returned, unchanged.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[nn.Module], arguments: list[BlockArguments],
        aside: torch.device | None,
    ) -> None:  # fmt: skip
        self._model, self._blocks, self._arguments, self._aside = model, blocks, arguments, aside
        self._ways = [False, True]  # whether blocks return tuples
        self._first = self._copy = torch.empty(0)
        self._state: tuple[Any, ...] = ()
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def first_input(self, number: int, batch: torch.Tensor) -> torch.Tensor:
        """Run the model on a batch, and note what its blocks are given."""
        errors: list[Exception] = []
        for as_tuple in self._ways:
            try:
                self._call(batch, as_tuple)
            except Exception as error:
                if not self._calls and not isinstance(error, _Misread):  # it failed before its blocks
                    raise
                errors.append(error)
            else:
                self._ways = [as_tuple]
                self._note(number)
                return self._copy
        reasons = [str(error) for error in errors if isinstance(error, _Misread)]
        if not reasons:
            raise errors[0]
        reason = next((reason for reason in reasons if reason != CHANGED), CHANGED)
        raise UsageError(
            f"{type(self._model).__name__} is not supported: {reason}.",
            "Methods that need no calibration text (magnitude) do not run blocks, and can prune it.",
        ) from errors[0]

    @torch.no_grad()
    def _call(self, batch: torch.Tensor, as_tuple: bool) -> None:
        self._calls = []
        forwards = {block: self._recorder(index, as_tuple) for index, block in enumerate(self._blocks)}
        head = self._model.get_output_embeddings()
        with replaced(forwards if head is None else {**forwards, head: _stop}), suppress(_Captured):
            self._model(input_ids=batch, use_cache=False)
        if len(self._calls) < len(self._blocks):
            raise _Misread(f"it calls only {len(self._calls)} of its {len(self._blocks)} blocks")

    def _recorder(self, index: int, as_tuple: bool) -> Forward:
        def forward(hidden_states: torch.Tensor, *positional: Any, **keyword: Any) -> Any:
            if index != len(self._calls):
                raise _Misread("it calls its blocks more than once, or in another order than they are listed in")
            if index == 0:
                self._first, self._copy, self._state = hidden_states, hidden_states.clone(), _state(hidden_states)
            elif any(value is _SECOND for value in (*positional, *keyword.values())):
                raise _Misread("its blocks hand more than hidden states on to the next one")
            elif _state(hidden_states) != self._state:
                raise _Misread(CHANGED)
            self._calls.append((positional, keyword))
            return (hidden_states, _SECOND) if as_tuple else hidden_states

        return forward

    def _note(self, number: int) -> None:
        """Keep the arguments of a batch; a tensor that equals the first batch's in its place is held once for both."""
        done: dict[tuple[int, int], torch.Tensor] = {}

        def kept(place: Place, tensor: torch.Tensor) -> torch.Tensor:
            known = self._known.setdefault((*place, tensor.shape, tensor.dtype), tensor)
            key = id(known), id(tensor)
            if key not in done:
                is_same = known is tensor or torch.equal(known, tensor)
                done[key] = known if is_same else tensor if self._aside is None else tensor.to(self._aside)
            return done[key]

        for index, (positional, keyword) in enumerate(self._calls):
            noted, values = self._arguments[index], (*positional, *keyword.values())
            noted.empty += [value for value in values if isinstance(value, MutableMapping) and not value]
            named = {key: _map(kept, (index, key), value) for key, value in keyword.items()}
            noted.by_batch[number] = _map(kept, (index,), positional), named
        self._calls = []


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What stays the same as long as a tensor, or a view of all of it, is not changed."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version


def _map(change: Callable[[Place, torch.Tensor], torch.Tensor], place: Place, value: Any) -> Any:
    """An argument with its tensors, in tuples too, changed; anything else is the very same object."""
    if isinstance(value, torch.Tensor):
        return change(place, value)
    if type(value) is tuple:
        return tuple(_map(change, (*place, number), part) for number, part in enumerate(value))
    return value


def _stop(*args: Any, **kwargs: Any) -> None:
    raise _Captured


@contextmanager
def replaced(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Modules with other forwards, for as long as the context lasts."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, original in own.items():
            del module.forward
            if original is not None:
                module.forward = original
