"""The grids of a quantised sparse checkpoint: its weights lie there as ordinary floats, and beside them their scales.

`grid/scales.safetensors` in the checkpoint's folder holds `P.scale` (R, groups) and, where the grid is not symmetric,
`P.zero` (R, groups) uint8 of every linear P; bits, group_size and symmetric are in its metadata. A folder of its own,
since others' loaders read every .safetensors beside config.json as weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec
from lors_cli.models.tensor_files import write_tensors

GRIDS_NAME = "grid/scales.safetensors"


def save_grids(folder: Path, grids: Mapping[str, Grid]) -> None:
    """Write the grids of a checkpoint's linears, by full name, all of one kind, into its folder."""
    spec = next(iter(grids.values())).spec
    grids = dict(sorted(grids.items()))  # the same bytes, whoever wrote them
    tensors = {f"{name}.scale": grid.scales for name, grid in grids.items()}
    tensors |= {f"{name}.zero": grid.zeros for name, grid in grids.items() if grid.zeros is not None}
    (folder / GRIDS_NAME).parent.mkdir(exist_ok=True)
    write_tensors(folder / GRIDS_NAME, tensors, {
        "bits": str(spec.bits), "group_size": str(spec.group_size), "symmetric": str(spec.symmetric).lower(),
    })  # fmt: skip


def load_grids(folder: Path) -> dict[str, Grid]:
    """The grids of a checkpoint's linears by full name; empty where it has none.

    Raises:
        UsageError: the file is broken.
    """
    file = folder / GRIDS_NAME
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            spec = _spec(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no dict
        return {key.removesuffix(".scale"): _grid(spec, key, tensors) for key in tensors if key.endswith(".scale")}
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{file} is no file of grids: {error}.", "Prune the model again.") from error


def _spec(metadata: Mapping[str, str]) -> GridSpec:
    spec = GridSpec(int(metadata["bits"]), int(metadata["group_size"]), metadata["symmetric"] == "true")
    if not (2 <= spec.bits <= 8 and spec.group_size > 0):
        raise ValueError(f"{spec.bits} bits in groups of {spec.group_size}")
    return spec


def _grid(spec: GridSpec, key: str, tensors: dict[str, Any]) -> Grid:
    import torch

    scales = tensors[key]
    zeros = None if spec.symmetric else tensors[f"{key.removesuffix('.scale')}.zero"]
    if scales.dim() != 2 or not scales.is_floating_point() or not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"{key} holds no scales")
    fitting = zeros is None or (zeros.shape == scales.shape and zeros.dtype == torch.uint8)
    if not fitting or (zeros is not None and bool((zeros >= spec.num_codes).any())):
        raise ValueError(f"{key} has no zero points that fit it")
    return Grid(spec, scales, zeros)
