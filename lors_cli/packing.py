"""From text to token ids: tokenising in batches, packing into blocks, reading pre-tokenised files.

No special token is added here but the end-of-sequence token after each document, and what the caller puts before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig
from lors_cli.samples import Sample, isolated_sample

if TYPE_CHECKING:
    import torch

DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 2048
BATCH_DOCUMENTS = 256
BATCH_CHARS = 1_000_000
_POOL_FACTOR = 16
_POOL_MIN = 1_000
_POOL_MAX = 10_000


def packed_blocks(
    documents: Iterator[str],
    tokenizer: Any,
    sequence_length: int,
    num_blocks: int | None,
    seed: int,
    streamed: bool,
) -> torch.Tensor:
    """Documents joined by the end-of-sequence token, cut to full sequences, and these shuffled.

    Blocks are shuffled, not documents: one book alone would otherwise fill every sequence.

    Args:
        documents: texts; the last tokens that fill no sequence are dropped.
        tokenizer: needs an end-of-sequence token.
        sequence_length: tokens a block.
        num_blocks: how many to take after the shuffle; None for all.
        seed: of the shuffle.
        streamed: read only until there is a pool of 16 times num_blocks (at least 1,000 and at most the larger of
            10,000 and num_blocks), and shuffle that.

    Returns:
        (blocks, sequence_length) int64; fewer than num_blocks when the text ends before.

    Raises:
        UsageError: a stream without num_blocks has no end, or the tokenizer no end-of-sequence token.
    """
    return packed_documents(documents, tokenizer, sequence_length, num_blocks, seed, streamed, [])[0]


def packed_documents(
    documents: Iterator[str],
    tokenizer: Any,
    sequence_length: int,
    num_blocks: int | None,
    seed: int,
    streamed: bool,
    begin: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_blocks`, and where in them documents start.

    Args:
        documents: as there, and so the next five.
        tokenizer: as there.
        sequence_length: as there.
        num_blocks: as there.
        seed: as there.
        streamed: as there.
        begin: tokens before each document.

    Returns:
        (blocks, sequence_length) int64 tokens, and bool where a document starts; one that is cut goes on in another
        block, which need not follow.
    """
    import torch

    if streamed and num_blocks is None:
        raise UsageError("Streamed text has no end.", "Say how much of it to take: num_samples or max_steps.")
    pool = None
    if streamed and num_blocks is not None:
        pool = max(num_blocks, min(max(_POOL_FACTOR * num_blocks, _POOL_MIN), _POOL_MAX))
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
        if pool is not None and sum(map(len, blocks)) >= pool:
            break
    if not blocks:
        empty = torch.empty((0, sequence_length), dtype=torch.int64)
        return empty, empty.bool()
    packed, marked = torch.cat(blocks)[:pool], torch.cat(starts)[:pool]
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed))[:num_blocks]
    return packed[order], marked[order]


def block_sample(tokens: Any, starts: Any | None) -> Sample:
    """A block as a sample: every token is a label; of isolated documents every one but each document's first.

    Args:
        tokens: (sequence_length,), an array.
        starts: (sequence_length,) bool, an array: where documents start; None when they are not isolated.
    """
    ids: list[int] = tokens.tolist()
    if starts is None:
        return {"input_ids": ids, "labels": list(ids)}
    bounds = [0, *(place for place in starts.nonzero()[0].tolist() if place), len(ids)]
    return isolated_sample(
        [{"input_ids": ids[first:last], "labels": ids[first:last]} for first, last in pairwise(bounds)]
    )


