"""The inputs of the block that is next, for every calibration batch: on the device, in memory, or on disk.

They are written to disk after every block in any case, since that is where an interrupted run resumes.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from lors_cli.machine import processes
from lors_cli.machine.memory import available_memory
from lors_cli.models.tensor_files import Entry, TensorWriter, write_tensors
from lors_cli.output import console

Place = Literal["device", "cpu", "disk"]
SHARE_OF_FREE = 0.5
"""Hidden states stay in a memory if they take at most this share of what is free there."""
FILE_NAME = re.compile(r"inputs_(\d{4})\.(\d+)of(\d+)\.safetensors")


def choose_place(wanted: Literal["auto", "device", "cpu", "disk"], num_bytes: int, device: torch.device) -> Place:
    """Where this process's hidden states, of `num_bytes`, are kept between blocks; auto is the fastest with room."""
    if wanted != "auto":
        return "device" if wanted == "cpu" and device.type == "cpu" else wanted
    if device.type == "cuda" and num_bytes <= SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if num_bytes <= SHARE_OF_FREE * available_memory() / processes.num_local_processes():
        if device.type == "cuda":
            console.info(f"  {console.gib(num_bytes)} of hidden states are too many for the GPU: kept in CPU memory")
        return "cpu" if device.type == "cuda" else "device"
    console.info(f"  {console.gib(num_bytes)} of hidden states are too many for the memory: kept on disk")
    return "disk"


class HiddenStates:
    """Hidden states (samples, tokens, hidden_size) by batch number.

    They are written to `folder`, kept in `place` between blocks, and `get` puts them on `device`.

    Args:
        ahead: they go on before the block is done, so that a run may have to resume one block earlier.
    """

    def __init__(self, folder: Path, place: Place, device: torch.device, *, ahead: bool = False) -> None:
        self.folder, self._place, self._device, self._ahead = folder, place, device, ahead
        folder.mkdir(exist_ok=True)
        self._index = -1
        self._kept: dict[int, torch.Tensor] = {}
        self._files: dict[int, Path] = {}
        self._entries: list[Entry] = []
        self._writer: TensorWriter | None = None
        self._saver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._saving: Future[None] | None = None

    @property
    def numbers(self) -> list[int]:
        """The batches of this process, in order."""
        return [int(entry.name) for entry in self._entries]

    def expect(self, shapes: dict[int, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Say what is to come, before the first block's inputs are `put`: the shape of every batch, by number."""
        self._entries = [Entry(_name(number), shape, dtype) for number, shape in sorted(shapes.items())]

    def get(self, number: int) -> torch.Tensor:
        """A batch of the current block's inputs, on the device."""
        if self._place != "disk":
            return self._kept[number].to(self._device, non_blocking=True)
        with safe_open(self._files[number], framework="pt") as file:
            return file.get_tensor(_name(number)).to(self._device)

    def put(self, number: int, hidden: torch.Tensor) -> None:
        """Give a batch of the next block's inputs; batches come in order."""
        if self._writer is None:
            self._writer = TensorWriter(self._path(self._index + 1), self._entries)
        self._writer.write(_name(number), hidden)
        self._keep(number, hidden)

    def _keep(self, number: int, hidden: torch.Tensor) -> None:
        if self._place == "device":
            self._kept[number] = hidden.to(self._device)
        elif self._place == "cpu":
            pinned = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=torch.cuda.is_available())
            self._kept[number] = pinned.copy_(hidden)

    def advance(self, weights: Path | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Go on to the next block; what this one leaves is made durable while the next is computed.

        The file of inputs appears last: it is the sign that its block is done. Where several processes work, inputs
        go only when all of them have those of a later block.

        Args:
            weights: file for the block's tensors, None where there is none to write.
            tensors: of the block; not to be changed afterwards.
        """
        self.settle()
        writer, self._writer = self._writer, None
        assert writer is not None
        old = self._path(self._index - (2 if processes.num_processes() > 1 else int(self._ahead)))
        self._saving = self._saver.submit(_save, weights, tensors or {}, writer, old)
        self._index += 1
        self._files = dict.fromkeys(self.numbers, writer.path)
        if self._place == "disk":
            self.settle()

    def settle(self) -> None:
        """Wait until everything given so far is durable."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Stop saving; what is not whole is removed."""
        self._saver.shutdown(wait=True)
        if self._writer is not None:
            self._writer.abandon()

    def there(self, num_batches: int) -> set[int]:
        """The blocks whose inputs an earlier run has left for all batches."""
        return {index for index, files in self._saved().items()
                if {number for file in files for number in _numbers(file)} == set(range(num_batches))}  # fmt: skip

    def resume(self, numbers: list[int], num_batches: int, among: set[int] | None = None) -> int | None:
        """Take up the hidden states of an earlier run, of as many processes as it may have had.

        Args:
            numbers: this process's batches.
            num_batches: of all processes; only a block whose inputs are there for all of them counts.
            among: blocks that will do, None for any.

        Returns:
            The index of the block to resume at, None when there is nothing to resume from.
        """
        left = self.there(num_batches)  # batches may be cut otherwise for other processes
        index = max(left if among is None else left & among, default=None)
        if index is None:
            return None
        self._index = index
        found = {number: file for file in self._saved()[index] for number in _numbers(file)}
        self._files = {number: found[number] for number in numbers}
        self._entries = [_entry(found[number], number) for number in sorted(numbers)]
        for number in numbers if self._place != "disk" else ():
            with safe_open(found[number], framework="pt") as file:
                self._keep(number, file.get_tensor(_name(number)))
        return index

    def clear(self) -> None:
        """Remove what an earlier run has left, which nothing was taken up from."""
        for file in self.folder.glob("inputs_*"):
            file.unlink()

    def _saved(self) -> dict[int, list[Path]]:
        files: dict[int, list[Path]] = {}
        for file in sorted(self.folder.glob("inputs_*.safetensors")):
            match = FILE_NAME.fullmatch(file.name)
            if match:
                files.setdefault(int(match[1]), []).append(file)
        return files

    def _path(self, index: int) -> Path:
        part = f"{processes.process_index()}of{processes.num_processes()}"
        return self.folder / f"inputs_{index:04d}.{part}.safetensors"


def _save(weights: Path | None, tensors: dict[str, torch.Tensor], inputs: TensorWriter, old: Path) -> None:
    try:
        if weights is not None:
            write_tensors(weights, tensors)
        inputs.finish()
    except BaseException:
        inputs.abandon()
        raise
    old.unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"{number:06d}"


def _numbers(file: Path) -> list[int]:
    with safe_open(file, framework="pt") as opened:
        return [int(name) for name in opened.keys()]  # noqa: SIM118 - no mapping


def _entry(file: Path, number: int) -> Entry:
    with safe_open(file, framework="pt") as opened:
        return Entry.of(_name(number), opened.get_tensor(_name(number)))
