"""Masks of one bit a place, in words of 32 columns, and codes of 4 bits, two a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lors_cli.grid import GridSpec

WORD = 32
"""Columns a word of a mask."""


def mask_words(columns: int) -> int:
    """Words of the mask in a row."""
    return -(-columns // WORD)


def to_bits(kept: torch.Tensor) -> torch.Tensor:
    """(rows, C) bool as words of the mask."""
    words = mask_words(kept.shape[1])
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, words * WORD - kept.shape[1]))
    octets = (padded.view(len(kept), words * 4, 8) * _powers(kept.device)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def to_bools(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Words of the mask as (rows, C) bool."""
    octets = mask.contiguous().view(torch.uint8).unsqueeze(-1)
    return (octets & _powers(mask.device)).ne(0).flatten(1)[:, :columns]


def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def row_sizes(mask: torch.Tensor, spec: GridSpec | None) -> torch.Tensor:
    """(R,) int64: how many values are kept of each row, or in how many bytes their codes."""
    octets = mask.contiguous().view(torch.uint8)
    pairs = octets - (octets >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    counts = ((nibbles + (nibbles >> 4)) & 0x0F).view(*mask.shape, 4).sum(-1, dtype=torch.uint8)
    if spec is not None and spec.bits == 4:
        counts = counts + 1 >> 1
    return counts.sum(-1, dtype=torch.int64)


def to_bytes(codes: torch.Tensor, kept: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Bytes of the codes of what is kept (rows, C) bool."""
    if spec.bits != 4:
        return codes
    places, num_bytes = _nibbles(kept)
    nibbles = codes.new_zeros(2 * num_bytes)
    nibbles[places] = codes
    return nibbles[0::2] | nibbles[1::2] << 4


def from_bytes(stored: torch.Tensor, kept: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """The codes of what is kept (rows, C) bool, of their bytes."""
    return stored if spec.bits != 4 else torch.stack((stored & 15, stored >> 4), -1).flatten()[_nibbles(kept)[0]]


def _nibbles(kept: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Which half of a byte each kept code has, those of a word from an even one on, and how many bytes there are."""
    lacking = mask_words(kept.shape[1]) * WORD - kept.shape[1]
    words = torch.nn.functional.pad(kept, (0, lacking)).view(-1, WORD)
    counts = words.sum(-1, dtype=torch.int64)
    sizes = counts + (counts & 1)
    ends = sizes.cumsum(0)
    places = (ends - sizes)[:, None] + words.cumsum(-1, dtype=torch.int64) - 1
    return places[words], int(sizes.sum()) // 2
