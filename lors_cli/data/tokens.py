"""Tokens from text: prompts with masked labels, packed blocks, calibration batches, perplexity windows.

No special token is added but these: documents are joined by the end-of-sequence token, a response ends in it, and
prompts and isolated documents begin with the beginning-of-sequence token where the tokenizer adds one by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lors_cli.data.held_out import hold_out_blocks, hold_out_samples, num_held_out
from lors_cli.data.instructions import instruction_samples
from lors_cli.data.packing import (
    block_sample,
    blocks_in_order,
    packed_blocks,
    shuffled_blocks,
    too_little_text,
)
from lors_cli.data.samples import EMPTY_OUTPUT, NO_LABEL, Sample, TuneData
from lors_cli.data.sources import TextSource, calibration_source, open_source, tuning_source
from lors_cli.data.tokenising import (
    BATCH_CHARS,
    DEFAULT_SAMPLES,
    batches,
    begin_tokens,
    check_length,
    encode,
    read_tokens,
    warn_of_size,
    window_length,
)
from lors_cli.errors import UsageError
from lors_cli.output import console
from lors_cli.output.console import counted
from lors_cli.recipe.schema import CalibrationConfig, TuneConfig, TuneDataConfig

if TYPE_CHECKING:
    import torch

_STREAM_WINDOWS = 256
"""Windows of a stream when none are asked for, as SparseGPT and Wanda take of C4."""


def calibration_tokens(
    config: CalibrationConfig, tokenizer: Any, *, model_max_length: int, data_dir: Path | None
) -> torch.Tensor:
    """The sequences that a pruner looks at.

    Args:
        config: source, number and length; a pre-tokenised file keeps its rows' order and is used whole, or its
            first num_samples rows and first sequence_length columns where these are given.
        model_max_length: tokens that the model can take (the tokenizer's own limit is often meaningless).

    Returns:
        (num_samples, sequence_length) int64.

    Raises:
        UsageError: too little text, or a length that the model cannot take.
        MissingError: a file is not there.
    """
    source = calibration_source(config, data_dir)
    say_source(source)
    length = window_length(config.sequence_length, model_max_length, "sequence_length")
    if source.path is not None:
        return read_tokens(source.path, tokenizer, config.num_samples, config.sequence_length, model_max_length)
    num_samples = config.num_samples or DEFAULT_SAMPLES
    blocks, _ = packed_blocks(_documents(source), tokenizer, length, num_samples, config.seed, source.streamed)
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
        sequence_length: tokens a window; default 2048 or model_max_length.
        max_windows: at most so many, from the start; of a stream 256 when None.

    Returns:
        (windows, sequence_length) int64; a pre-tokenised file gives its rows.

    Raises:
        UsageError: the text is shorter than one window, or the model cannot take such a length.
        MissingError: a file is not there.
    """
    import torch

    source = open_source(name, split="validation", data_dir=data_dir)
    say_source(source)
    length = window_length(sequence_length, model_max_length, "perplexity_length")
    if source.path is not None:
        rows = read_tokens(source.path, tokenizer, None, sequence_length, model_max_length, "perplexity_length")
        return rows[:max_windows]
    if source.streamed and max_windows is None:
        max_windows = _STREAM_WINDOWS
        console.info(f"{name} is streamed: its first {max_windows} windows of {length} tokens are measured.")
    enough = None if max_windows is None else length * (max_windows + 1)
    if enough is None or source.fingerprint.startswith("txt:"):
        warn_of_size(name, source.num_bytes, "give it as JSON lines, a document a row, with perplexity_windows")
    text = _joined_text(_texts(source), tokenizer, enough)
    tokens = torch.tensor(encode(tokenizer, [text])[0], dtype=torch.int64)
    windows = len(tokens) // length
    if windows == 0:
        raise UsageError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {length}.",
            "Lower the windows' length (perplexity_length), or give more text.",
        )
    return tokens[: windows * length].view(windows, length)[:max_windows].clone()


def tuning_data(config: TuneConfig, tokenizer: Any, *, model_max_length: int, data_dir: Path | None) -> TuneData:
    """What a tune stage trains on: samples in memory, a stream of them, or a mixture of both.

    Raises:
        UsageError: no usable sample, or settings that do not fit the source.
        MissingError: a file is not there.
    """
    from lors_cli.data.mixture import mixed_data
    from lors_cli.data.stream.samples import is_streamed, stream_samples

    if config.data.mix:
        return mixed_data(
            config, lambda part: tuning_data(part, tokenizer, model_max_length=model_max_length, data_dir=data_dir)
        )
    source = tuning_source(config.data, data_dir)
    if is_streamed(config, source):
        origin = say_source(source)
        check_settings(config.data, source)
        data = stream_samples(config, source, tokenizer, model_max_length=model_max_length, data_dir=data_dir)
        return replace(data, origin=origin)
    needed = config.max_steps * config.batch_size if config.max_steps else None
    return tuning_samples(config.data, tokenizer, seed=config.seed, num_needed=needed, val_size=config.val_size,
                          model_max_length=model_max_length, data_dir=data_dir)  # fmt: skip


