"""The tensors of a checkpoint before and after packing, one at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lors_cli.errors import UsageError
from lors_cli.files import atomic, records
from lors_cli.grid import Grid
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.grids import GRIDS_NAME, load_grids, save_grids
from lors_cli.models.hub import here
from lors_cli.models.loading import MAX_SHARD_SIZE, load_config
from lors_cli.models.packed.format import PADDING, Packed, grid_keys, mask_key, mask_words, pack, read_packed
from lors_cli.models.packed.kernels.choice import unpack
from lors_cli.models.packed.linear import PackedLinear, pack_skeleton
from lors_cli.models.packed.plan import PackPlan
from lors_cli.models.packed.quantizer import PackedConfig
from lors_cli.models.quantised import PACKED, Quantised
from lors_cli.models.sources import checkpoint_files
from lors_cli.models.stored import conversions_of, find_sources, match, open_tensors, weight_files
from lors_cli.models.streaming import network_without_weights
from lors_cli.models.tensor_files import Entry, Loader, entry_of, write_checkpoint
from lors_cli.output import progress

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig


class Checkpoint:
    """A checkpoint's safetensors, and the linears among them that may be, or are, packed.

    `keys` are the files' names of their weights, `shapes` are (out_features, in_features); `plain` are the weights of
    the decoder blocks that are not packed, or of a plain checkpoint cannot be. `specs` are the grids that weights lie
    on, by name; `grids` those themselves of a plain checkpoint.
    """

    def __init__(self, model: ModelConfig, *, packed: bool = False) -> None:
        self.path, self.shard_size = model.path, MAX_SHARD_SIZE
        where = here(model, weights=True)
        if where.gguf_file is not None or where.folder is None:
            raise UsageError(f"{model.path} is a .gguf, which holds a dense model.", "Prune it first: lors prune")
        self.folder = where.folder
        self.dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        settings = load_config(model)
        quantised = Quantised.of(settings)
        _check_packed(model.path, quantised, wanted=packed)
        self.tensors = open_tensors(weight_files(model), model.path)
        network = network_without_weights(settings, torch.float32, model)
        self.config = None if quantised is None else PackedConfig.from_dict(quantised.settings)
        self.grids = load_grids(self.folder) if self.config is None else {}
        if self.config is None:
            find_sources(network, self.tensors, conversions_of(network), model.path)  # refuses what is no plain weights
            linears: dict[str, Any] = {name: weight.module for name, weight in prunable_weights(network).items()}
            weights = list(linears)
        else:
            weights = list(prunable_weights(network))
            pack_skeleton(network, self.config.modules, self.config.structured, self.config.specs)
            linears = {name: network.get_submodule(name) for name in self.config.modules}
        found = match(self.tensors, network.state_dict(), conversions_of(network), network.base_model_prefix)
        self.keys = _own_keys(found, linears)
        wide = network._get_dtype_plan(self.dtype) if self.dtype else {}  # which loading keeps in float32, too
        self._as_stored = {key for name, sources in found.items() for key, _ in sources
                           if any(re.search(pattern, name) for pattern in wide)}  # fmt: skip
        self.plain = [name for name in weights if name not in self.keys]
        self.shapes = {name: (linears[name].out_features, linears[name].in_features) for name in self.keys}
        self.grids = {name: grid for name, grid in self.grids.items() if name in self.keys}
        self.specs = {name: grid.spec for name, grid in self.grids.items()}
        if self.config is not None:
            self.specs = self.config.specs
            self._check_whole(list(self.config.modules))
        self._check_dtype()

    def _check_whole(self, modules: list[str]) -> None:
        """Refuse a packed checkpoint of which a part is missing."""
        there = self.tensors.keys()
        lacking = [name for name in modules if name not in self.keys or not there >= set(self.parts(name))]
        if lacking:
            raise UsageError(f"{self.path}: the values or the mask of {lacking[0]} are missing from its files.")

    def _check_dtype(self) -> None:
        """Refuse another number format for values on a grid: rounded to it, they would lie on none."""
        for name in self.specs if self.dtype is not None else ():
            part = self.parts(name)[2] if self.config is not None else self.keys[name]
            stored = entry_of(part, self.tensors[part]).dtype
            if stored != self.dtype:
                raise UsageError(
                    f"{self.path} lies on grids in {str(stored).removeprefix('torch.')}: in another number format it "
                    "would lie on none.",
                    "Leave out dtype (--dtype).",
                )

    def parts(self, name: str) -> list[str]:
        """The keys of a packed linear: values, mask, and of codes scales and zero points."""
        key = self.keys[name]
        return [key, mask_key(key), *grid_keys(key, self.specs.get(name))]

    def grid(self, name: str) -> Grid:
        """What the codes of a packed linear stand for."""
        return Grid(self.specs[name], *(self.read(part) for part in self.parts(name)[2:]))

    def packed(self, name: str) -> Packed:
        """A packed linear's weight, checked."""
        assert self.config is not None
        return read_packed(name, self.read, self.keys[name], self.shapes[name], self.config.structured,
                           self.config.modules[name], self.specs.get(name))  # fmt: skip

    def read(self, key: str) -> torch.Tensor:
        """A tensor of the files, in the number format that was asked for."""
        tensor: torch.Tensor = self.tensors[key][...]  # which a number without dimensions has too
        return tensor.to(self.entry(key).dtype)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(self.entry(key).num_bytes for key in self.tensors)

    def entry(self, key: str) -> Entry:
        """What a tensor takes."""
        entry = entry_of(key, self.tensors[key])
        if self.dtype is None or not entry.dtype.is_floating_point or key in self._as_stored:
            return entry
        return Entry(key, entry.shape, self.dtype)

    def copy_settings(self, folder: Path, quantization: dict[str, Any] | None) -> None:
        """All of the checkpoint but its weights, config.json with this `quantization_config`."""
        for name in checkpoint_files(self.folder):
            if not name.endswith((".safetensors", ".index.json")):
                shutil.copyfile(self.folder / name, folder / name)
        settings: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key in ("quantization_config", "compression_config", "auto_map"):
            settings.pop(key, None)
        if self.dtype is not None:
            settings.pop("torch_dtype", None)
            settings["dtype"] = str(self.dtype).removeprefix("torch.")
        if quantization is not None:
            settings["quantization_config"] = quantization
        atomic.write_json(folder / "config.json", settings)


