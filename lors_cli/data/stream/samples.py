"""Samples of a text that is tokenised in the background while it is trained on; it is never in memory whole."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lors_cli.data import hub
from lors_cli.data.held_out import num_held_out
from lors_cli.data.packing import block_sample, too_little_text
from lors_cli.data.samples import Sample, TuneData, rounded_up
from lors_cli.data.sources import TextSource
from lors_cli.data.stream.cache import TokenCache, cache_dir, folder_bytes, open_cache, size_limit
from lors_cli.data.stream.order import shuffled_block
from lors_cli.data.stream.worker import Worker
from lors_cli.data.tokenising import begin_tokens, check_known, check_length, eos_token_id, warn_of_size
from lors_cli.errors import UsageError
from lors_cli.machine import processes
from lors_cli.output import console, progress
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig

LARGE_FILE = 64 << 20
"""Bytes from which on `stream: auto` streams a local file."""
SHORTEST = 8
"""Tokens of the last sample at least: a shorter one might have no label at all."""
POLL_S = 0.02


class TokenStream(Sequence[Sample]):
    """The samples of a whole run, in the order in which they are trained on.

    A sample is a function of seed and position. It is read from the cache, and waited for where the cache is not yet
    so far; the next window of blocks is tokenised meanwhile.
    """

    def __init__(
        self, cache: TokenCache, job: dict[str, Any], config: TuneDataConfig, seed: int, tokenizer: Any = None
    ) -> None:
        self.cache, self.config, self.seed, self.tokenizer = cache, config, seed, tokenizer
        self._job = job
        self._worker: Worker | None = None
        self._ready = 0
        """Blocks that are known to be in the cache."""
        self._skipped = 0
        """Tokens at the start of the text that are not trained on."""
        self._total: int | None = None
        self._num_samples = 0
        self._last_length = config.max_length

    def plan(self, num_samples: int, last_length: int) -> None:
        """Say how many samples the run takes, and how many tokens the last of them has."""
        self._num_samples, self._last_length = num_samples, last_length

    def hold_out(self, number: int) -> list[Sample]:
        """The text's first samples; those of the run begin with the next document, or, without one, after them."""
        length, most = self.config.max_length, self.config.num_samples
        self.config = replace(self.config, num_samples=None)
        following: Any = np.zeros(0, dtype=bool)
        place = number
        while not following.any():
            self._ask(place + 1)
            self._wait_for(place + 1)
            if self._available() <= place:
                break
            following = self.cache.read(place * length, (place + 1) * length)[1]
            place += 1
        if self._available() < number:
            raise too_little_text(self.config)
        samples = [self._sample(block * length, length) for block in range(number)]
        self._skipped = (place - 1) * length + int(following.argmax()) if following.any() else number * length
        self.config = replace(self.config, num_samples=most and most - num_held_out(number, most))
        return samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        block = self._block(position)
        length = self._last_length if position == len(self) - 1 else self.config.max_length
        return self._sample(self._skipped + block * self.config.max_length, length)

    def _sample(self, first: int, length: int) -> Sample:
        """The sample of the tokens from `first` on."""
        tokens, starts = self.cache.read(first, first + length)
        check_known(tokens.tolist(), self.tokenizer)
        return block_sample(tokens, starts if self.config.packing == "isolated" else None)

    def num_blocks(self) -> int | None:
        """Blocks of one pass over the text, None while that is not known.

        Raises:
            UsageError: the text fills none.
        """
        end, most = self.cache.end(), self.config.num_samples
        if end is not None:
            if end - self._skipped < self.config.max_length:
                raise too_little_text(self.config)
            return min((end - self._skipped) // self.config.max_length, most or sys.maxsize)
        return most if most is not None and self._available() >= most else None

    def count_blocks(self) -> int:
        """Blocks of one pass over the text; where that is not known it is tokenised first."""
        most = self.config.num_samples or sys.maxsize // (2 * self.config.max_length)
        self._ask(most)
        self._wait_for(most)
        found = self.num_blocks()
        assert found is not None
        return found

    def close(self) -> None:
        """End the process in the background, and let others remove the cache."""
        if self._worker is not None:
            self._worker.close()
        self.cache.release()

    def _available(self) -> int:
        return max(0, self.cache.available() - self._skipped) // self.config.max_length

    def _block(self, position: int) -> int:
        """The block at a position, once the cache has all blocks that it is shuffled with."""
        buffer = self.config.shuffle_buffer
        if self._total is None and position >= self._ready:
            window_end = (position // buffer + 1) * buffer
            ahead = buffer if processes.local_index() == 0 else 0  # one for all processes of a machine
            self._ask(min(window_end + ahead, -(-len(self) // buffer) * buffer))
            self._wait_for(window_end)
            self._total, self._ready = self.num_blocks(), window_end
        return shuffled_block(position, seed=self.seed, buffer=buffer, num_blocks=self._total)

    def _ask(self, num_blocks: int) -> None:
        """Have so many blocks made in the background."""
        if self._available() >= num_blocks or self.cache.end() is not None:
            return
        if self._worker is None:
            self._worker = Worker(self._job)
        self._worker.ask(self._skipped + num_blocks * self.config.max_length)

    def _wait_for(self, num_blocks: int) -> None:
        """Until the cache has so many blocks, or has come to its end."""
        if self._available() >= num_blocks or self.num_blocks() is not None:
            return
        assert self._worker is not None
        wanted = self._skipped + num_blocks * self.config.max_length
        total = wanted if wanted < sys.maxsize // 4 else None
        with progress.progress("tokenise", total, "tokens") as task:
            task.skip(self.cache.available())
            while self._available() < num_blocks and self.num_blocks() is None:
                self._worker.check()
                time.sleep(POLL_S)
                task.update(min(self.cache.available(), wanted))


# ---- from a config


def is_streamed(config: TuneConfig, source: TextSource) -> bool:
    """Whether a tune stage's data is streamed.

    Raises:
        UsageError: the settings ask for it, and the source is no text.
    """
    asked = config.data.stream == "on" or config.max_tokens is not None
    if asked and source.kind != "text":
        setting = "max_tokens" if config.max_tokens is not None else "data.stream: on"
        raise UsageError(
            f"{setting} is for text, and {config.data.dataset} is {source.kind}.", "Give max_steps or epochs."
        )
    if config.data.stream != "auto" or asked:
        return asked
    return source.kind == "text" and (source.streamed or source.num_bytes > LARGE_FILE)


def check_stream(config: TuneConfig, source: TextSource) -> None:
    """Refuse settings that need to know where a streamed text ends.

    Raises:
        UsageError: there is no end to it, or a share of it is to be held out.
    """
    if config.val_size is not None and config.val_size < 1:
        raise UsageError(
            f"val_size: {config.val_size:g} is a share, and how long streamed text is shows at its end.",
            "Give a number of samples.",
        )
    if source.streamed and config.max_tokens is None and config.max_steps is None and config.data.num_samples is None:
        raise UsageError(
            "Streamed text has no end.", "Say how much of it to take: max_tokens, max_steps or data.num_samples."
        )


def stream_samples(
    config: TuneConfig, source: TextSource, tokenizer: Any, *, model_max_length: int, data_dir: Path | None
) -> TuneData:
    """The samples of a run over streamed text.

    Raises:
        UsageError: the settings need to know its end, or the tokenizer is not one of `tokenizers`.
    """
    data = config.data
    check_stream(config, source)
    check_length(data.max_length, model_max_length, "max_length")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"Streaming needs a fast tokenizer, and {type(tokenizer).__name__} is not one.", "Set data.stream: off."
        )
    if source.fingerprint.startswith("txt:"):
        warn_of_size(source.name, source.num_bytes, "give it as JSON lines, a document a row")
    stream = _open_stream(config, source, tokenizer, data_dir)
    _warn_of_room(config, source, stream.cache)
    held_out = [] if config.val_size is None else stream.hold_out(int(config.val_size))
    if config.max_tokens is not None:
        num_samples, last = token_budget(config.max_tokens, data.max_length)
    elif config.max_steps is not None:
        num_samples, last = config.max_steps * config.batch_size, data.max_length
    else:
        num_samples, last = rounded_up(config.epochs, stream.count_blocks()), data.max_length
    stream.plan(num_samples, last)
    num_tokens = (num_samples - 1) * data.max_length + last
    num_steps = math.ceil(num_samples / config.batch_size)
    return TuneData(stream, num_samples, {}, num_tokens, num_steps, close=stream.close, held_out=held_out)


def _warn_of_room(config: TuneConfig, source: TextSource, cache: TokenCache) -> None:
    """Say where the cache may have no room for what the run reads of a text, as far as that is known."""
    if cache.end() is not None:  # all is there
        return
    data, is_plain = config.data, source.name.lower().endswith((".jsonl", ".json", ".csv", ".tsv", ".txt"))
    samples = min(data.num_samples or math.inf, config.max_steps * config.batch_size if config.max_steps else math.inf)
    tokens = min(samples * data.max_length, config.max_tokens or math.inf)
    tokens = min(tokens, source.num_bytes if is_plain else math.inf)  # of a byte one at most
    size = tokens * np.dtype(cache.manifest["dtype"]).itemsize
    limit, free = size_limit(), shutil.disk_usage(cache.folder).free + folder_bytes(cache.folder)
    if min(limit, free) < size < math.inf:
        console.warn(
            f"the cache of tokens may need {console.gib(size)}; it may take {console.gib(limit)}, and "
            f"{console.gib(free)} are free in {cache.folder}: training ends where there is no more room. "
            "Raise LORS_CACHE_GIB, or choose another disk with LORS_CACHE_DIR."
        )


def token_budget(max_tokens: int, length: int) -> tuple[int, int]:
    """Samples that hold exactly so many tokens, but for a rest too short for a sample of its own (`SHORTEST`).

    Returns:
        The number of samples, and the tokens of the last.
    """
    whole, rest = divmod(max_tokens, length)
    return (whole + 1, rest) if rest >= SHORTEST or not whole else (whole, length)


def _open_stream(config: TuneConfig, source: TextSource, tokenizer: Any, data_dir: Path | None) -> TokenStream:
    data = config.data
    begin = begin_tokens(tokenizer) if data.packing == "isolated" else []
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    stream = {"begin": begin, "end": eos_token_id(tokenizer), "dtype": dtype}
    cache = open_cache(cache_dir(), {"source": source.fingerprint, **stream}, _tokenizer_json(tokenizer))
    there = "all there" if cache.end() is not None else f"{cache.available():,} tokens there"
    console.info(f"  token cache: {cache.folder}, {console.gib(folder_bytes(cache.folder))}, {there}")
    job = {"folder": str(cache.folder), "dataset": data.dataset, "data_dir": str(data_dir) if data_dir else None,
           "columns": data.columns and data.columns.names, "split": data.split, "fingerprint": source.fingerprint,
           "commits": hub.known_commits(), **stream}  # fmt: skip
    return TokenStream(cache, job, data, config.seed, tokenizer)


def _tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer without what calls leave behind in it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(truncation=None, padding=None)
    return json.dumps(content, ensure_ascii=False)
