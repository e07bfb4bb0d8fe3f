"""A 2:4 weight as its kept values and their positions: 9/16 of its bytes in bfloat16.

Legend: W (R, C) with at most two non-zeros among every four neighbours of a row; G = C/4 groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_ELEMENTS = 1 << 22
"""Of W compressed or restored at a time, which bounds the memory for indices."""


@dataclass(frozen=True)
class Compressed24:
    """The kept values of a 2:4 weight and where they lie.

    Args:
        values: (R, 2·G) in W's dtype, two of each group in their order.
        positions: (R, 4·⌈G/8⌉) uint8, a group's two 2-bit positions in four bits, the first group in the lower ones;
            rows are filled up to whole 32-bit words, which the CUDA kernel reads.
        shape: (R, C).
    """

    values: torch.Tensor
    positions: torch.Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of W."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device


@torch.no_grad()
def compress(weight: torch.Tensor) -> Compressed24:
    """Keep of a weight (R, C) its values and their positions; a ValueError says why it is not 2:4."""
    num_rows, num_columns = weight.shape
    if num_columns % 4:
        raise ValueError(f"its {num_columns} inputs are no multiple of 4")
    num_groups = num_columns // 4
    values = weight.new_empty(num_rows, 2 * num_groups)
    positions = torch.empty(num_rows, (num_groups + 7) // 8 * 4, dtype=torch.uint8, device=weight.device)
    for rows in _row_tiles(num_rows, num_columns):
        groups = weight[rows].view(-1, num_groups, 4)
        kept = groups != 0
        if bool((kept.sum(-1) > 2).any()):
            raise ValueError("of four neighbours in a row, more than two are not zero")
        # non-zeros first, each kind in its order; a group with fewer than two is filled up with zeros
        chosen = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
        values[rows] = groups.gather(2, chosen).flatten(1)
        nibbles = torch.zeros(len(groups), positions.shape[1] * 2, dtype=torch.uint8, device=weight.device)
        nibbles[:, :num_groups] = (chosen[..., 0] | chosen[..., 1] << 2).to(torch.uint8)
        positions[rows] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return Compressed24(values, positions, weight.shape)


@torch.no_grad()
def decompress(weight: Compressed24, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was compressed, bit for bit (a zero's sign excepted), in `out` or a new tensor."""
    num_rows, num_columns = weight.shape
    restored = weight.values.new_empty(weight.shape) if out is None else out
    zero = weight.values.new_zeros(())
    for rows in _row_tiles(num_rows, num_columns):
        packed = weight.positions[rows]
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, : num_columns // 4]
        first, second = nibbles & 3, nibbles >> 2
        pairs = weight.values[rows].view(-1, num_columns // 4, 2)
        groups = restored[rows].view(-1, num_columns // 4, 4)
        for slot in range(4):
            groups[..., slot] = torch.where(first == slot, pairs[..., 0],
                                            torch.where(second == slot, pairs[..., 1], zero))  # fmt: skip
    return restored


def _row_tiles(num_rows: int, num_columns: int) -> list[slice]:
    height = max(1, TILE_ELEMENTS // num_columns)
    return [slice(first, first + height) for first in range(0, num_rows, height)]