def _check_packed(path: str, quantised: Quantised | None, *, wanted: bool) -> None:
    """Refuse a checkpoint that is packed already, or not, or stored in yet another way."""
    is_packed = quantised is not None and quantised.method == PACKED
    if wanted and not is_packed:
        raise UsageError(f"{path} is not packed: there is nothing to undo.")
    if is_packed and not wanted:
        raise UsageError(f"{path} is packed already.", "lors pack --unpack undoes it.")
    if quantised is not None and not is_packed:
        raise UsageError(f"{path} is quantised ({quantised.method}); only plain weights are packed.",
                         "lors prune makes a sparse model of it.")  # fmt: skip


def _own_keys(found: dict[str, list[tuple[str, bool]]], linears: dict[str, Any]) -> dict[str, str]:
    """The files' names of the weights of linears, plain or packed, that lie there by themselves; `found` by `match`."""
    keys = {}
    for name, module in linears.items():
        sources = found.get(f"{name}.weight", [])
        if isinstance(module, (nn.Linear, PackedLinear)) and len(sources) == 1 and sources[0][0].endswith(".weight"):
            key, is_converted = sources[0]
            if not is_converted:
                keys[name] = key
    return keys


def packed_tensors(source: Checkpoint, plan: PackPlan) -> Iterator[tuple[Entry, Loader]]:
    """Every tensor of the packed checkpoint: its entry, and how to make it."""
    last: dict[str, Packed] = {}

    def packed(name: str) -> Packed:
        if name not in last:
            last.clear()
            last[name] = _packed_as_planned(source, plan, name)
        return last[name]

    def scales(name: str) -> list[torch.Tensor]:
        grid = source.grids[name]
        return [grid.scales] if grid.zeros is None else [grid.scales, grid.zeros]

    modules = {source.keys[name]: name for name in plan.modules}
    for key in source.tensors:
        if key not in modules:
            yield source.entry(key), partial(source.read, key)
            continue
        name, dtype = modules[key], source.entry(key).dtype
        (rows, columns), spec = plan.shapes[name], source.specs.get(name)
        stored = Entry(key, (plan.modules[name] + PADDING,), dtype if spec is None else torch.uint8)
        yield stored, partial(lambda name: packed(name).values, name)
        yield (
            Entry(mask_key(key), (rows, mask_words(columns)), torch.int32),
            partial(lambda name: packed(name).mask, name),
        )
        for number, part in enumerate(grid_keys(key, spec)):
            tensor = scales(name)[number]
            yield Entry.of(part, tensor), partial(lambda name, number: scales(name)[number], name, number)


