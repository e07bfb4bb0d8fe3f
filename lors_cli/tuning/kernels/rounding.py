"""Rounding of merged weights to bfloat16 so that updates smaller than its step are not lost.

An update below half the distance of two neighbouring bfloat16 numbers vanishes when it is rounded to the nearest. Here
the share of a step that is left over decides how many weights go up: each has a threshold of its own, fixed by its
place, and goes to the number further from zero where its share is above it. On average the update is there in full, a
weight without an update stays as it is, and the same adapters always give the same bits.

Legend: W_t (R, C) the merged weight; T = 64, the rows after which the thresholds repeat.

Source: stochastic rounding as in Gupta et al. §2.3, arXiv:1502.02551, with thresholds that do not change.
"""

from __future__ import annotations

from typing import Literal

import torch

Rounding = Literal["nearest", "stochastic"]

PERIOD = 64
"""T. The kernel in `kernels.py` computes the same thresholds, by the same numbers."""
ROW_FACTOR, COLUMN_FACTOR = 0x9E3779B1, 0x85EBCA77
MIX_FACTORS = (0x2C1B3C6D, 0x297A2D39)
LOW_BITS = 0xFFFF
"""Of a float32, those that bfloat16 has no room for."""


def thresholds(num_columns: int, device: torch.device) -> torch.Tensor:
    """What is added to the bits of a float32 before its low half is cut off: an integer hash of row and column.

    Returns:
        (T, C) int32 from 0 to 65535.
    """
    word = 0xFFFFFFFF
    rows = torch.arange(PERIOD, device=device).unsqueeze(1)
    columns = torch.arange(num_columns, device=device)
    mixed = (rows * ROW_FACTOR + columns * COLUMN_FACTOR) & word
    mixed ^= mixed >> 15
    for factor, shift in zip(MIX_FACTORS, (12, 15), strict=True):
        mixed = (mixed * factor) & word
        mixed ^= mixed >> shift
    return (mixed & LOW_BITS).to(torch.int32)


def is_stochastic(rounding: Rounding, dtype: torch.dtype) -> bool:
    """Whether results of this dtype are rounded by thresholds: of `rounding: stochastic` those in bfloat16 alone."""
    return rounding == "stochastic" and dtype == torch.bfloat16


kept_thresholds: dict[tuple[int, torch.device], torch.Tensor] = {}
"""By C and device: one for all weights of a width."""


def thresholds_for(num_columns: int, device: torch.device) -> torch.Tensor:
    """`thresholds`, made once for a width."""
    key = (num_columns, device)
    if key not in kept_thresholds:
        with torch.inference_mode(False):
            kept_thresholds[key] = thresholds(num_columns, device)
    return kept_thresholds[key]


def round_stochastically(exact: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Round whole rows of a matrix to bfloat16.

    Args:
        exact: (rows, C) float32, contiguous, its first row one of 0, T, 2T, … of the whole matrix; overwritten.
        out: (rows, C) bfloat16, where the result goes.
    """
    table = thresholds_for(exact.shape[1], exact.device)
    bits = exact.view(torch.int32)
    whole = len(exact) // PERIOD * PERIOD
    bits[:whole].view(-1, *table.shape).add_(table)
    if whole < len(exact):
        bits[whole:].add_(table[: len(exact) - whole])
    # a shift and a cast of integers cost half of clearing the low bits and a cast of floats
    out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
    return out


def round_stochastically_formula(exact: torch.Tensor) -> torch.Tensor:
    """`round_stochastically` of a whole matrix, to float32, as one plain expression for torch.compile to fuse."""
    table = thresholds(exact.shape[1], exact.device)
    rows = torch.arange(exact.shape[0], device=exact.device) % PERIOD
    return ((exact.view(torch.int32) + table[rows]) & ~LOW_BITS).view(torch.float32)
