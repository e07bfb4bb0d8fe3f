"""Safetensors files written tensor by tensor, so that a checkpoint is never held in memory.

The format: eight bytes with the header's length, a JSON header with every tensor's type, shape and place, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.output import console

if TYPE_CHECKING:
    import torch

TYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
              "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor to come: its name in the file, its sizes and its number format."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """What a tensor will take in a file."""
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Its data's bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorWriter:
    """Writes one safetensors file in the order of its entries; it appears under its name by `finish`."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._pending = list(reversed(entries))
        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by finish or abandon
        header = _header(entries, metadata)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next entry's data, from any device."""
        import torch

        entry = self._pending.pop()
        assert (entry.name, entry.shape, entry.dtype) == (name, tuple(tensor.shape), tensor.dtype), entry
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Make the file whole and durable, and give it its name."""
        assert not self._pending, f"{self._pending[-1].name} was not written"
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        os.replace(self._partial, self.path)
        atomic.sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Remove what was written."""
        try:
            self._file.close()  # writes what is buffered, which may fail once more
        except OSError:
            console.detail(f"{self._partial} could not be written to its end")
        finally:
            self._partial.unlink(missing_ok=True)


def _header(entries: Sequence[Entry], metadata: dict[str, str] | None) -> bytes:
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        type_name = TYPE_NAMES[str(entry.dtype).removeprefix("torch.")]
        content[entry.name] = {"dtype": type_name, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


Loader = Callable[[], "torch.Tensor"]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all."""
    _write([(Entry.of(name, tensor), tensor.detach) for name, tensor in tensors.items()], path, metadata)


def _write(tensors: Sequence[tuple[Entry, Loader]], path: Path, metadata: dict[str, str] | None) -> None:
    writer = TensorWriter(path, [entry for entry, _ in tensors], metadata)
    try:
        for entry, load in tensors:
            writer.write(entry.name, load())
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[Entry, Loader]], *, max_shard_size: str,
    metadata: dict[str, str] | None = None, goes_on: bool = False,
) -> list[str]:  # fmt: skip
    """Write a checkpoint's weights: one model.safetensors, or shards with an index where it is larger.

    Args:
        tensors: every tensor's entry and how to get it; one is held at a time.
        max_shard_size: such as "5GB".
        metadata: what files say of themselves beside their format.
        goes_on: leave files that are there as they are, which an interrupted call has written.

    Returns:
        The files' names.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    loaders = {entry.name: (entry, load) for entry, load in tensors}
    split = split_state_dict_into_shards_factory(
        {name: entry for name, (entry, _) in loaders.items()},
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, names in split.filename_to_tensors.items():
        if not (goes_on and (folder / file_name).is_file()):
            _write([loaders[name] for name in names], folder / file_name, {"format": "pt", **(metadata or {})})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        atomic.write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    return [*split.filename_to_tensors, *([SAFE_WEIGHTS_INDEX_NAME] if split.is_sharded else [])]


def entry_of(name: str, stored: Any) -> Entry:
    """What a tensor of a safetensors file takes; `stored` is its slice.

    Raises:
        UsageError: it is in a number format that is not written here.
    """
    dtype = torch_type(stored)
    if dtype is None:
        raise UsageError(f"{name} is in {stored.get_dtype()}, a number format that lors does not write.")
    return Entry(name, tuple(stored.get_shape()), dtype)


def torch_type(stored: Any) -> torch.dtype | None:
    """The number format of a safetensors file's slice, None where it is none of `TYPE_NAMES`."""
    import torch

    return next((getattr(torch, key) for key, known in TYPE_NAMES.items() if known == stored.get_dtype()), None)


def saved_tensors(path: Path) -> Iterator[tuple[Entry, Loader]]:
    """Every tensor of a safetensors file: its entry, and how to read it; the file is opened anew for each."""
    from safetensors import safe_open

    def load(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            yield entry_of(name, file.get_slice(name)), partial(load, name)
