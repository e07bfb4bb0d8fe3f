"""Checkpoints that are made sparse, or put on grids, as files, and then packed and unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lors_cli.files.records import StageRecord
from lors_cli.grid import GridSpec, fit_grid
from lors_cli.models.grids import save_grids
from lors_cli.models.packed.checkpoint import Checkpoint, unpack_model
from lors_cli.models.packed.stage import pack_model
from lors_cli.recipe.packing import PackConfig
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import Pattern, keep_largest

INT4 = GridSpec(4, 32)
HALF = Pattern.parse("2:4")


def made_sparse(folder: Path, pattern: Pattern = HALF, spare: str = "!") -> Path:
    """The same checkpoint with the linears of its blocks pruned by magnitude; `spare`: part of the names of others."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight") and spare not in name:
            tensors[name] = tensor * keep_largest(tensor.abs(), pattern, per_row=False)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantised(
    folder: Path, spec: GridSpec = INT4, pattern: Pattern = HALF, dtype: torch.dtype = torch.float32, floats: str = "!",
    dense: str = "!",
) -> Path:  # fmt: skip
    """The same checkpoint, sparse, with its weights rounded to grids that lie beside it.

    Args:
        floats: layers by part of their names that are sparse and on no grid; `dense`: that are neither.
    """
    tensors, grids = load_file(folder / "model.safetensors"), {}
    for key, tensor in tensors.items():
        tensors[key] = tensor = tensor.to(dtype)
        if not (key.startswith("model.layers.") and key.endswith("_proj.weight")) or dense in key:
            continue
        mask = keep_largest(tensor.abs(), pattern, per_row=False)
        tensors[key] = tensor * mask
        if floats not in key:
            grid = fit_grid(tensor, mask, spec)
            tensors[key] = grid.rounded(tensor) * mask
            grids[key.removesuffix(".weight")] = grid
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_grids(folder, grids)
    settings = json.loads((folder / "config.json").read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def pack(model: Path, out: Path, **settings: Any) -> StageRecord:
    return pack_model(PackConfig(), ModelConfig(path=str(model), **settings), out)


def unpack(model: Path, out: Path, **settings: Any) -> dict[str, int]:
    return unpack_model(Checkpoint(ModelConfig(path=str(model), **settings), packed=True), out)


def same(one: Path, other: Path) -> None:
    """Of two checkpoints: every tensor, bit for bit."""
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert tensor.equal(after[key]), key
