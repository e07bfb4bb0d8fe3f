"""The grids of a quantised sparse base: where they lie, and whether its weights lie on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, packed_metrics
from lors_cli.models.blocks import PrunableWeight
from lors_cli.models.grids import load_grids
from lors_cli.models.hub import here
from lors_cli.models.loading import load_config
from lors_cli.models.packed.checkpoint import Checkpoint
from lors_cli.models.quantised import PACKED, Quantised
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import LayerSparsity, Pattern
from lors_cli.tuning.kernels.on_grid import lies_on


def base_grids(model: ModelConfig, *, needed: bool = False) -> dict[str, Grid]:
    """The grids of a model's linears by full name; empty where its weights are ordinary ones.

    Raises:
        UsageError: it has none, and they are needed.
    """
    grids = _grids(model)
    if needed and not grids:
        raise UsageError(f"quantization_aware: the weights of {model.path} lie on no grid.",
                         "Prune it with prune.quantize, or tune without quantization_aware.")  # fmt: skip
    return grids


def _grids(model: ModelConfig) -> dict[str, Grid]:
    where = here(model, weights=True)
    if where.folder is None or where.gguf_file is not None:
        return {}
    quantised = Quantised.of(load_config(model))
    if quantised is None or quantised.method != PACKED:
        return load_grids(where.folder)
    source = Checkpoint(replace(model, dtype="auto"), packed=True)
    return {name: source.grid(name) for name in source.specs}


def grid_metrics(
    grids: Mapping[str, Grid], layers: Sequence[LayerSparsity], pattern: Pattern | None,
    weights: Mapping[str, PrunableWeight],
) -> dict[str, Any]:  # fmt: skip
    """What stage.json says of a model that lies on grids."""
    if not grids:
        return {}
    grid = next(iter(grids.values()))
    held = [layer.as_packed(pattern) for layer in layers if weights[layer.name].is_linear]
    return packed_metrics(grid.spec, held, 8 * grid.scales.dtype.itemsize)


def kept_grids(grids: Mapping[str, Grid], *, quantization_aware: bool) -> Mapping[str, Grid]:
    """Of a base's grids those that its tuned model lies on too: all, or none, which is said."""
    if not quantization_aware and grids:
        bits = next(iter(grids.values())).spec.bits
        console.info(f"  the tuned model leaves its {bits}-bit grid; tune.quantization_aware=true keeps it")
    return grids if quantization_aware else {}


def check_on_grids(weights: Mapping[str, torch.Tensor], grids: Mapping[str, Grid]) -> None:
    """Refuse weights that have no grid or do not lie on it.

    Raises:
        UsageError: naming the first of them.
    """
    for name, weight in weights.items():
        if name not in grids:
            raise UsageError(f"quantization_aware: {name} lies on no grid.", "Prune the model with prune.quantize.")
        scales = grids[name].scales
        if weight.dtype != scales.dtype:
            have, wanted = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, scales.dtype))
            raise UsageError(f"quantization_aware: the weights are {have} and their grid is {wanted}.",
                             f"Load the model as it is stored: model.dtype={wanted}, or --dtype {wanted}.")  # fmt: skip
        grid = Grid(grids[name].spec, scales.to(weight.device), _on(grids[name].zeros, weight.device))
        if not lies_on(weight, grid):
            raise UsageError(f"quantization_aware: {name} does not lie on its grid: it was changed after pruning.",
                             "Prune the model again with prune.quantize.")  # fmt: skip


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def grid_digest(weights: Mapping[str, torch.Tensor], grids: Mapping[str, Grid]) -> str:
    """A hash of quantised weights and their grids, to tie an adapter to them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        grid = grids[name]
        for tensor in (weights[name] + 0.0, grid.scales, grid.zeros):  # zeros lose their sign
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