def _packed_as_planned(source: Checkpoint, plan: PackPlan, name: str) -> Packed:
    """A weight packed, and held against what it was planned by: the file may have changed since."""
    changed = UsageError(f"{name} has changed while the model was packed.", "Pack it again.")
    try:
        packed = pack(source.read(source.keys[name]), plan.held, source.grids.get(name))
    except ValueError as error:
        raise changed from error
    if len(packed.values) - PADDING != plan.modules[name]:
        raise changed
    return packed


def unpacked_tensors(source: Checkpoint) -> Iterator[tuple[Entry, Loader]]:
    """Every tensor of the unpacked checkpoint."""
    assert source.config is not None

    def weight(name: str) -> torch.Tensor:
        return unpack(source.packed(name))

    modules = {key: name for name, key in source.keys.items()}
    others = {part for name in source.keys for part in source.parts(name)[1:]}
    for key in source.tensors:
        if key in modules:
            name = modules[key]
            values = source.parts(name)[2] if name in source.specs else key
            yield Entry(key, source.shapes[name], source.entry(values).dtype), partial(weight, name)
        elif key not in others:
            yield source.entry(key), partial(source.read, key)


def step_by_step(tensors: list[tuple[Entry, Loader]], task: progress.Task) -> Iterator[tuple[Entry, Loader]]:
    def load(read: Callable[[], torch.Tensor]) -> torch.Tensor:
        tensor = read()
        task.advance()
        return tensor

    return ((entry, partial(load, read)) for entry, read in tensors)


def unpacked_size(source: Checkpoint) -> dict[str, int]:
    """Number of weights of a packed checkpoint that are unpacked, bytes before and after."""
    num_bytes = sum(entry.num_bytes for entry, _ in unpacked_tensors(source))
    return {"weights": len(source.keys), "bytes_before": source.num_bytes, "bytes": num_bytes}


def unpack_model(source: Checkpoint, out: Path) -> dict[str, int]:
    """Write a packed checkpoint as an ordinary one, bit for bit what was packed.

    Returns:
        As `unpacked_size`.

    Raises:
        UsageError: its files are broken.
    """
    tensors = list(unpacked_tensors(source))
    staging = records.staging_dir(out)
    try:
        source.copy_settings(staging, None)
        with progress.progress("unpack", len(tensors), "tensors") as task:
            write_checkpoint(staging, step_by_step(tensors, task), max_shard_size=source.shard_size)
        if source.specs:
            save_grids(staging, {name: source.grid(name) for name in source.specs})
        (out / GRIDS_NAME).unlink(missing_ok=True)  # of a model that was there before
        files = [path for path in staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path.name == "config.json"):
            target = out / file.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return unpacked_size(source)
