"""Packed weights on CUDA, in Triton: products with few tokens that read each byte of the weight once, and unpacking.

A program makes some rows of Y for all tokens. Its warps lie side by side along them, so that a matrix of few rows still
fills the GPU, and their sums meet once, in one order, at the end. In a step a thread has an octet: 8 neighbouring
columns, a byte of the mask. Of 2:4 that is 4 values in one load; elsewhere sums of bits say where its values begin.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lors_cli.models.packed.format import Packed
from lors_cli.sparsity import TWO_OF_FOUR

MAX_TOKENS = 8
"""More are multiplied with the unpacked weight: there the products take longer than the bytes."""
OCTET = 8
CHOOSE_TOKENS = tl.constexpr(2)
"""Up to so many, the inputs of 2:4's two values are chosen; for more, four places are made once for all."""
MIN_PROGRAMS, MAX_ROWS, MAX_WARPS = 1024, 4, 4
"""A program takes several rows, which share what is read of X, where so many programs are left."""
THREADS = 32
"""Of a warp."""


@triton.jit
def _none():
    """A tuple to be added to."""
    return ()


@triton.jit
def _popcount(octets):
    """Bits set in each; LLVM knows the idiom and makes it one instruction."""
    bits = octets.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return ((((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _eight(tile, OCTETS: tl.constexpr):
    """The columns of a tile (OCTETS, 8), each (OCTETS,)."""
    even, odd = tl.split(tile.reshape(OCTETS, 4, 2))
    even_0, even_1 = tl.split(even.reshape(OCTETS, 2, 2))
    odd_0, odd_1 = tl.split(odd.reshape(OCTETS, 2, 2))
    x0, x4 = tl.split(even_0)
    x2, x6 = tl.split(even_1)
    x1, x5 = tl.split(odd_0)
    x3, x7 = tl.split(odd_1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _joined(w, OCTETS: tl.constexpr):
    """The tile (OCTETS, 8) of such columns."""
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6])).reshape(OCTETS, 4)
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7])).reshape(OCTETS, 4)
    return tl.join(even, odd).reshape(OCTETS, 8)