def tuning_samples(
    config: TuneDataConfig,
    tokenizer: Any,
    *,
    seed: int,
    num_needed: int | None,
    model_max_length: int,
    data_dir: Path | None,
    val_size: float | None = None,
) -> TuneData:
    """What a model is tuned on: instruction rows in the source's order, or packed text.

    Args:
        seed: of the shuffle of packed blocks; instructions are not shuffled here.
        num_needed: samples that all steps together will take; bounds packed text when num_samples does not.
        val_size: samples to hold out, below 1 a share of them; of num_samples where that is given.

    Returns:
        Samples of at most max_length tokens, each with a label at index 1 or later (the first token's label is
        lost in the shift by one).

    Raises:
        UsageError: no usable sample, or a length that the model cannot take.
        MissingError: a file is not there.
    """
    check_length(config.max_length, model_max_length, "max_length")
    source = tuning_source(config, data_dir)
    origin = say_source(source)
    check_settings(config, source)
    if source.kind == "instructions":
        data = hold_out_samples(instruction_samples(source, config, tokenizer), val_size)
        return replace(data, origin=origin)
    held_out: list[Sample] = []
    if source.path is not None:
        blocks = read_tokens(source.path, tokenizer, config.num_samples, None, None)
        if blocks.shape[1] > config.max_length:
            console.warn(f"{source.name}: rows of {blocks.shape[1]} tokens are cut to max_length {config.max_length}.")
            blocks = blocks[:, : config.max_length]
        starts = None
    else:
        wanted = config.num_samples if config.num_samples is not None else num_needed
        isolated = config.packing == "isolated"
        begin = begin_tokens(tokenizer) if isolated else ()
        if val_size is None:
            blocks, starts = packed_blocks(
                _documents(source), tokenizer, config.max_length, wanted, seed, source.streamed, begin
            )
        else:
            held_out, blocks, starts = _text_without_its_start(config, source, tokenizer, val_size, begin)
            most = wanted if config.num_samples is None else config.num_samples - len(held_out)
            blocks, starts = shuffled_blocks(blocks, starts, most, seed)
        starts = starts if isolated else None
        if len(blocks) == 0:
            raise too_little_text(config)
    rows = blocks.numpy()
    marks = [None] * len(rows) if starts is None else starts.numpy()
    samples = [block_sample(row, mark) for row, mark in zip(rows, marks, strict=True)]
    data = TuneData(samples, len(samples), {EMPTY_OUTPUT: 0, NO_LABEL: 0}, blocks.numel(), held_out=held_out,
                    origin=origin)  # fmt: skip
    return hold_out_samples(data, val_size) if source.path is not None else data


def _text_without_its_start(
    config: TuneDataConfig, source: TextSource, tokenizer: Any, val_size: float, begin: Sequence[int]
) -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """The first samples of a text, which are held out, and all blocks after them in order."""
    if source.streamed:
        raise UsageError(f"val_size: {source.name} is held out from where it is streamed.", "Leave data.stream out.")
    blocks, starts = blocks_in_order(_documents(source), tokenizer, config.max_length, None, begin)
    if len(blocks) == 0:
        raise too_little_text(config)
    number = num_held_out(val_size, min(len(blocks), config.num_samples or len(blocks)))
    return hold_out_blocks(blocks, starts, number, isolated=config.packing == "isolated")


def say_source(source: TextSource) -> dict[str, Any]:
    """Say what is read where it could be doubted: a dataset's commit and split, what rows were read as, missing rows.

    Returns:
        What a run records of its data.
    """
    said = [source.found_at] if source.found_at else []
    if source.layout not in (None, "text", "instruction/output"):
        said.append(f"its rows are read as {source.layout}")
    if said:
        console.info(f"  {source.name}: {'; '.join(said)}.")
    origin: dict[str, Any] = {"source": source.fingerprint, **({"layout": source.layout} if source.layout else {})}
    if source.original_rows is not None:
        rows = sum(1 for _ in source.rows())
        origin.update(rows=rows, original_rows=source.original_rows)
        if rows < source.original_rows:
            console.info(f"  {source.name}: {rows:,} rows here, the original has {source.original_rows:,}.")
    return origin


def usual_packing(source: TextSource) -> Literal["concatenated", "separate"] | None:
    """`packing` where none is given; None of a pre-tokenised file, which is packed already."""
    if source.kind == "instructions":
        return "separate"
    return "concatenated" if source.path is None else None


def check_settings(config: TuneDataConfig, source: TextSource) -> None:
    """Refuse settings that are not for what the source gives: instructions, text or tokens.

    Raises:
        UsageError: one of them is given.
    """
    if source.kind == "instructions":
        if config.packing == "concatenated":
            raise UsageError(
                f"data.packing: concatenated would let the instructions of {source.name} see one another.",
                "Choose isolated, or leave packing out.",
            )
        return
    given = [name for name, is_given in (("template", config.template != "alpaca"),
                                         ("train_on_prompt", config.train_on_prompt),
                                         ("packing", config.packing == "separate")) if is_given]  # fmt: skip
    if given:
        raise UsageError(
            f"data.{given[0]} is for instructions, and {source.name} is {source.kind}.", f"Leave {given[0]} out."
        )
    if source.path is not None and config.packing is not None:
        raise UsageError(
            f"data.packing: the rows of {source.name} are packed already, and where texts begin is not in them.",
            "Leave packing out, or give the text itself.",
        )


# ---- text to tokens


def _texts(source: TextSource) -> Iterator[str]:
    return (row["text"] for row in source.rows())


def _documents(source: TextSource) -> Iterator[str]:
    """The texts that are not blank; the log says how many are, once all are read."""
    num_blank = 0
    for text in _texts(source):
        if text.strip():
            yield text
        else:
            num_blank += 1
    if num_blank:
        console.info(f"  {source.name}: {counted(num_blank, 'blank text')} left out.")


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
