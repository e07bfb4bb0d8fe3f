"""Tokenised text on disk: a stream of tokens in shards, each written by rename, that runs share and go on with.

Layout of $LORS_CACHE_DIR (default $XDG_CACHE_HOME/lors, ~/.cache/lors):

    tokens/<key>/manifest.json       what the stream is made of
                 tokenizer.json      the tokenizer, for the process that fills the cache
                 000000.safetensors  tokens (SHARD_TOKENS,), starts: where in it documents start
                 end.json            once the source is read to its end: {"tokens", "documents"}
                 .lock .writer       held by those who read, and by the one who writes

The stream knows nothing of sample lengths and shuffles, so runs with others share it. Shards are the same whoever
writes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from lors_cli.errors import ResourceError, UsageError
from lors_cli.files import atomic, hashes, locks
from lors_cli.files.remembered import user_cache
from lors_cli.output import console

CACHE_VERSION = 2
"""Raised when the same text and tokenizer give other tokens; 2 since blank texts are left out."""
SHARD_TOKENS = 1 << 20
DEFAULT_LIMIT_GIB = 20.0
END_NAME = "end.json"
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


def cache_dir() -> Path:
    """Where tokenised text is kept: $LORS_CACHE_DIR, else `lors` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("LORS_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen))
    return user_cache()


def size_limit() -> int:
    """Bytes that all tokenised text may take: $LORS_CACHE_GIB.

    Raises:
        UsageError: that is no number above 0.
    """
    text = os.environ.get("LORS_CACHE_GIB") or str(DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise UsageError(f"$LORS_CACHE_GIB must be a number above 0, not {text}.", "It bounds the cache of tokens.")
    return int(limit * 2**30)


class TokenCache:
    """One text with one tokenizer, in a folder `tokens/<key>` that is there already."""

    def __init__(self, folder: Path, lock: IO[str] | None = None) -> None:
        self.folder, self._lock = folder, lock
        self.manifest: dict[str, Any] = atomic.read_json(folder / MANIFEST_NAME) or {}
        self.shard_tokens: int = self.manifest["shard_tokens"]
        self._known_shards = 0
        self._end: int | None = None

    # ---- reading

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:06d}.safetensors"

    def num_shards(self) -> int:
        """Shards that are there, from the first on without a gap."""
        while self.shard(self._known_shards).is_file():
            self._known_shards += 1
        return self._known_shards

    def available(self) -> int:
        """Tokens that can be read."""
        in_shards = self.num_shards() * self.shard_tokens  # before the end is looked for, which is written first
        end = self._recorded_end()
        return in_shards if end is None else min(in_shards, end)

    def end(self) -> int | None:
        """Tokens of the whole stream, None while not all of it is there."""
        if self._end is None:
            end = self._recorded_end()
            self._end = end if end is not None and self.available() == end else None
        return self._end

    def _recorded_end(self) -> int | None:
        found = atomic.read_json(self.folder / END_NAME)
        return found["tokens"] if isinstance(found, dict) else None

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `first` to before `last`, all of which must be there, and bool where documents start."""
        tokens = np.empty(last - first, dtype=np.int64)
        starts = np.zeros(last - first, dtype=bool)
        place = first
        while place < last:
            number, inside = divmod(place, self.shard_tokens)
            taken = min(last - place, self.shard_tokens - inside)
            file, marks = _opened(self.shard(number))
            tokens[place - first : place - first + taken] = file.get_slice("tokens")[inside : inside + taken]
            low, high = np.searchsorted(marks, [inside, inside + taken])
            starts[marks[low:high].astype(np.int64) - inside + place - first] = True
            place += taken
        return tokens, starts

    # ---- writing

    def write_shard(self, number: int, tokens: np.ndarray, starts: np.ndarray, after: dict[str, Any]) -> None:
        """Write a shard; it appears whole.

        Args:
            tokens: (SHARD_TOKENS,), fewer in the last one.
            starts: where in it documents start, ascending.
            after: where the source is to be read on from.
        """
        from safetensors.numpy import save

        content = save({"tokens": tokens, "starts": starts.astype(np.uint32)}, metadata={"after": json.dumps(after)})
        atomic.write_bytes(self.shard(number), content)

    def write_end(self, num_tokens: int, num_documents: int) -> None:
        """Say that the source has no more; the last shard, which may be short, is written after that."""
        atomic.write_json(self.folder / END_NAME, {"tokens": num_tokens, "documents": num_documents})

    def after(self, number: int) -> dict[str, Any]:
        """Where the source is to be read on from after a shard."""
        from safetensors import safe_open

        with safe_open(self.shard(number), "np") as file:
            return json.loads(file.metadata()["after"])

    # ---- staying

    def hold(self) -> None:
        """Keep others from removing it while this process lives."""
        self._lock = _locked(self.folder)

    def release(self) -> None:
        """Let others remove it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Be the only one that writes in a cache's folder; waits for another to end.

    Where the file system has no locks there may be several: they write the same.
    """
    with open(folder / ".writer", "a", encoding="utf-8") as file:
        locks.lock(file, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=256)
def _opened(path: Path) -> tuple[Any, np.ndarray]:
    """A shard's open file and its documents' starts."""
    from safetensors import safe_open

    file = safe_open(path, "np")
    return file, file.get_tensor("starts")


def open_cache(root: Path, manifest: dict[str, Any], tokenizer: str) -> TokenCache:
    """The cache of a text, made when it is not there, and held.

    `manifest` says what the stream is made of, its hash is the key; `tokenizer` is JSON.
    """
    settings = {"version": CACHE_VERSION, "shard_tokens": SHARD_TOKENS, **manifest}
    settings["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
    key = hashes.fingerprint("tokens", CACHE_VERSION, settings, {})
    folder = root / "tokens" / key
    return TokenCache(folder, opened_folder(folder, settings, {TOKENIZER_NAME: tokenizer}))


def opened_folder(folder: Path, manifest: dict[str, Any], texts: Mapping[str, str]) -> IO[str]:
    """Make a cache's folder, with these texts and last its manifest, when it is not there, and hold it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        if lock is None:
            continue  # it was removed in this moment
        if atomic.read_json(folder / MANIFEST_NAME) is None:
            with writing(folder):  # runs and processes that begin at once
                if atomic.read_json(folder / MANIFEST_NAME) is None:
                    for name, text in texts.items():
                        atomic.write_text(folder / name, text)
                    atomic.write_json(folder / MANIFEST_NAME, manifest)
        os.utime(folder / MANIFEST_NAME)  # the least recently used goes first
        return lock


def _locked(folder: Path) -> IO[str] | None:
    """A shared lock on the folder, None when it is gone by now."""
    try:
        file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return None
    locks.lock(file, fcntl.LOCK_SH)
    if locks.is_there(folder / ".lock", file):
        return file
    file.close()
    return None


def make_room(cache: Path, num_bytes: int) -> None:
    """Remove the caches beside `cache` that were not used for longest until it has room for more, but none in use.

    Raises:
        ResourceError: what is in use takes the whole room.
    """
    limit = size_limit()
    root = cache.parent
    for remains in root.glob(".removed-*"):
        shutil.rmtree(remains, ignore_errors=True)
    sizes = {folder: folder_bytes(folder) for folder in root.iterdir() if folder.is_dir()}
    total = sum(sizes.values()) + num_bytes
    for folder in sorted(sizes, key=_last_used):
        if total <= limit:
            return
        if folder != cache and _remove(folder):
            total -= sizes[folder]
    if total > limit:
        raise ResourceError(
            f"the cache of {root.name} in {root.parent} may take {console.gib(limit)}, and what is in use needs more.",
            "Raise it with LORS_CACHE_GIB=40 or so, or choose another disk with LORS_CACHE_DIR.",
        )


def _last_used(folder: Path) -> float:
    try:
        return (folder / MANIFEST_NAME).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path) -> bool:
    """Remove a cache unless someone uses it; it is gone at once, whatever happens meanwhile."""
    gone = folder.with_name(f".removed-{os.getpid()}-{folder.name}")
    try:
        with open(folder / ".lock", "a", encoding="utf-8") as file:
            locked = locks.lock(file)
            if locked is None:
                console.warn(f"{folder} stays: this file system has no locks, so somebody may use it.")
            if not locked:
                return False
            os.rename(folder, gone)
    except FileNotFoundError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def folder_bytes(folder: Path) -> int:
    """What a cache takes on disk."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
