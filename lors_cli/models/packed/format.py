"""The packed form of a sparse weight: its kept values, and a mask of one bit a place (DESIGN §5, version 1).

N:M keeps exactly N values a group, so that row n starts at n·C·N/M; otherwise rows start where those before end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lors_cli.errors import UsageError
from lors_cli.sparsity import Pattern

VERSION = 1
PADDING = 32
"""Zeros behind the kept values: a load of 64 bytes may read past their end."""
WORD = 32
"""Columns a word of the mask."""
TILE_ELEMENTS = 1 << 22
"""Of a weight packed or unpacked at a time, which bounds the memory for masks."""


@dataclass(frozen=True)
class Packed:
    """A sparse weight (R, C), packed.

    Args:
        values: (kept + 32,) in the weight's dtype: kept values row by row, columns ascending, then zeros.
        mask: (R, ⌈C/32⌉) int32; bit j of word c is column 32·c + j, bits past C are 0.
        starts: (R,) int64, where each row's values begin; not stored.
        columns: C.
        pattern: N:M that the mask keeps to; None for unstructured.
    """

    values: torch.Tensor
    mask: torch.Tensor
    starts: torch.Tensor
    columns: int
    pattern: Pattern | None = None

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""
        return torch.Size((len(self.mask), self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device


def mask_key(key: str) -> str:
    """What the mask of the values `key` is called in a file."""
    return f"{key}_mask"


def packed_bytes(kept: int, rows: int, columns: int, itemsize: int) -> int:
    """What a packed weight takes on disk."""
    return (kept + PADDING) * itemsize + rows * mask_words(columns) * 4


def mask_words(columns: int) -> int:
    """Words of the mask in a row."""
    return -(-columns // WORD)


def num_kept(weight: torch.Tensor, pattern: Pattern | None) -> int:
    """How many values of a weight its packed form keeps."""
    if pattern is not None and pattern.n is not None and pattern.m is not None:
        return weight.numel() // pattern.m * pattern.n
    return int(torch.count_nonzero(weight))


@torch.no_grad()
def pack(weight: torch.Tensor, pattern: Pattern | None = None) -> Packed:
    """Pack a weight (R, C); zeros lose their sign.

    Args:
        pattern: N:M, which fills groups of fewer non-zeros up with explicit zeros; else every non-zero is kept.

    Raises:
        ValueError: the weight breaks the pattern.
    """
    rows, columns = weight.shape
    values = weight.new_zeros(num_kept(weight, pattern) + PADDING)
    mask = torch.empty(rows, mask_words(columns), dtype=torch.int32, device=weight.device)
    start = 0
    for tile in _tiles(rows, columns):
        kept = _kept(weight[tile], pattern)
        mask[tile] = _to_bits(kept)
        chosen = weight[tile][kept]
        values[start : start + len(chosen)] = chosen
        start += len(chosen)
    values += 0.0  # which makes -0 of an explicit zero 0
    return Packed(values, mask, row_starts(mask), columns, pattern)


@torch.no_grad()
def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` or a new tensor."""
    weight = packed.values.new_empty(packed.shape) if out is None else out
    ends = [*packed.starts.tolist(), len(packed.values) - PADDING]
    for tile in _tiles(*packed.shape):
        kept = _to_bools(packed.mask[tile], packed.columns)
        values = packed.values[ends[tile.start] : ends[min(tile.stop, len(ends) - 1)]]
        weight[tile] = weight.new_zeros(kept.shape).masked_scatter_(kept, values)
    return weight


def row_starts(mask: torch.Tensor) -> torch.Tensor:
    """(R,) int64: where each row's values begin."""
    counts = _row_counts(mask)
    return counts.cumsum(0) - counts


def check(
    name: str, values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int], pattern: Pattern | None,
    num_kept: int | None = None,
) -> None:  # fmt: skip
    """Hold the tensors of a file, which anyone may have written, against each other before anything reads by them.

    Args:
        num_kept: how many values are said to be there.

    Raises:
        UsageError: naming the weight and what is wrong with it.
    """
    rows, columns = shape
    wrong = _wrong(values, mask, rows, columns, pattern)
    if not wrong and num_kept not in (None, len(values) - PADDING):
        wrong = f"config.json says {num_kept:,} values and {len(values) - PADDING:,} are there"
    if wrong:
        raise UsageError(f"{name} is no packed weight of {rows} × {columns}: {wrong}.",
                         "Pack the model again: lors pack MODEL --out DIR")  # fmt: skip


def _wrong(values: torch.Tensor, mask: torch.Tensor, rows: int, columns: int, pattern: Pattern | None) -> str:
    if mask.dtype != torch.int32 or tuple(mask.shape) != (rows, mask_words(columns)):
        return f"its mask is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
    if values.dim() != 1 or len(values) < PADDING or not values.is_floating_point():
        return f"its values are {str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
    if columns % WORD and bool((mask[:, -1] >> columns % WORD & (1 << WORD - columns % WORD) - 1).any()):
        return "its mask has bits beyond its inputs"
    kept = int(_row_counts(mask).sum())
    if kept != len(values) - PADDING:
        return f"its mask keeps {kept:,} values and {len(values) - PADDING:,} are there"
    if bool((values[kept:] != 0).any()):
        return f"the {PADDING} values behind the kept ones are not zero"
    if pattern is not None and pattern.n is not None and pattern.m is not None:
        if columns % pattern.m:
            return f"its inputs are no multiple of {pattern.m}"
        for tile in _tiles(rows, columns):
            groups = _to_bools(mask[tile], columns).unflatten(1, (-1, pattern.m)).sum(-1)
            if bool((groups != pattern.n).any()):
                return f"a group of {pattern.m} keeps other than {pattern.n}"
    return ""


def _kept(weight: torch.Tensor, pattern: Pattern | None) -> torch.Tensor:
    """(rows, C) bool: what is kept of some rows."""
    kept = weight != 0
    if pattern is None or pattern.n is None or pattern.m is None:
        return kept
    if weight.shape[1] % pattern.m:
        raise ValueError(f"its {weight.shape[1]} inputs are no multiple of {pattern.m}")
    groups = kept.unflatten(1, (-1, pattern.m))
    lacking = pattern.n - groups.sum(-1, keepdim=True, dtype=torch.int16)
    if bool((lacking < 0).any()):
        raise ValueError(f"of {pattern.m} neighbours in a row, more than {pattern.n} are not zero")
    if bool((lacking > 0).any()):
        groups = groups | (~groups & ((~groups).cumsum(-1, dtype=torch.int16) <= lacking))
    return groups.flatten(1)


def _to_bits(kept: torch.Tensor) -> torch.Tensor:
    """(rows, C) bool as words of the mask."""
    words = mask_words(kept.shape[1])
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, words * WORD - kept.shape[1]))
    octets = (padded.view(len(kept), words * 4, 8) * _powers(kept.device)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def _to_bools(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Words of the mask as (rows, C) bool."""
    octets = mask.contiguous().view(torch.uint8).unsqueeze(-1)
    return (octets & _powers(mask.device)).ne(0).flatten(1)[:, :columns]


def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _row_counts(mask: torch.Tensor) -> torch.Tensor:
    """(R,) int64: bits set in each row."""
    octets = mask.contiguous().view(torch.uint8)
    pairs = octets - (octets >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    height = max(1, TILE_ELEMENTS // max(1, columns))
    return (slice(first, min(first + height, rows)) for first in range(0, rows, height))
