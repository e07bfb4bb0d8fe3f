"""Sparse weights on grids of few bits, and what their merged weights have to be, number by number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.grids import save_grids
from lors_cli.tuning.kernels.rounding import PERIOD, thresholds

FOUR_BITS = GridSpec(4, 32)
SPECS = [FOUR_BITS, GridSpec(4, 64, symmetric=False), GridSpec(8, 128)]


def on_a_grid(weight: torch.Tensor, spec: GridSpec = FOUR_BITS) -> tuple[torch.Tensor, Grid]:
    """A sparse weight rounded to a grid that fits it, and the grid."""
    grid = fit_grid(weight, weight != 0, spec)
    return grid.rounded(weight).masked_fill_(weight == 0, 0), grid


def put_on_grids(model: PreTrainedModel, spec: GridSpec = FOUR_BITS) -> dict[str, Grid]:
    """Every weight of the blocks rounded in place; the grids by name."""
    grids = {}
    for name, weight in prunable_weights(model).items():
        rounded, grids[name] = on_a_grid(weight.matrix, spec)
        weight.matrix.copy_(rounded)
    return grids


def save_on_grids(model: PreTrainedModel, tokenizer: Any, folder: Path, spec: GridSpec = FOUR_BITS) -> Path:
    """A checkpoint as `lors prune` with prune.quantize leaves it."""
    grids = put_on_grids(model, spec)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_grids(folder, grids)
    return folder


def linear_on_a_grid(rows: int, columns: int, dtype: torch.dtype, spec: GridSpec = FOUR_BITS) -> tuple[nn.Linear, Grid]:
    """A random linear, half of its weights zero, and the grid that the others lie on."""
    linear = nn.Linear(columns, rows).to(dtype)
    weight = torch.where(torch.rand(rows, columns) < 0.5, 0.0, torch.randn(rows, columns)).to(dtype)
    rounded, grid = on_a_grid(weight, spec)
    linear.weight.data.copy_(rounded)
    return linear, grid


def by_numbers(total: torch.Tensor, weight: torch.Tensor, grid: Grid, rounding: str) -> torch.Tensor:
    """W_t of sums (R, C) in float32: a division, a whole number and a product for each weight, in NumPy's float32."""
    table = thresholds(weight.shape[1], torch.device("cpu"))
    found = torch.zeros(weight.shape)
    for row, column in (weight != 0).nonzero().tolist():
        group = column // grid.spec.group_size
        scale = np.float32(grid.scales[row, group].item())
        zero = grid.spec.num_codes // 2 if grid.zeros is None else int(grid.zeros[row, group])
        base, value = np.float32(weight[row, column].item()), np.float32(total[row, column].item())
        if rounding == "nearest":
            code = round(float(value / scale)) + zero  # Python's ties go to even
        else:
            share = (int(table[row % PERIOD, column]) + 0.5) / 65536
            code = (
                round(float(base / scale)) + zero + math.floor(np.float32((value - base) / scale) + np.float32(share))
            )
        code = min(max(code, 0), grid.spec.num_codes - 1)
        found[row, column] = float(scale * np.float32(code - zero))
    return found.to(weight.dtype)
