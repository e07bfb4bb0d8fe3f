"""The process that fills a cache of tokens: reads documents, tokenises them on all cores but one, writes shards.

`Worker` starts it. Its stdin brings a job in one line of JSON, then how many
tokens are needed, a number a line; when it closes, because its owner ended however, the process ends. What goes wrong
for the user comes back on stdout as one line of JSON.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lors_cli.data import hub
from lors_cli.data.sources import TextSource, open_source
from lors_cli.data.stream.cache import TOKENIZER_NAME, TokenCache, make_room, writing
from lors_cli.data.stream.documents import START, Position, read_documents
from lors_cli.errors import LorsError, ResourceError, UsageError, translate
from lors_cli.machine.devices import usable_processors
from lors_cli.machine.processes import own_command
from lors_cli.recipe.schema import ColumnsConfig

Shard = tuple[np.ndarray, np.ndarray, dict[str, Any], int]
"""Tokens, where documents start in them, where the source is to be read on from, and documents read until there."""


class Filler:
    """Writes the shards of a cache one after the other, from wherever it stands.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        begin: tokens before each document.
        dtype: of tokens on disk.
    """

    def __init__(
        self, cache: TokenCache, source: TextSource, tokenizer: Any, begin: list[int], end: int, dtype: str
    ) -> None:
        self.cache, self.source, self.tokenizer = cache, source, tokenizer
        self.begin, self.end, self.dtype = begin, end, dtype
        self._next_shard = -1
        self._shards: Iterator[Shard] = iter(())
        self._documents: Iterator[tuple[list[str], Position]] = iter(())
        self._num_read = sys.maxsize
        """Documents before the next of them."""

    def fill(self, num_tokens: int) -> None:
        """Write shards until there are so many tokens in all, or the source ends."""
        if self._is_enough(num_tokens):
            return
        with writing(self.cache.folder):
            while not self._is_enough(num_tokens):
                self._write_next()

    def _is_enough(self, num_tokens: int) -> bool:
        return self.cache.available() >= num_tokens or self.cache.end() is not None

    def _write_next(self) -> None:
        number, size = self.cache.num_shards(), self.cache.shard_tokens
        if number != self._next_shard:  # another process wrote the ones before
            self._shards = self._shards_from(number)
        tokens, starts, after, num_documents = next(self._shards)
        make_room(self.cache.folder, tokens.nbytes + starts.nbytes)
        if len(tokens) < size:
            self.cache.write_end(number * size + len(tokens), num_documents)
        if len(tokens):
            self.cache.write_shard(number, tokens, starts, after)
        self._next_shard = number + 1

    def _shards_from(self, number: int) -> Iterator[Shard]:
        """The shards from this one on; the last has fewer tokens, maybe none.

        What comes after one is read on from the batch that it ends in, without the first `skip` tokens of that batch.
        """
        size = self.cache.shard_tokens
        place: dict[str, Any] = self.cache.after(number - 1) if number else {"position": START, "skip": 0}
        position, skip = place["position"], place["skip"]
        tokens, starts = np.empty(0, self.dtype), np.empty(0, np.int64)
        for texts, after in self._documents_from(position):
            batch, marks = self._tokenise(texts)
            first = len(tokens) - skip  # where in tokens the batch begins
            tokens = np.concatenate([tokens, batch[skip:]])
            starts = np.concatenate([starts, marks[marks >= skip] + first])
            skip = 0
            while len(tokens) >= size:
                is_whole = len(tokens) == size
                place = {"position": after, "skip": 0} if is_whole else {"position": position, "skip": size - first}
                yield tokens[:size], starts[starts < size], place, after["documents"]
                tokens, starts, first = tokens[size:], starts[starts >= size] - size, first - size
            position = after
        yield tokens, starts, {"position": position, "skip": 0}, position["documents"]

    def _documents_from(self, position: Position) -> Iterator[tuple[list[str], Position]]:
        """As `read_documents`, but gone on with from an earlier position: to begin anew is to read a file from its
        start, and of several processes that write in turn each would do that at every turn."""
        if self._num_read > position["documents"] or "state" in position:
            self._documents, self._num_read = read_documents(self.source, position), position["documents"]
        for texts, after in self._documents:
            is_new = self._num_read >= position["documents"]
            self._num_read = after["documents"]
            assert is_new or self._num_read <= position["documents"], "batches are the same in every process"
            if is_new:
                yield texts, after

    def _tokenise(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The texts' tokens, and where each text starts in them."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        pieces = [np.array([*self.begin, *encoding.ids, self.end], dtype=self.dtype) for encoding in encodings]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return np.concatenate([np.empty(0, self.dtype), *pieces]), np.cumsum(lengths) - lengths


def make_filler(job: dict[str, Any]) -> Filler:
    """The filler of a job: folder of the cache, dataset, data_dir, columns, split, fingerprint, commits of datasets,
    begin, end, dtype.

    Raises:
        UsageError: the text is another one by now.
    """
    from tokenizers import Tokenizer

    cache = TokenCache(Path(job["folder"]))
    cache.hold()
    data_dir = Path(job["data_dir"]) if job["data_dir"] else None
    columns = ColumnsConfig(**job["columns"]) if job.get("columns") else None
    hub.keep_to(job.get("commits", ()))
    source = open_source(job["dataset"], split="train", data_dir=data_dir, columns=columns, chosen=job.get("split"))
    if source.fingerprint != job["fingerprint"]:
        raise UsageError(f"{job['dataset']} changed while it was read.", "Run the same command again.")
    tokenizer = Tokenizer.from_file(str(cache.folder / TOKENIZER_NAME))
    return Filler(cache, source, tokenizer, job["begin"], job["end"], job["dtype"])


class Worker:
    """The process that fills a cache; it ends with this object, and with this process however that ends."""

    def __init__(self, job: dict[str, Any]) -> None:
        threads = str(max(1, usable_processors() - 1))
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            [*own_command("lors_cli.data.stream.worker")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
            start_new_session=True,  # a Ctrl-C is for the training, which may go on for a step
        )  # fmt: skip
        self._asked = 0
        self._tell(json.dumps(job))
        self._finalizer = weakref.finalize(self, _end, self._process)

    def ask(self, num_tokens: int) -> None:
        """Say how many tokens are needed in all."""
        if num_tokens > self._asked:
            self._asked = num_tokens
            self._tell(str(num_tokens))

    def check(self) -> None:
        """Raise what went wrong in the process, if something did.

        Raises:
            LorsError: as the process met it.
            ResourceError: it was killed.
            RuntimeError: it died of a bug.
        """
        code = self._process.poll()
        if code is None:
            return
        assert self._process.stdout is not None
        answer = self._process.stdout.read().strip()
        if answer:
            said = json.loads(answer)
            error = LorsError(said["message"], said["hint"])
            error.exit_code = said["exit_code"]
            raise error
        if code < 0:
            raise ResourceError(
                f"the process that tokenises was killed by signal {-code}; is memory short?",
                "The same command resumes from there.",
            )
        raise RuntimeError(f"the process that tokenises ended with code {code}; its own message is above")

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            self.check()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()  # every file appears by rename, so nothing half written stays
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue


# ---- the process


def _needs(inbox: queue.SimpleQueue[int]) -> None:
    """Pass on what the owner needs; end with it."""
    for line in sys.stdin:
        inbox.put(int(line))
    os._exit(0)


def main() -> None:
    """Do the job that stdin brings."""
    job = json.loads(sys.stdin.readline())
    inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_needs, args=(inbox,), daemon=True).start()
    try:
        filler = make_filler(job)
        while True:
            filler.fill(inbox.get())
    except Exception as error:
        known = translate(error)
        if known is None:
            raise
        print(json.dumps({"exit_code": known.exit_code, "message": known.message, "hint": known.hint}), flush=True)
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
