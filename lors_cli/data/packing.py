"""Tokenised documents packed into blocks.

No special token is added here but the end-of-sequence token after each document, and what the caller puts before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lors_cli.data.samples import Sample, isolated_sample
from lors_cli.data.tokenising import batches, encode, eos_token_id
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig

if TYPE_CHECKING:
    import torch

_POOL_FACTOR, _POOL_MIN, _POOL_MAX = 16, 1_000, 10_000


def packed_blocks(
    documents: Iterator[str],
    tokenizer: Any,
    sequence_length: int,
    num_blocks: int | None,
    seed: int,
    streamed: bool,
    begin: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each ended by the end-of-sequence token, cut to full sequences, and these shuffled.

    Blocks are shuffled, not documents: one book alone would otherwise fill every sequence.

    Args:
        documents: texts; the last tokens that fill no sequence are dropped.
        num_blocks: how many to take after the shuffle; None for all.
        streamed: read only until there is a pool of 16 times num_blocks (at least 1,000 and at most the larger of
            10,000 and num_blocks), and shuffle that.
        begin: tokens before each document.

    Returns:
        (blocks, sequence_length) int64 tokens, fewer than num_blocks when the text ends before, and bool where a
        document starts; one that is cut goes on in another block, which need not follow.

    Raises:
        UsageError: a stream without num_blocks has no end, or the tokenizer no end-of-sequence token.
    """
    if streamed and num_blocks is None:
        raise UsageError("Streamed text has no end.", "Say how much of it to take: num_samples or max_steps.")
    pool = None
    if streamed and num_blocks is not None:
        pool = max(num_blocks, min(max(_POOL_FACTOR * num_blocks, _POOL_MIN), _POOL_MAX))
    packed, marked = blocks_in_order(documents, tokenizer, sequence_length, pool, begin)
    return shuffled_blocks(packed, marked, num_blocks, seed)


def shuffled_blocks(
    blocks: torch.Tensor, starts: torch.Tensor, num_blocks: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """So many of the blocks at random, and where documents start in them."""
    import torch

    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:num_blocks]
    return blocks[order], starts[order]


def blocks_in_order(
    documents: Iterator[str], tokenizer: Any, sequence_length: int, most: int | None, begin: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of `packed_blocks` as they lie in the text, at most so many."""
    import torch

    end = eos_token_id(tokenizer)
    blocks: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    rest: list[int] = []
    rest_starts: list[int] = []
    for batch in batches(documents):
        for ids in encode(tokenizer, batch):
            rest_starts.append(len(rest))
            rest += begin
            rest += ids
            rest.append(end)
        used = len(rest) // sequence_length * sequence_length
        blocks.append(torch.tensor(rest[:used], dtype=torch.int64).view(-1, sequence_length))
        marks = torch.zeros(used, dtype=torch.bool)
        marks[[place for place in rest_starts if place < used]] = True
        starts.append(marks.view(-1, sequence_length))
        del rest[:used]
        rest_starts = [place - used for place in rest_starts if place >= used]
        if most is not None and sum(map(len, blocks)) >= most:
            break
    if not blocks:
        empty = torch.empty((0, sequence_length), dtype=torch.int64)
        return empty, empty.bool()
    return torch.cat(blocks)[:most], torch.cat(starts)[:most]


def block_sample(tokens: Any, starts: Any | None) -> Sample:
    """A block as a sample: every token is a label; of isolated documents every one but each document's first.

    `tokens` and `starts`, which says where isolated documents start, are arrays (sequence_length,).
    """
    ids: list[int] = tokens.tolist()
    if starts is None:
        return {"input_ids": ids, "labels": list(ids)}
    bounds = [0, *(place for place in starts.nonzero()[0].tolist() if place), len(ids)]
    return isolated_sample(
        [{"input_ids": ids[first:last], "labels": ids[first:last]} for first, last in pairwise(bounds)]
    )


def too_little_text(config: TuneDataConfig) -> UsageError:
    """What to raise when the text fills no sample."""
    return UsageError(
        f"{config.dataset} has too little text for one sample of {config.max_length} tokens.",
        "Lower max_length, or give more text.",
    )
