"""Tokens from text: prompts with masked labels, packed blocks, calibration batches, perplexity windows.

No special token is added but these: documents are joined by the end-of-sequence token, a response ends in it, and a
prompt begins with the beginning-of-sequence token where the tokenizer adds one by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli import console
from lors_cli.errors import UsageError
from lors_cli.packing import (
    BATCH_CHARS,
    BATCH_DOCUMENTS,
    batches,
    check_length,
    encode,
    eos_token_id,
    packed_blocks,
    read_tokens,
    window_length,
)
from lors_cli.prompts import alpaca_prompt
from lors_cli.recipe import CalibrationConfig, TuneDataConfig
from lors_cli.text import TextSource, open_source

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label that the loss passes over."""
DEFAULT_SAMPLES = 128
EMPTY_OUTPUT = "empty output"
NO_LABEL = "no label after truncation"
_STREAM_WINDOWS = 256
"""Windows of a stream when none are asked for, as SparseGPT and Wanda take of C4."""


@dataclass(frozen=True)
class TuneData:
    """What a model is tuned on."""

    samples: list[dict[str, list[int]]]
    """Each with input_ids and labels of the same length; IGNORED where there is no label."""
    num_rows: int
    """Rows of the source that were used or skipped; for packed text the number of blocks."""
    skipped: dict[str, int]
    """Rows left out, by reason: EMPTY_OUTPUT, NO_LABEL."""
    num_tokens: int


class PadCollator:
    """Makes a batch of samples of different length.

    Padding goes by length, never by token: where the padding token is the end-of-sequence token, as in SmolLM2, a
    response's real end keeps its label and its attention.

    Args:
        pad_token_id: fills input_ids on the right.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The batch.

        Args:
            samples: with input_ids and labels.

        Returns:
            input_ids, attention_mask and labels, each (samples, longest sample) int64.
        """
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = torch.tensor(sample["input_ids"])
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(sample["labels"])
        return batch


def calibration_tokens(
    config: CalibrationConfig, tokenizer: Any, *, model_max_length: int, data_dir: Path | None
) -> torch.Tensor:
    """The sequences that a pruner looks at.

    Args:
        config: source, number and length; a pre-tokenised file keeps its rows' order and is used whole, or its
            first num_samples rows and first sequence_length columns where these are given.
        tokenizer: of the model.
        model_max_length: tokens that the model can take (the tokenizer's own limit is often meaningless).
        data_dir: folder with local copies of the named sources.

    Returns:
        (num_samples, sequence_length) int64.

    Raises:
        UsageError: too little text, or a length that the model cannot take.
        MissingError: a file is not there.
    """
    source = open_source(config.dataset, split="train", data_dir=data_dir)
    length = window_length(config.sequence_length, model_max_length)
    if source.path is not None:
        return read_tokens(source.path, tokenizer, config.num_samples, config.sequence_length, model_max_length)
    num_samples = config.num_samples or DEFAULT_SAMPLES
    blocks = packed_blocks(_texts(source), tokenizer, length, num_samples, config.seed, source.streamed)
    if len(blocks) < num_samples:
        raise UsageError(
            f"{config.dataset} has text for {len(blocks)} sequences of {length} tokens, not {num_samples}.",
            "Lower num_samples or sequence_length, or give more text.",
        )
    return blocks


def perplexity_windows(
    name: str,
    tokenizer: Any,
    *,
    sequence_length: int | None,
    model_max_length: int,
    max_windows: int | None,
    data_dir: Path | None,
) -> torch.Tensor:
    """Held-out text, tokenised at once and cut into consecutive windows; the tail that fills none is dropped.

    Args:
        name: of the source; its validation split is taken (of wikitext2 the test split).
        tokenizer: of the model.
        sequence_length: tokens a window; default 2048 or model_max_length.
        model_max_length: tokens that the model can take.
        max_windows: at most so many, from the start; of a stream 256 when None.
        data_dir: folder with local copies of the named sources.

    Returns:
        (windows, sequence_length) int64; a pre-tokenised file gives its rows.

    Raises:
        UsageError: the text is shorter than one window, or the model cannot take such a length.
        MissingError: a file is not there.
    """
    import torch

    source = open_source(name, split="validation", data_dir=data_dir)
    length = window_length(sequence_length, model_max_length)
    if source.path is not None:
        return read_tokens(source.path, tokenizer, None, sequence_length, model_max_length)[:max_windows]
    if source.streamed and max_windows is None:
        max_windows = _STREAM_WINDOWS
        console.info(f"{name} is streamed: its first {max_windows} windows of {length} tokens are measured.")
    enough = length * (max_windows + 1) if source.streamed and max_windows is not None else None
    text = _joined_text(_texts(source), tokenizer, enough)
    tokens = torch.tensor(encode(tokenizer, [text])[0], dtype=torch.int64)
    windows = len(tokens) // length
    if windows == 0:
        raise UsageError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {length}.",
            "Lower the windows' length (perplexity_length), or give more text.",
        )
    return tokens[: windows * length].view(windows, length)[:max_windows].clone()


