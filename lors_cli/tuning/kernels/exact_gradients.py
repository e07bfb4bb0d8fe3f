"""The adapters' gradients of an update that the mask or the weight multiplies, without a matrix of the weight's size.

dW = dYᵀ·X is formed some rows at a time. Each tile is multiplied by what multiplies the update, and then by the
adapters, while it is in the cache; nothing of it is kept.

Legend: W (R, C) weight, A = lora_A (r, C), B = lora_B (R, r), s scale, the update s·F ⊙ (B·A) with F = (W ≠ 0) or W,
X (tokens, C) input, dY (tokens, R), dW, dA, dB gradients; dB = s·(dW ⊙ F)·Aᵀ, dA = s·Bᵀ·(dW ⊙ F).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.kernels.choice import unpack
from lors_cli.tuning.kernels.masked_merge import mask_by

ROWS_ON_CPU, ROWS = 256, 1024
"""Of a tile. On a core with 1 MiB of L2, 256 rows cost 3 % more than all rows at once, 64 rows 20 % (docs/tuning.md);
on other devices a tile must fill many more cores."""


def adapter_gradients(
    dY: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor,
    scale: float, *, factor: Literal["mask", "weight"],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dA and dB in the adapters' dtype; products are in that of dY and X, and dA is summed over the tiles in its own.

    Args:
        dY: (tokens, R).
        X: (tokens, C).
        weight: (R, C), plain or packed, which is unpacked a tile at a time: the results have the same bits.
        factor: what multiplies B·A.
    """
    A, B = lora_A.to(dY.dtype), lora_B.to(dY.dtype)
    dA, dB = torch.zeros_like(lora_A), torch.empty_like(lora_B)
    height = ROWS_ON_CPU if dY.device.type == "cpu" else ROWS
    if torch.compiler.is_compiling():  # a graph of every tile would be long
        height = len(lora_B)
    for start in range(0, len(lora_B), height):
        rows = slice(start, start + height)
        W, dW = _rows_of(weight, rows), dY[:, rows].T @ X
        if factor == "weight":
            dW.mul_(W.to(dW.dtype))
        elif W.dtype == dW.dtype:
            mask_by(dW, W)
        else:  # under autocast
            dW.masked_fill_(W == 0, 0)
        dB[rows] = dW @ A.T
        dA += B[rows].T @ dW
    return dA.mul_(scale), dB.mul_(scale)


def _rows_of(weight: torch.Tensor | Packed, rows: slice) -> torch.Tensor:
    """Some rows of a weight; of a packed one unpacked."""
    if not isinstance(weight, Packed):
        return weight[rows]
    grid = None if weight.grid is None else weight.grid.of_rows(rows)
    # `starts` are places in all the values, which therefore stay whole
    return unpack(replace(weight, mask=weight.mask[rows], starts=weight.starts[rows], grid=grid))