@triton.jit
def _four(values, octets, num_values, OCTETS: tl.constexpr):
    """Of 2:4 the four values of each octet."""
    places = octets[:, None] * 4 + tl.arange(0, 4)[None, :]
    tile = tl.load(values + places, mask=places < num_values, other=0.0)
    even, odd = tl.split(tile.reshape(OCTETS, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _places_of_pair(first, second, bits):
    """The four places of a group of 2:4."""
    low, high = bits & 3, bits & 12
    slot_0 = tl.where(bits & 1 != 0, first, 0.0)
    slot_1 = tl.where(low == 2, first, tl.where(low == 3, second, 0.0))
    slot_2 = tl.where(high == 12, first, tl.where(high == 4, second, 0.0))
    slot_3 = tl.where(bits & 8 != 0, second, 0.0)
    return slot_0, slot_1, slot_2, slot_3


@triton.jit
def _places_of_pairs(kept, bits):
    """The eight places of each octet of 2:4."""
    return _places_of_pair(kept[0], kept[1], bits) + _places_of_pair(kept[2], kept[3], bits >> 4)


@triton.jit
def _add_pair(total, first, second, bits, x0, x1, x2, x3):
    """A group of 2:4 times one token's inputs: choosing two of them costs less than making four places."""
    total += first.to(tl.float32) * tl.where(bits & 1 != 0, x0, tl.where(bits & 2 != 0, x1, x2))
    return total + second.to(tl.float32) * tl.where(bits & 8 != 0, x3, tl.where(bits & 4 != 0, x2, x1))


@triton.jit
def _add_pairs(total, kept, bits, x):
    """An octet's products added, of its four values."""
    total = _add_pair(total, kept[0], kept[1], bits, x[0], x[1], x[2], x[3])
    return _add_pair(total, kept[2], kept[3], bits >> 4, x[4], x[5], x[6], x[7])


@triton.jit
def _add(total, w, x):
    """An octet's products added; `w` are its eight places."""
    for place in tl.static_range(8):
        total += w[place].to(tl.float32) * x[place]
    return total


@triton.jit
def _offsets(bits, inside, PER_OCTET: tl.constexpr, OCTETS: tl.constexpr):
    """Of one or several rows' octets where their values begin behind the first's, and how many values all have.

    Args:
        bits: of each row; the sums of up to four go side by side through one scan, in 16 bits each.
        inside: which octets a row has.
        PER_OCTET: values each octet keeps; 0 where they differ, and are counted.
    """
    ROWS: tl.constexpr = len(bits)
    offsets, totals = _none(), _none()
    if PER_OCTET > 0:
        for _ in tl.static_range(ROWS):
            offsets += (tl.where(inside, tl.arange(0, OCTETS) * PER_OCTET, 0),)
            totals += (OCTETS * PER_OCTET,)
    else:
        counts = _popcount(bits[0])
        if ROWS > 1:
            counts = counts.to(tl.int64)
            for row in tl.static_range(1, ROWS):
                counts += _popcount(bits[row]).to(tl.int64) << (16 * row)
        before, total = tl.cumsum(counts, axis=0) - counts, tl.sum(counts, axis=0)
        for row in tl.static_range(ROWS):
            offsets += (((before >> (16 * row)) & 0xFFFF).to(tl.int32),)
            totals += (((total >> (16 * row)) & 0xFFFF).to(tl.int32),)
    return offsets, totals


@triton.jit
def _gathered(at, bits):
    """The eight places of each octet, whose values begin at the pointer `at`."""
    places = _none()
    for place in tl.static_range(8):
        places += (tl.where(bits & (1 << place) != 0, tl.load(at), 0.0),)
        at += (bits >> place) & 1  # in bounds behind the last too: 32 values stand there
    return places


@triton.jit
def _linear(
    x, values, mask, starts, bias, y, num_rows, num_columns, stride_x, stride_y, num_values, num_octets,
    PAIRS: tl.constexpr, PER_OCTET: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    OCTETS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    CHOOSE: tl.constexpr = PAIRS and TOKENS <= CHOOSE_TOKENS
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    sums = (tl.zeros((OCTETS,), dtype=tl.float32),) * (ROWS * TOKENS)
    begins = _none()
    for row in tl.static_range(ROWS):
        if PAIRS:
            begins += ((first_row + row) * num_values,)
        else:
            begins += (tl.load(starts + first_row + row, mask=first_row + row < num_rows, other=0),)
    for step in range(STEPS):
        octets = step * OCTETS + tl.arange(0, OCTETS)
        bits, weights, ends = _none(), _none(), _none()
        for row in tl.static_range(ROWS):
            inside = (octets < num_octets) & (first_row + row < num_rows)
            octet = tl.load(mask + (first_row + row) * num_octets + octets, mask=inside, other=0)
            bits += (octet.to(tl.int32),)
        if not PAIRS:
            offsets, totals = _offsets(bits, octets < num_octets, PER_OCTET, OCTETS)
        for row in tl.static_range(ROWS):
            if PAIRS:
                limit = tl.where(first_row + row < num_rows, num_values, 0)
                kept = _four(values + begins[row], octets, limit, OCTETS)
                weights += (kept if CHOOSE else _places_of_pairs(kept, bits[row]),)
                ends += (begins[row],)
            else:
                weights += (_gathered(values + begins[row] + offsets[row], bits[row]),)
                ends += (begins[row] + totals[row],)
        begins = ends
        after = _none()
        for token in tl.static_range(TOKENS):
            columns = octets[:, None] * 8 + tl.arange(0, 8)[None, :]
            tile = tl.load(x + token * stride_x + columns, mask=columns < num_columns, other=0.0)
            inputs = _eight(tile.to(tl.float32), OCTETS)
            for row in tl.static_range(ROWS):
                total = sums[token * ROWS + row]
                if CHOOSE:
                    after += (_add_pairs(total, weights[row], bits[row], inputs),)
                else:
                    after += (_add(total, weights[row], inputs),)
        sums = after
    for row in tl.static_range(ROWS):
        inside = first_row + row < num_rows
        for token in tl.static_range(TOKENS):
            total = tl.sum(sums[token * ROWS + row], axis=0)
            if BIAS:
                total += tl.load(bias + first_row + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + token * stride_y + first_row + row, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(
    values, mask, starts, weight, num_rows, num_columns, stride, num_octets, PER_OCTET: tl.constexpr,
    OCTETS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    for step in range(STEPS):
        octets = step * OCTETS + tl.arange(0, OCTETS)
        inside = octets < num_octets
        bits = tl.load(mask + row * num_octets + octets, mask=inside, other=0).to(tl.int32)
        offsets, totals = _offsets((bits,), inside, PER_OCTET, OCTETS)
        places = _gathered(values + begin + offsets[0], bits)
        begin += totals[0]
        columns = octets[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(weight + row * stride + columns, _joined(places, OCTETS), mask=columns < num_columns)


def _per_octet(packed: Packed) -> int:
    """Values that each octet keeps, 0 where they differ."""
    pattern = packed.pattern
    if pattern is None or pattern.n is None or pattern.m is None or OCTET % pattern.m:
        return 0
    return OCTET // pattern.m * pattern.n


def _block(num_rows: int, num_columns: int) -> dict[str, int]:
    """Rows of a program, and warps beside each other: as many as a row fills."""
    warps = min(MAX_WARPS, triton.next_power_of_2(triton.cdiv(num_columns, THREADS * OCTET)))
    rows = min(MAX_ROWS, 1 << (max(1, num_rows // MIN_PROGRAMS).bit_length() - 1))
    return {"ROWS": rows, "OCTETS": THREADS * warps, "num_warps": warps}


def launch_linear(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, y: torch.Tensor, block: dict[str, int] | None = None
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments by name with which the product's kernel is called."""
    num_rows, num_columns = packed.shape
    pairs = packed.pattern == TWO_OF_FOUR
    mask = packed.mask.view(torch.uint8)
    assert 0 < len(x) <= MAX_TOKENS
    assert x.dtype == packed.dtype
    assert x.stride(1) == y.stride(1) == mask.stride(1) == packed.values.stride(0) == 1
    block = block or _block(num_rows, num_columns)
    return (triton.cdiv(num_rows, block["ROWS"]),), {
        "x": x, "values": packed.values, "mask": mask, "starts": packed.starts, "bias": x if bias is None else bias,
        "y": y, "num_rows": num_rows, "num_columns": num_columns, "stride_x": x.stride(0), "stride_y": y.stride(0),
        "num_values": num_columns // 2, "num_octets": mask.shape[1], "PAIRS": pairs, "PER_OCTET": _per_octet(packed),
        "BIAS": bias is not None, "TOKENS": len(x), "STEPS": triton.cdiv(mask.shape[1], block["OCTETS"]), **block,
    }  # fmt: skip


def launch_unpack(
    packed: Packed, weight: torch.Tensor, block: dict[str, int] | None = None
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments by name with which the unpacking kernel is called."""
    num_rows, num_columns = packed.shape
    assert weight.shape == packed.shape
    assert weight.dtype == packed.dtype
    mask = packed.mask.view(torch.uint8)
    assert weight.stride(1) == mask.stride(1) == packed.values.stride(0) == 1
    block = block or {name: value for name, value in _block(1, num_columns).items() if name != "ROWS"}
    return (num_rows,), {
        "values": packed.values, "mask": mask, "starts": packed.starts, "weight": weight,
        "num_rows": num_rows, "num_columns": num_columns, "stride": weight.stride(0),
        "num_octets": mask.shape[1], "PER_OCTET": _per_octet(packed),
        "STEPS": triton.cdiv(mask.shape[1], block["OCTETS"]), **block,
    }  # fmt: skip


def packed_linear_cuda(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y = X·Wᵀ + bias for at most 8 tokens, summed in float32.

    Args:
        x: (tokens, C) in the weight's dtype.

    Returns:
        (tokens, R).
    """
    y = x.new_empty(len(x), packed.shape[0])
    grid, arguments = launch_linear(x.contiguous(), packed, bias, y)
    with torch.cuda.device(x.get_device()):  # Triton launches on the current GPU, wherever the tensors lie
        _linear[grid](**arguments)
    return y


def unpack_cuda(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` (rows contiguous) or a new tensor."""
    weight = packed.values.new_empty(packed.shape) if out is None else out
    grid, arguments = launch_unpack(packed, weight)
    with torch.cuda.device(weight.get_device()):
        _unpack[grid](**arguments)
    return weight
