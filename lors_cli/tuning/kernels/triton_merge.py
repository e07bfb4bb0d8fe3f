"""The masked merge as one Triton kernel: W is read once, W_t written once, and no mask or delta is ever stored.

Legend: W (R, C) sparse weight, A = lora_A (r, C), B = lora_B (R, r), s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lors_cli.tuning.kernels import rounding as thresholds
from lors_cli.tuning.kernels.compressed import Compressed24
from lors_cli.tuning.kernels.rounding import Rounding

BLOCK_ROWS, BLOCK_COLUMNS = 64, 128
PERIOD = tl.constexpr(thresholds.PERIOD)
ROW_FACTOR, COLUMN_FACTOR = tl.constexpr(thresholds.ROW_FACTOR), tl.constexpr(thresholds.COLUMN_FACTOR)
MIX_FIRST, MIX_SECOND = (tl.constexpr(factor) for factor in thresholds.MIX_FACTORS)
SMALLEST_DOT = 16
"""Triton multiplies no matrices with a shorter inner side; a smaller rank is padded with zeros."""


@triton.jit
def _merge(
    weight, positions, lora_A, lora_B, merged, num_rows, num_columns, scale,
    stride_weight, stride_positions, stride_merged, COMPRESSED: tl.constexpr,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_rows, inside_columns = rows[:, None] < num_rows, columns[None, :] < num_columns
    inside = inside_rows & inside_columns
    row_starts = rows[:, None].to(tl.int64)
    if COMPRESSED:
        packed = tl.load(positions + row_starts * stride_positions + columns[None, :] // 8, mask=inside, other=0)
        nibble = (packed.to(tl.int32) >> (columns[None, :] // 4 % 2 * 4)) & 15
        slot = columns[None, :] % 4
        is_second = slot == nibble >> 2
        kept = inside & (is_second | (slot == nibble & 3))
        W = tl.load(weight + row_starts * stride_weight + columns[None, :] // 4 * 2 + is_second.to(tl.int32),
                    mask=kept, other=0.0)  # fmt: skip
    else:
        W = tl.load(weight + row_starts * stride_weight + columns[None, :], mask=inside, other=0.0)
    delta = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, RANK_PADDED, RANK_STEP):
        ranks = first + tl.arange(0, RANK_STEP)
        B = tl.load(lora_B + rows[:, None] * RANK + ranks[None, :],
                    mask=inside_rows & (ranks[None, :] < RANK), other=0.0)  # fmt: skip
        A = tl.load(lora_A + ranks[:, None] * num_columns + columns[None, :],
                    mask=(ranks[:, None] < RANK) & inside_columns, other=0.0)  # fmt: skip
        A, B = A.to(W.dtype).to(tl.float32), B.to(W.dtype).to(tl.float32)
        delta += tl.dot(B, A, input_precision=PRECISION)
    total = tl.where(W != 0, W.to(tl.float32) + scale * delta, 0.0)
    if STOCHASTIC:  # thresholds of `rounding.py`
        mixed = (rows[:, None] % PERIOD).to(tl.uint32) * ROW_FACTOR + columns[None, :].to(tl.uint32) * COLUMN_FACTOR
        mixed ^= mixed >> 15
        mixed *= MIX_FIRST
        mixed ^= mixed >> 12
        mixed *= MIX_SECOND
        mixed ^= mixed >> 15
        bits = (total.to(tl.uint32, bitcast=True) + (mixed & 0xFFFF)) & 0xFFFF0000
        total = tl.where(total == total, bits.to(tl.float32, bitcast=True), total)
    place = merged + row_starts * stride_merged + columns[None, :]
    tl.store(place, total.to(merged.dtype.element_ty), mask=inside)  # to nearest, ties to even


def masked_merge_kernel(
    weight: torch.Tensor | Compressed24, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float,
    merged: torch.Tensor, *, rounding: Rounding = "nearest",
) -> torch.Tensor:  # fmt: skip
    """W_t = (W + s·B·A) ⊙ (W ≠ 0), rounded once from float32.

    Args:
        weight: (R, C) bfloat16, float16 or float32, rows contiguous, or compressed.
        lora_A: (r, C) contiguous, any float dtype; read as it is and cast to the weight's dtype.
        lora_B: (R, r) contiguous, likewise.
        scale: s.
        merged: (R, C), rows contiguous: where the result goes.
        rounding: where that is bfloat16.

    Returns:
        `merged`.
    """
    num_rows, num_columns = weight.shape
    rank = lora_A.shape[0]
    if isinstance(weight, Compressed24):
        base, positions = weight.values, weight.positions
    else:
        base = positions = weight
    assert base.stride(1) == positions.stride(1) == merged.stride(1) == 1
    # The adapters count in the weight's dtype. What bfloat16 and float16 hold, TF32 multiplies without rounding.
    precision = "ieee" if weight.dtype == torch.float32 else "tf32"
    step = min(64, max(SMALLEST_DOT, triton.next_power_of_2(rank)))
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_columns, BLOCK_COLUMNS))
    _merge[grid](
        base, positions, lora_A.contiguous(), lora_B.contiguous(), merged, num_rows, num_columns, float(scale),
        base.stride(0), positions.stride(0), merged.stride(0), COMPRESSED=isinstance(weight, Compressed24),
        RANK=rank, RANK_PADDED=step * triton.cdiv(rank, step), RANK_STEP=step,
        PRECISION=precision,
        STOCHASTIC=thresholds.is_stochastic(rounding, merged.dtype), ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    return merged
