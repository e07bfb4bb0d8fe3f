"""Log-likelihoods of continuations, where what the choices of a question have in common is computed once.

The choices' tokens are put into rows with branches (see `prefix_tree`), which the model is told of by position ids and
a 4-D attention mask. A model that such rows are not for gets plain ones, one a branch. The head is applied to the
hidden states that are asked for alone.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import first_line
from lors_cli.evaluation.prefix_tree import ROW_TOKENS, Choice, Row, build_rows, make_batches
from lors_cli.machine import processes
from lors_cli.models.blocks import has_plain_head
from lors_cli.output import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist in float32 at once."""
WINDOW_KEY = re.compile(r"(window|chunk)(_size)?$")
"""Settings that let a layer see only the last so many positions; a tree that is no deeper does not notice."""
PROBE_LENGTHS = (16, 12)
"""Tokens of context and of each branch in the trial of a model."""
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Relative difference of the trial's logits that is rounding. Half-precision dtypes: see `why_not_branches`."""


@dataclass(frozen=True)
class _Abilities:
    """What a trial has shown of a model."""

    head: bool
    """Its logits are its head's plain outputs."""
    branches: bool
    window: int | None


_known: weakref.WeakKeyDictionary[Any, _Abilities] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def score_choices(
    model: PreTrainedModel,
    choices: Sequence[Choice],
    *,
    batch_size: int,
    on_progress: Callable[[int], object] = lambda choices: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of every choice's targets, and whether each target is the likeliest token.

    Several processes deal out the batches, which are those of one process.

    Args:
        batch_size: a batch has at most so many tokens as this number of the longest sequence.
        on_progress: called with the number of choices that were scored since the last call.

    Returns:
        Sum of the targets' log-probabilities (float32 softmax) in nats, and the greedy flag, by choice.
    """
    if not choices:
        return []
    if model not in _known:
        _known[model] = processes.from_main(lambda: _try_out(model))
    able = _known[model]
    max_tokens = batch_size * max(len(choice.tokens) for choice in choices)
    rows = build_rows(choices, max_tokens=max_tokens, branches=able.branches, window=able.window)
    batches = list(make_batches(rows, max_tokens))
    found = processes.deal(
        batches,
        lambda batch: _score_batch(model, batch, choices, able.head),
        lambda batch: on_progress(sum(len(row.reads) for row in batch)),
    )
    results = {number: result for part in found for number, result in part.items()}
    return [results[number] for number in range(len(choices))]


def _score_batch(
    model: PreTrainedModel, batch: list[Row], choices: Sequence[Choice], head: bool
) -> dict[int, tuple[float, bool]]:
    """Results by number of the choice."""
    places: dict[tuple[int, int], int] = {}
    reads = [(index, *read) for index, row in enumerate(batch) for read in row.reads]
    picks = [places.setdefault((index, node), len(places)) for index, _, nodes in reads for node in nodes]
    targets = [target for _, number, _ in reads for target in choices[number].targets]
    values, likeliest = _log_probabilities(_outputs(model, batch, list(places), head), model, head, picks, targets)
    results, first = {}, 0
    for _, number, nodes in reads:
        part = slice(first, first + len(nodes))
        results[number] = (float(values[part].sum()), bool(likeliest[part].all()))
        first = part.stop
    return results


def _outputs(model: PreTrainedModel, batch: list[Row], places: list[tuple[int, int]], head: bool) -> torch.Tensor:
    """Hidden states, or without `head` logits, at (row, node) places: (places, hidden_size or vocabulary)."""
    length = len(batch[0].tokens)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    for row_ids, row in zip(ids, batch, strict=True):
        row_ids[: len(row.tokens)] = torch.tensor(row.tokens)
    inputs = {"input_ids": ids}
    if batch[0].branches:
        positions = torch.zeros_like(ids)
        seen = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)  # a pad sees itself: no row is empty
        for index, row in enumerate(batch):
            size = len(row.tokens)
            positions[index, :size] = torch.tensor(row.positions)
            seen[index, :size, :size] = row.mask()
        bias = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
        inputs |= {"position_ids": positions, "attention_mask": bias[:, None]}
    on_device: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    found = model.base_model(**on_device, use_cache=False)[0] if head else model(**on_device, use_cache=False).logits
    rows, nodes = torch.tensor(places, device=found.device).T
    return found[rows, nodes]


def _log_probabilities(
    outputs: torch.Tensor, model: PreTrainedModel, head: bool, picks: list[int], targets: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every target at its place, float32, and whether it is the likeliest token; on the CPU."""
    layer: Any = model.get_output_embeddings()
    if head:
        outputs = outputs.to(layer.weight.device)
    at, wanted = (torch.tensor(values, device=outputs.device) for values in (picks, targets))
    values = torch.empty(len(picks), dtype=torch.float32, device=outputs.device)
    likeliest = torch.empty(len(picks), dtype=torch.bool, device=outputs.device)
    vocabulary_size = layer.weight.shape[0] if head else outputs.shape[-1]
    size = max(1, CHUNK_LOGITS.get(outputs.device.type, CHUNK_LOGITS["cuda"]) // vocabulary_size)
    for first in range(0, len(outputs), size):
        part = outputs[first : first + size]
        logits = torch.log_softmax(layer(part) if head else part, dim=-1, dtype=torch.float32)
        here = (at >= first) & (at < first + size)
        local = at[here] - first
        values[here] = logits[local, wanted[here]]
        likeliest[here] = logits.argmax(-1)[local] == wanted[here]
    return values.cpu(), likeliest.cpu()


def _try_out(model: PreTrainedModel) -> _Abilities:
    """Find out what the model can do, and log what it cannot."""
    generator = torch.Generator().manual_seed(0)
    context, branch = PROBE_LENGTHS
    embeddings: Any = model.get_input_embeddings()
    ids = torch.randint(embeddings.weight.shape[0], (context + 3 * branch,), generator=generator)
    shared, *tails = ids.split([context, branch, branch, branch])
    probe = [Choice([*shared.tolist(), *tail.tolist()], tail.tolist()) for tail in tails]
    why_no_head = why_not_head(model, probe)
    why_no_branches = why_not_branches(model, probe)
    if why_no_head:
        console.info(f"  slower scoring, all logits are computed: {why_no_head}")
    if why_no_branches:
        console.info(f"  slower scoring, the choices of a question do not share their context: {why_no_branches}")
    return _Abilities(not why_no_head, not why_no_branches, _window(model))


@torch.inference_mode()
def why_not_head(model: PreTrainedModel, probe: Sequence[Choice]) -> str:
    """Why the head cannot be applied to some hidden states alone; empty if it can. Found by trying it on `probe`."""
    head: Any = model.get_output_embeddings()
    if not has_plain_head(model):
        return "the model's head is no plain linear on top of its base model"
    ids = torch.tensor([list(probe[0].tokens)], device=model.device)
    ours = head(model.base_model(input_ids=ids, use_cache=False)[0].to(head.weight.device)).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float().to(ours.device)
    if not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
        return "the model's logits are not its head's plain outputs (scaled or capped)"
    return ""


@torch.inference_mode()
def why_not_branches(model: PreTrainedModel, probe: Sequence[Choice]) -> str:
    """Why a row with branches gives other logits than plain rows; empty if it does not.

    Found by trying it on `probe`, choices of one context.
    """
    if model.config.model_type == "gpt_neo":
        return "GPTNeo's local attention counts places in the row"
    logits = []
    for branches in (False, True):
        rows = build_rows(probe, max_tokens=ROW_TOKENS, branches=branches)
        places = [(index, node) for index, row in enumerate(rows) for _, nodes in row.reads for node in nodes]
        try:
            logits.append(_outputs(model, rows, places, head=False).float())
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            if not branches:
                raise
            return f"{type(model).__name__} takes no 4-D attention mask ({first_line(error)})"
    plain, packed = logits
    if plain.isnan().any():
        return ""
    apart = (packed - plain).norm(dim=-1) / (plain - plain.mean(-1, keepdim=True)).norm(dim=-1)
    size = len(probe[0].targets)
    # Before the first branch ends, rows are the same: what differs is rounding, by which the others are judged.
    rounding, found = float(apart[:size].median()), float(apart[size:].median())
    limit = TOLERANCE.get(model.dtype, min(0.2, 4 * rounding + 0.01))
    if not (rounding <= limit and found <= limit):
        return f"{type(model).__name__} gives other logits with a 4-D attention mask (by {max(found, rounding):.2g})"
    return ""


def _window(model: PreTrainedModel) -> int | None:
    """The fewest positions that any layer sees, None where all see everything."""
    settings = model.config.get_text_config().to_dict()
    found = [size for key, size in settings.items() if WINDOW_KEY.search(key)]
    return min((size for size in found if type(size) is int and size > 0), default=None)  # some are switches
