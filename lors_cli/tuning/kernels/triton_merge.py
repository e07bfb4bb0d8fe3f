"""The masked merge as one Triton kernel: W is read once, W_t written once, and no mask or delta is ever stored.

A program walks down a strip of columns; its part of A and its thresholds are made once and serve every tile there.

Legend: W (R, C) sparse weight, A = lora_A (r, C), B = lora_B (R, r), s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lors_cli.grid import Grid
from lors_cli.models.packed.format import Packed
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels import rounding as thresholds
from lors_cli.tuning.kernels.rounding import Rounding

BLOCK = {"ROWS": 64, "COLUMNS": 64, "num_warps": 8, "num_stages": 1}
"""Of a tile; ROWS is a multiple of the thresholds' period. 80 registers a thread or fewer, so that 24 warps fit."""
MAX_TILES, MIN_PROGRAMS = 8, 1024
"""A program walks over at most so many tiles, and fewer where that leaves too few programs for a large GPU."""
PERIOD = tl.constexpr(thresholds.PERIOD)
ROW_FACTOR, COLUMN_FACTOR = tl.constexpr(thresholds.ROW_FACTOR), tl.constexpr(thresholds.COLUMN_FACTOR)
MIX_FIRST, MIX_SECOND = (tl.constexpr(factor) for factor in thresholds.MIX_FACTORS)
WHOLE = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away it leaves a whole number, ties to even."""
SMALLEST_DOT = 16
"""Triton multiplies no matrices with a shorter inner side; a smaller rank is padded with zeros."""


@triton.jit
def _thresholds(columns, ROWS: tl.constexpr):
    """Those of `rounding.py`, (ROWS, columns)."""
    rows = tl.arange(0, ROWS)[:, None] % PERIOD
    mixed = rows.to(tl.uint32) * ROW_FACTOR + columns[None, :].to(tl.uint32) * COLUMN_FACTOR
    mixed ^= mixed >> 15
    mixed *= MIX_FIRST
    mixed ^= mixed >> 12
    mixed *= MIX_SECOND
    mixed ^= mixed >> 15
    return mixed & 0xFFFF


@triton.jit
def _unpacked(
    values, mask, row_starts, inside_rows, num_columns, stride_values, stride_mask,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a packed 2:4 weight: two values and four bits a group, read as vectors and words of eight groups."""
    halves = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    kept = tl.load(values + row_starts * stride_values + halves, mask=inside_rows & (halves < num_columns // 2),
                   other=0.0)  # fmt: skip
    first, second = tl.split(kept.reshape(ROWS, COLUMNS // 4, 2))
    words = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[None, :]
    packed = tl.load(mask + row_starts * stride_mask + words, mask=inside_rows & (words * 32 < num_columns),
                     other=0)  # fmt: skip
    bits = (packed[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]).reshape(ROWS, COLUMNS // 4)
    low, high = bits & 3, bits & 12  # which of the first two and of the last two places are kept
    slot_0 = tl.where(bits & 1 != 0, first, 0.0)
    slot_1 = tl.where(low == 2, first, tl.where(low == 3, second, 0.0))
    slot_2 = tl.where(high == 12, first, tl.where(high == 4, second, 0.0))
    slot_3 = tl.where(bits & 8 != 0, second, 0.0)
    return tl.join(tl.join(slot_0, slot_2), tl.join(slot_1, slot_3)).reshape(ROWS, COLUMNS)


@triton.jit
def _factor(factor, rows, columns, num_rows, num_columns, stride, dtype, DOT: tl.constexpr):
    """A tile of an adapter, cast to the weight's dtype and from there to the product's."""
    tile = tl.load(factor + rows[:, None] * stride + columns[None, :],
                   mask=(rows[:, None] < num_rows) & (columns[None, :] < num_columns), other=0.0)  # fmt: skip
    return tile.to(dtype).to(DOT)


@triton.jit
def _between(x, least, most):
    """What is no number stays so."""
    x = tl.where(x < least, least, x)
    return tl.where(x > most, most, x)


@triton.jit
def _on_grid(W, total, threshold, scale, zero, TOP: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A tile rounded to the grid as `on_grid.py` does, in float32."""
    if STOCHASTIC:
        share = (threshold.to(tl.float32) + 0.5) * (1 / 65536)
        up = _between(tl.div_rn(total - W, scale) + share, -512.0, 512.0)
        steps = (tl.div_rn(W, scale) + WHOLE) - WHOLE + tl.floor(up)
        steps = _between(steps, -zero, TOP - zero)
    else:
        steps = (_between(tl.div_rn(total, scale), -zero, TOP - zero) + WHOLE) - WHOLE
    return steps * scale


@triton.jit
def _merge(
    weight, kept_mask, lora_A, lora_B, merged, scales, zeros, num_rows, num_columns, scale,
    stride_weight, stride_mask, stride_merged, stride_scales, PACKED: tl.constexpr, RANK: tl.constexpr,
    RANK_STEP: tl.constexpr, DOT: tl.constexpr, STOCHASTIC: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight.dtype.element_ty
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_STEP)
    A = _factor(lora_A, ranks, columns, RANK, num_columns, num_columns, dtype, DOT)
    if STOCHASTIC:
        threshold = _thresholds(columns, ROWS)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        row_starts, inside_rows = rows[:, None].to(tl.int64), rows[:, None] < num_rows
        inside = inside_rows & (columns[None, :] < num_columns)
        if PACKED:
            W = _unpacked(weight, kept_mask, row_starts, inside_rows, num_columns, stride_weight, stride_mask,
                          ROWS, COLUMNS)  # fmt: skip
        else:
            W = tl.load(weight + row_starts * stride_weight + columns[None, :], mask=inside, other=0.0)
        delta = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, RANK, RANK_STEP):
            if RANK > RANK_STEP:
                A = _factor(lora_A, first + ranks, columns, RANK, num_columns, num_columns, dtype, DOT)
            B = _factor(lora_B, rows, first + ranks, num_rows, RANK, RANK, dtype, DOT)
            delta += tl.dot(B, A, input_precision="ieee")
        total = tl.where(W != 0, W.to(tl.float32) + scale * delta, 0.0)
        if GROUP:
            if GROUP % COLUMNS == 0:  # a tile lies in one group
                groups, present = row_starts * stride_scales + tl.program_id(1) * COLUMNS // GROUP, inside_rows
            else:
                groups, present = row_starts * stride_scales + (columns // GROUP)[None, :], inside
            step = tl.load(scales + groups, mask=present, other=1.0).to(tl.float32)
            if SYMMETRIC:
                zero = tl.full((ROWS, 1), 2 ** (BITS - 1), tl.float32)
            else:
                zero = tl.load(zeros + groups, mask=present, other=0).to(tl.float32)
            bound = threshold if STOCHASTIC else 0
            total = _on_grid(W.to(tl.float32), total, bound, step, zero, 2**BITS - 1, STOCHASTIC)
            total = tl.where(W != 0, total, 0.0).to(dtype)
        elif STOCHASTIC:
            bits = (total.to(tl.uint32, bitcast=True) + threshold) & 0xFFFF0000
            total = tl.where(total == total, bits.to(tl.float32, bitcast=True), total)
        place = merged + row_starts * stride_merged + columns[None, :]
        tl.store(place, total.to(merged.dtype.element_ty), mask=inside)  # to nearest, ties to even


INTERPRETED = not isinstance(_merge, triton.JITFunction)
"""By Triton's interpreter, which cannot multiply bfloat16: float32 holds it, and the products, without rounding."""
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(
    weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float,
    merged: torch.Tensor, rounding: Rounding, block: dict[str, int] = BLOCK, grid: Grid | None = None,
) -> tuple[tuple[int, int], dict[str, Any]]:  # fmt: skip
    """The grid and the arguments by name with which the kernel is called."""
    num_rows, num_columns = weight.shape
    rank, is_float32 = lora_A.shape[0], weight.dtype == torch.float32
    if isinstance(weight, Packed):
        assert weight.pattern == TWO_OF_FOUR
        base, mask, stride = weight.values, weight.mask, num_columns // 2
    else:
        base, mask, stride = weight, weight, weight.stride(0)
    assert base.stride(-1) == mask.stride(1) == merged.stride(1) == 1
    spec = grid.spec if grid is not None else None
    scales = base if grid is None else grid.scales.contiguous()
    zeros = scales if grid is None or grid.zeros is None else grid.zeros.contiguous()
    down, across = triton.cdiv(num_rows, block["ROWS"]), triton.cdiv(num_columns, block["COLUMNS"])
    block = {"TILES": min(MAX_TILES, 2 ** (max(1, down * across // MIN_PROGRAMS).bit_length() - 1)), **block}
    return (triton.cdiv(down, block["TILES"]), across), {
        "weight": base, "kept_mask": mask, "lora_A": lora_A.contiguous(), "lora_B": lora_B.contiguous(),
        "merged": merged, "scales": scales, "zeros": zeros, "num_rows": num_rows, "num_columns": num_columns,
        "scale": float(scale),
        "stride_weight": stride, "stride_mask": mask.stride(0),
        "stride_merged": merged.stride(0), "stride_scales": 0 if grid is None else scales.stride(0),
        "PACKED": isinstance(weight, Packed), "RANK": rank,
        "RANK_STEP": SMALLEST_DOT if is_float32 else min(64, max(SMALLEST_DOT, triton.next_power_of_2(rank))),
        "DOT": tl.float32 if is_float32 or INTERPRETED else DOTS[weight.dtype],
        "STOCHASTIC": rounding == "stochastic" if spec else thresholds.is_stochastic(rounding, merged.dtype),
        "GROUP": spec.group_size if spec else 0, "BITS": spec.bits if spec else 0,
        "SYMMETRIC": spec is None or spec.symmetric, **block,
    }  # fmt: skip


def masked_merge_kernel(
    weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float,
    merged: torch.Tensor, *, rounding: Rounding = "nearest", grid: Grid | None = None,
) -> torch.Tensor:  # fmt: skip
    """W_t = (W + s·B·A) ⊙ (W ≠ 0), rounded once from float32 (as `rounding` says where that is to bfloat16 or a grid).

    Args:
        weight: (R, C) bfloat16, float16 or float32, rows contiguous, or packed as 2:4.
        lora_A: (r, C), any float dtype; read as it is and cast to the weight's dtype.
        lora_B: (R, r), likewise.
        merged: (R, C), rows contiguous: where the result goes.
        grid: that W_t is rounded to; its scales have the weight's dtype.

    Returns:
        `merged`.
    """
    programs, arguments = launch(weight, lora_A, lora_B, scale, merged, rounding, grid=grid)
    with torch.cuda.device(merged.get_device()):  # Triton launches on the current GPU, wherever the tensors lie
        _merge[programs](**arguments)
    return merged
