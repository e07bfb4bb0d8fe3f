"""From text to token ids: documents tokenised in batches, special tokens, lengths, pre-tokenised files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.output import console

if TYPE_CHECKING:
    import torch

DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 2048
BATCH_DOCUMENTS = 256
BATCH_CHARS = 1_000_000
LARGE_TEXT = 100_000_000
"""Bytes of a text that is tokenised at once, from which on its size is warned of."""
MEMORY_OF_BYTE = 45
"""What tokenising takes of a text's byte (177 of a token)."""


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


def warn_of_size(name: str, num_bytes: int, instead: str) -> None:
    """Say what memory a text takes that is tokenised at once, where that is much."""
    if num_bytes > LARGE_TEXT:
        memory = console.gib(MEMORY_OF_BYTE * num_bytes)
        console.warn(f"{name} is tokenised at once, in some {memory} of memory: {instead}.")


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
    for ids in encoded["input_ids"]:
        check_known(ids, tokenizer)
    return encoded["input_ids"]


def check_known(ids: Iterable[int], tokenizer: Any) -> None:
    """Refuse tokens that the tokenizer has and the model has no embedding for.

    Raises:
        UsageError: naming one.
    """
    beyond = getattr(tokenizer, "beyond_embedding", None)  # set by models.loading, where there are any
    if beyond and (found := beyond.keys() & set(ids)):
        raise UsageError(
            f"A text holds {beyond[min(found)]!r}, token {min(found)}, which the tokenizer has and the model has no "
            "embedding for.",
            "Take it out of the text (and the chat template), or give the model the tokenizer that it was made with.",
        )


def offset_encoder(tokenizer: Any) -> Callable[[list[str]], list[tuple[list[int], list[tuple[int, int]]]]]:
    """Encodes texts as `encode` does, and says of which characters of its text each token is made.

    Raises:
        UsageError: the tokenizer is not one of `tokenizers`.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"Instructions need a fast tokenizer, and {type(tokenizer).__name__} is not one.",
            "Save the tokenizer with a tokenizer.json, or tune on text or on a pre-tokenised file.",
        )
    encoder: Any = Tokenizer.from_str(backend.to_str())
    encoder.post_processor = None  # it adds special tokens, and leaves spaces out of the places of tokens
    encoder.no_padding()
    encoder.no_truncation()

    def encode_with_offsets(texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        encodings = encoder.encode_batch(texts, add_special_tokens=False)
        check_known(chain.from_iterable(found.ids for found in encodings), tokenizer)
        return [(found.ids, found.offsets) for found in encodings]

    return encode_with_offsets


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


def window_length(wanted: int | None, model_max_length: int, key: str) -> int:
    """Tokens a sequence: what is asked for (by the setting `key`), else 2048 or the model's limit.

    Raises:
        UsageError: the model cannot take so many.
    """
    if wanted is None:
        return min(DEFAULT_LENGTH, model_max_length)
    check_length(wanted, model_max_length, key)
    return wanted


def check_length(wanted: int, model_max_length: int, key: str) -> None:
    """Refuse a length (the setting `key`) that the model cannot take or that leaves nothing to predict."""
    if wanted < 2:
        raise UsageError(f"{key} {wanted} leaves no token to predict.", "Give 2 or more.")
    if wanted > model_max_length:
        raise UsageError(
            f"{key} {wanted} is more than the model's {model_max_length} tokens.",
            f"Set {key} to {model_max_length} or less.",
        )


def read_tokens(
    path: Path, tokenizer: Any, num_samples: int | None, length: int | None, model_max_length: int | None,
    length_key: str = "sequence_length",
) -> torch.Tensor:  # fmt: skip
    """The first rows and columns of a pre-tokenised file.

    Args:
        path: .safetensors with integer `input_ids` (num_samples, sequence_length).
        num_samples: rows to take; None for all.
        model_max_length: tokens that the model can take; None when the caller cuts the rows anyway.
        length_key: the setting that `length` comes from, for messages.

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
        (length_key, length, tokens.shape[1]),
    ):
        if asked is not None and asked > there:
            raise UsageError(f"{path} has {key} {there}, not {asked}.", f"Lower {key} or leave it out.")
    tokens = tokens[:num_samples, :length].to(torch.int64)
    if model_max_length is not None:
        check_length(tokens.shape[1], model_max_length, length_key)
    outside = (tokens < 0) | (tokens >= len(tokenizer))
    if outside.any():
        row = int(outside.any(dim=1).nonzero()[0, 0])
        raise UsageError(
            f"{path}:{row + 1}: token {int(tokens[row][outside[row]][0])} is not in the tokenizer's vocabulary "
            f"of {len(tokenizer)}.",
            "The file was made with another model's tokenizer.",
        )
    check_known(tokens.unique().tolist(), tokenizer)
    return tokens.contiguous()
