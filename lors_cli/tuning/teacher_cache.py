"""A teacher's likeliest tokens on disk, in $LORS_CACHE_DIR, by the samples that they are said of.

    teacher/<key>/manifest.json                whose predictions they are, how many a label, in which number format
                  <hash of keys>.safetensors   samples: keys (samples, 16), offsets (samples + 1,) of their labels,
                                               ids and log_p (labels, top_k), log_rest (labels,)
                  .lock                        held by those who read or write

A sample's key is a hash of its tokens, its positions and which of them are labelled: so epochs, processes, resumed
runs, and runs with other seeds, lengths or mixtures find what is there. Each sample is computed alone, so what is
stored does not depend on its neighbours; files appear whole, by rename, and what a killed run has written is gone on
with.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.nn import functional as F

from lors_cli.data.samples import IGNORED, Sample
from lors_cli.data.stream.cache import cache_dir, make_room, opened_folder, writing
from lors_cli.errors import ResourceError, UsageError
from lors_cli.files import atomic, hashes
from lors_cli.machine import processes
from lors_cli.output import console, progress
from lors_cli.output.console import counted, gib
from lors_cli.recipe.schema import TeacherCacheConfig
from lors_cli.tuning.divergence import TopTokens
from lors_cli.tuning.estimate import bytes_a_label, id_bytes
from lors_cli.tuning.head import Teacher, chunk_tokens

VERSION = 1
"""Raised when the same teacher and sample give other numbers."""
Arrays = dict[str, np.ndarray]
"""A sample, each of its lists as an array."""
FILE_LABELS = 1 << 15
"""Labels of a file, more or less."""
_KEY_BYTES = 16


def _id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(f"uint{8 * id_bytes(vocab_size)}")


def key_of(ids: np.ndarray, is_labelled: np.ndarray, positions: np.ndarray | None) -> bytes | None:
    """The key of a sample; None where nothing is labelled.

    What comes after its last label counts for nothing, so that padding does not.

    Args:
        ids: (tokens,).
        is_labelled: (tokens - 1,) or more, whether a token's successor is a label.
        positions: (tokens,), None where they ascend from 0.
    """
    places = is_labelled.nonzero()[0]
    if not len(places):
        return None
    end = int(places[-1]) + 2
    positions = np.arange(end) if positions is None else positions[:end]
    content = (part.astype(np.int64).tobytes() for part in (ids[:end], is_labelled[: end - 1], positions))
    return hashlib.blake2b(b"".join(content), digest_size=_KEY_BYTES).digest()


class TeacherCache:
    """What one teacher says of samples; `folder` is held while it lives."""

    def __init__(self, config: TeacherCacheConfig, teacher: str, vocab_size: int, device: torch.device, dtype: str):
        if config.top_k > vocab_size:
            raise UsageError(
                f"distill.cache.top_k: {config.top_k} is more than the vocabulary of {vocab_size}.", "Lower it."
            )
        manifest = {"teacher": teacher, "top_k": config.top_k, "dtype": config.dtype, "vocab_size": vocab_size,
                    "computed": f"{device.type} {dtype}"}  # fmt: skip
        self.config, self.vocab_size = config, vocab_size
        self.folder = cache_dir() / "teacher" / hashes.fingerprint("teacher", VERSION, manifest, {})
        self._lock: IO[str] = opened_folder(self.folder, manifest, {})
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._read_files: set[Path] = set()

    def look(self) -> None:
        """Take note of what others have written meanwhile; a file that is broken is removed, and made anew."""
        from safetensors import SafetensorError

        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read_files:
                continue
            try:
                file = _opened(path)
                keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets").tolist()
            except SafetensorError:
                console.warn(f"{path} is broken; what it held is computed anew.")
                path.unlink(missing_ok=True)
                continue
            self._read_files.add(path)
            for key, first, last in zip(keys, offsets, offsets[1:], strict=False):
                self._places[key.tobytes()] = (path, first, last)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def missing(self, samples: Iterable[Sample]) -> dict[bytes, Arrays]:
        """The samples that it does not have, each once, in their order."""
        found: dict[bytes, Arrays] = {}
        for sample in samples:
            arrays = {name: np.array(values, np.int32) for name, values in sample.items()}
            key = key_of(arrays["input_ids"], arrays["labels"][1:] != IGNORED, arrays.get("position_ids"))
            if key is not None and key not in self._places:
                found.setdefault(key, arrays)
        return found

    def write(self, entries: dict[bytes, TopTokens]) -> None:
        """Add what is said of some samples, in a file."""
        from safetensors.numpy import save

        parts = list(entries.values())
        content = {
            "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, _KEY_BYTES),
            "offsets": np.cumsum([0, *(len(part.ids) for part in parts)]),
            "ids": np.concatenate([part.ids.cpu().numpy() for part in parts]).astype(_id_dtype(self.vocab_size)),
            "log_p": np.concatenate([part.log_p.cpu().numpy() for part in parts]).astype(self.config.dtype),
            "log_rest": np.concatenate([part.log_rest.cpu().numpy() for part in parts]).astype(np.float32),
        }
        name = hashlib.sha256(b"".join(entries)).hexdigest()[:32]
        make_room(self.folder, sum(part.nbytes for part in content.values()))
        with writing(self.folder):  # another run may write the very same
            atomic.write_bytes(self.folder / f"{name}.safetensors", save(content))

    def read(self, keys: Sequence[bytes], device: torch.device) -> TopTokens:
        """What is said of the labels of some samples, one after the other."""
        found = []
        for key in keys:
            path, first, last = self._places[key]
            file = _opened(path)
            found.append([file.get_slice(name)[first:last] for name in ("ids", "log_p", "log_rest")])
        ids, log_p, log_rest = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return TopTokens(torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(log_p).to(device),
                         torch.from_numpy(log_rest).to(device))  # fmt: skip

    def check_room(self, missing: dict[bytes, Arrays]) -> None:
        """Say what the missing samples will take, and refuse what cannot fit.

        Raises:
            ResourceError: the disk, or the limit of the cache, has no room for it.
        """
        labels = sum(int((sample["labels"][1:] != IGNORED).sum()) for sample in missing.values())
        each = bytes_a_label(self.config, self.vocab_size)
        size = f"{labels:,} labels of {each:,} bytes, {gib(labels * each)}"
        console.info(f"  teacher's cache: {self.folder}; {counted(len(missing), 'sample')} to compute, {size}")
        free = shutil.disk_usage(self.folder).free
        if labels * each > free:
            raise ResourceError(
                f"distill.cache: {size}; {gib(free)} are free in {self.folder}.",
                "Lower distill.cache.top_k, or choose another disk with LORS_CACHE_DIR.",
            )
        make_room(self.folder, labels * each)

    def fill(self, missing: dict[bytes, Arrays], teacher: Teacher) -> None:
        """Have the teacher say what is missing; several processes share the work."""
        mine = list(missing.items())[processes.process_index() :: processes.num_processes()]
        with progress.progress("teacher", len(mine), "samples") as task:
            entries: dict[bytes, TopTokens] = {}
            for done, (key, sample) in enumerate(mine, 1):
                entries[key] = _said(teacher, sample, self.config.top_k)
                if sum(len(part.ids) for part in entries.values()) >= FILE_LABELS or done == len(mine):
                    self.write(entries)
                    entries = {}
                task.update(done)


@torch.no_grad()
def _said(teacher: Teacher, sample: Arrays, top_k: int) -> TopTokens:
    """The likeliest tokens at a sample's labels."""
    device = teacher.model.device
    names = [name for name in sample if name != "labels"]
    inputs = {name: torch.from_numpy(sample[name]).long()[None].to(device) for name in names}
    labels = F.pad(torch.from_numpy(sample["labels"]).long()[1:], (0, 1), value=IGNORED).to(device)
    chosen = (labels != IGNORED).nonzero().squeeze(1)
    said = teacher.predictions(inputs, labels, chosen)
    size = chunk_tokens(device, said.weight.shape[0])
    parts = [TopTokens.of(said.logits(slice(first, first + size)).float(), top_k)
             for first in range(0, len(chosen), size)]  # fmt: skip
    return TopTokens(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_p", "log_rest")))


@lru_cache(maxsize=256)
def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "np")


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose predictions are read from a cache."""

    cache: TeacherCache
    weight: float
    temperature: float

    def predictions(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor) -> TopTokens:
        """Those of the tokens that are kept."""
        ids = inputs["input_ids"].cpu().numpy()
        is_labelled = (labels != IGNORED).cpu().numpy().reshape(ids.shape)
        positions = inputs["position_ids"].cpu().numpy() if "position_ids" in inputs else [None] * len(ids)
        keys = [key_of(*row) for row in zip(ids, is_labelled, positions, strict=True)]
        found = [key for key in keys if key is not None]
        if found:
            return self.cache.read(found, labels.device)
        k = self.cache.config.top_k
        empty = torch.zeros(0, k, device=labels.device)
        return TopTokens(empty.long(), empty, empty[:, 0])