def tuning_samples(
    config: TuneDataConfig,
    tokenizer: Any,
    *,
    seed: int,
    num_needed: int | None,
    model_max_length: int,
    data_dir: Path | None,
) -> TuneData:
    """What a model is tuned on: instruction rows in the source's order, or packed text.

    Args:
        config: source, longest sample, and how many samples at most.
        tokenizer: of the model.
        seed: of the shuffle of packed blocks; instructions are not shuffled here.
        num_needed: samples that all steps together will take; bounds packed text when num_samples does not.
        model_max_length: tokens that the model can take.
        data_dir: folder with local copies of the named sources.

    Returns:
        Samples of at most max_length tokens, each with a label at index 1 or later (the first token's label is
        lost in the shift by one).

    Raises:
        UsageError: no usable sample, or a length that the model cannot take.
        MissingError: a file is not there.
    """
    check_length(config.max_length, model_max_length, "max_length")
    source = open_source(config.dataset, split="train", data_dir=data_dir, want="instructions")
    if source.kind == "instructions":
        return _instruction_samples(source, config, tokenizer)
    if source.path is not None:
        blocks = read_tokens(source.path, tokenizer, config.num_samples, None, None)
        if blocks.shape[1] > config.max_length:
            console.warn(f"{source.name}: rows of {blocks.shape[1]} tokens are cut to max_length {config.max_length}.")
            blocks = blocks[:, : config.max_length]
    else:
        wanted = config.num_samples if config.num_samples is not None else num_needed
        blocks = packed_blocks(_texts(source), tokenizer, config.max_length, wanted, seed, source.streamed)
        if len(blocks) == 0:
            raise UsageError(
                f"{config.dataset} has too little text for one sample of {config.max_length} tokens.",
                "Lower max_length, or give more text.",
            )
    samples = [{"input_ids": row, "labels": list(row)} for row in blocks.tolist()]
    return TuneData(samples, len(samples), {EMPTY_OUTPUT: 0, NO_LABEL: 0}, blocks.numel())


# ---- instructions


def _instruction_samples(source: TextSource, config: TuneDataConfig, tokenizer: Any) -> TuneData:
    """Prompt and response of each row, the prompt's labels masked.

    Both are tokenised apart and then joined, so that no token spans the boundary and a prompt's tokens are the
    same whatever follows it. The end-of-sequence token is joined by its id.
    """
    begin = _begin_tokens(tokenizer)
    end = eos_token_id(tokenizer)
    skipped = {EMPTY_OUTPUT: 0, NO_LABEL: 0}
    samples: list[dict[str, list[int]]] = []
    num_rows = 0
    rows = source.rows()
    while batch := list(islice(rows, BATCH_DOCUMENTS)):
        prompts = encode(tokenizer, [alpaca_prompt(row["instruction"], row["input"]) for row in batch])
        responses = encode(tokenizer, [row["output"] for row in batch])
        for row, prompt, response in zip(batch, prompts, responses, strict=True):
            if config.num_samples is not None and len(samples) == config.num_samples:
                break
            num_rows += 1
            if not row["output"].strip():
                skipped[EMPTY_OUTPUT] += 1
                continue
            sample = _masked_sample(begin + prompt, response, end, config.max_length)
            if any(label != IGNORED for label in sample["labels"][1:]):
                samples.append(sample)
            else:
                skipped[NO_LABEL] += 1
        if config.num_samples is not None and len(samples) == config.num_samples:
            break
    if not samples:
        counts = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
        raise UsageError(
            f"{source.name} has no usable row among {num_rows}: {counts}.",
            f"Raise max_length ({config.max_length} tokens) or give other rows.",
        )
    return TuneData(samples, num_rows, skipped, sum(len(sample["input_ids"]) for sample in samples))


def _masked_sample(prompt: list[int], response: list[int], end: int, max_length: int) -> dict[str, list[int]]:
    """One sample, cut on the right; a response that was cut does not end in the end-of-sequence token."""
    ended = response if response[-1:] == [end] else [*response, end]
    return {
        "input_ids": (prompt + ended)[:max_length],
        "labels": ([IGNORED] * len(prompt) + ended)[:max_length],
    }


def _begin_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it before a text by itself."""
    ids = list(tokenizer("").input_ids)
    bos_token_id = tokenizer.bos_token_id
    return [bos_token_id] if bos_token_id is not None and ids[:1] == [bos_token_id] else []


# ---- text to tokens


def _texts(source: TextSource) -> Iterator[str]:
    return (row["text"] for row in source.rows())


def _joined_text(texts: Iterator[str], tokenizer: Any, enough: int | None) -> str:
    """The documents as one text, an empty line between them; read until there are `enough` tokens, if given."""
    if enough is None:
        return "\n\n".join(texts)
    taken: list[str] = []
    num_tokens = 0
    for batch in batches(texts, BATCH_CHARS // 8):
        taken += batch
        num_tokens += sum(map(len, encode(tokenizer, batch)))
        if num_tokens >= enough:
            break
    return "\n\n".join(taken)