def batches(texts: Iterable[str], max_chars: int = BATCH_CHARS) -> Iterator[list[str]]:
    """Texts in groups that are large enough to be tokenised well and small enough for memory."""
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= max_chars or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens; `verbose=False` is the tokenizer's switch for its length warning."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def eos_token_id(tokenizer: Any) -> int:
    """The end-of-sequence token.

    Raises:
        UsageError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "The tokenizer has no end-of-sequence token, which is put between texts.",
            'Set "eos_token" in its tokenizer_config.json.',
        )
    return tokenizer.eos_token_id


def begin_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it before a text by itself."""
    ids = list(tokenizer("").input_ids)
    bos_token_id = tokenizer.bos_token_id
    return [bos_token_id] if bos_token_id is not None and ids[:1] == [bos_token_id] else []


# ---- lengths and pre-tokenised files


def window_length(wanted: int | None, model_max_length: int) -> int:
    """Tokens a sequence: what is asked for, else 2048 or the model's limit.

    Raises:
        UsageError: the model cannot take so many.
    """
    if wanted is None:
        return min(DEFAULT_LENGTH, model_max_length)
    check_length(wanted, model_max_length, "sequence_length")
    return wanted


def check_length(wanted: int, model_max_length: int, key: str) -> None:
    """Refuse a length that the model cannot take or that leaves nothing to predict.

    Args:
        wanted: tokens a sequence.
        model_max_length: tokens that the model can take.
        key: the setting's name, for the message.

    Raises:
        UsageError: it is so.
    """
    if wanted < 2:
        raise UsageError(f"{key} {wanted} leaves no token to predict.", "Give 2 or more.")
    if wanted > model_max_length:
        raise UsageError(
            f"{key} {wanted} is more than the model's {model_max_length} tokens.",
            f"Set {key} to {model_max_length} or less.",
        )


def too_little_text(config: TuneDataConfig) -> UsageError:
    """What to raise when the text fills no sample."""
    return UsageError(
        f"{config.dataset} has too little text for one sample of {config.max_length} tokens.",
        "Lower max_length, or give more text.",
    )


def read_tokens(
    path: Path, tokenizer: Any, num_samples: int | None, length: int | None, model_max_length: int | None
) -> torch.Tensor:
    """The first rows and columns of a pre-tokenised file.

    Args:
        path: .safetensors with integer `input_ids` (num_samples, sequence_length).
        tokenizer: whose vocabulary the tokens must be of.
        num_samples: rows to take; None for all.
        length: columns to take; None for all.
        model_max_length: tokens that the model can take; None when the caller cuts the rows anyway.

    Returns:
        (num_samples, length) int64, in the file's order.

    Raises:
        UsageError: the file is broken, has fewer rows or columns, or tokens of another vocabulary.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tokens = file.get_tensor("input_ids") if "input_ids" in names else None
    except SafetensorError as error:
        raise UsageError(f"{path} is not a sound safetensors file: {error}") from error
    if tokens is None:
        raise UsageError(f"{path} has no tensor input_ids, only {', '.join(names) or 'none'}.")
    integers = (torch.int64, torch.int32, torch.int16, torch.uint32, torch.uint16)
    if tokens.ndim != 2 or tokens.dtype not in integers or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        found = f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
        raise UsageError(f"{path}: input_ids must be (num_samples, sequence_length) integers, not {found}.")
    for key, asked, there in (
        ("num_samples", num_samples, tokens.shape[0]),
        ("sequence_length", length, tokens.shape[1]),
    ):
        if asked is not None and asked > there:
            raise UsageError(f"{path} has {key} {there}, not {asked}.", f"Lower {key} or leave it out.")
    tokens = tokens[:num_samples, :length].to(torch.int64)
    if model_max_length is not None:
        check_length(tokens.shape[1], model_max_length, "sequence_length")
    outside = (tokens < 0) | (tokens >= len(tokenizer))
    if outside.any():
        row = int(outside.any(dim=1).nonzero()[0, 0])
        raise UsageError(
            f"{path}:{row + 1}: token {int(tokens[row][outside[row]][0])} is not in the tokenizer's vocabulary "
            f"of {len(tokenizer)}.",
            "The file was made with another model's tokenizer.",
        )
    return tokens.contiguous()
