"""The packed form of a sparse weight: kept values, and a mask of one bit a place (docs/packing.md; versions 1 and 2).

N:M keeps exactly N values a group, so that row n starts at n·C·N/M; otherwise rows start where those before end. Of a
weight on a grid of few bits its codes are kept in place of values: 8 bits, or 4 and two a byte, low ones first, those
of every word of 32 columns from a byte of their own on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.bits import WORD, from_bytes, mask_words, row_sizes, to_bits, to_bools, to_bytes
from lors_cli.sparsity import Pattern

VERSION = 1
GRID_VERSION = 2
"""Of checkpoints in which a weight lies on a grid."""
PADDING = 32
"""Zeros behind the kept values: a load of 64 bytes may read past their end."""
TILE_ELEMENTS = 1 << 22
"""Of a weight packed or unpacked at a time, which bounds the memory for masks."""
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
"""Of grids that can be packed."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Packed:
    """A sparse weight (R, C), packed.

    Args:
        values: (kept + 32,) in the weight's dtype: kept values row by row, columns ascending, then zeros. On a grid
            uint8, the codes of the kept values: of 8 bits a byte each, of 4 bits two, as this module says.
        mask: (R, ⌈C/32⌉) int32; bit j of word c is column 32·c + j, bits past C are 0.
        starts: (R,) int64, where each row's values begin; on a grid its first byte. Not stored.
        columns: C.
        pattern: N:M that the mask keeps to; None for unstructured.
        grid: what codes stand for; None where `values` are the values themselves.
    """

    values: torch.Tensor
    mask: torch.Tensor
    starts: torch.Tensor
    columns: int
    pattern: Pattern | None = None
    grid: Grid | None = None

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""
        return torch.Size((len(self.mask), self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.values.dtype if self.grid is None else self.grid.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    @property
    def spec(self) -> GridSpec | None:
        """Of its grid."""
        return None if self.grid is None else self.grid.spec

    @property
    def num_bytes(self) -> int:
        """What it takes in a file."""
        grids = () if self.grid is None else (self.grid.scales, self.grid.zeros)
        return sum(tensor.nbytes for tensor in (self.values, self.mask, *grids) if tensor is not None)


def mask_key(key: str) -> str:
    """What the mask of the values `key` is called in a file."""
    return f"{key}_mask"


def grid_keys(key: str, spec: GridSpec | None) -> list[str]:
    """What the scales, and the zero points, of the codes `key` are called in a file."""
    return [] if spec is None else [f"{key}_scale"] if spec.symmetric else [f"{key}_scale", f"{key}_zero"]


def packed_bytes(stored: int, rows: int, columns: int, itemsize: int, spec: GridSpec | None = None) -> int:
    """What a packed weight takes on disk.

    Args:
        stored: kept values, or bytes of their codes.
        itemsize: of the weight's dtype.
    """
    mask = rows * mask_words(columns) * 4
    if spec is None:
        return (stored + PADDING) * itemsize + mask
    return stored + PADDING + mask + rows * spec.num_groups(columns) * (itemsize + (not spec.symmetric))


def num_stored(weight: torch.Tensor, pattern: Pattern | None, spec: GridSpec) -> int:
    """How many bytes the codes of a weight take when it is packed."""
    tiles = _tiles(*weight.shape)
    return sum(int(row_sizes(to_bits(_kept(weight[tile], pattern)), spec).sum()) for tile in tiles)


@torch.no_grad()
def pack(weight: torch.Tensor, pattern: Pattern | None = None, grid: Grid | None = None) -> Packed:
    """Pack a weight (R, C); zeros lose their sign.

    Args:
        pattern: N:M, which fills groups of fewer non-zeros up with explicit zeros; else every non-zero is kept.
        grid: on which all its values lie, whose codes are packed in their place.

    Raises:
        ValueError: the weight breaks the pattern, or does not lie on the grid.
    """
    (rows, columns), spec = weight.shape, grid.spec if grid is not None else None
    if grid is not None and (wrong := _wrong_grid(grid, rows, columns, weight.dtype)):
        raise ValueError(wrong)
    mask = torch.empty(rows, mask_words(columns), dtype=torch.int32, device=weight.device)
    for tile in _tiles(rows, columns):
        mask[tile] = to_bits(_kept(weight[tile], pattern))
    values = weight.new_zeros(int(row_sizes(mask, spec).sum()) + PADDING, dtype=torch.uint8 if grid else weight.dtype)
    packed = Packed(values, mask, row_starts(mask, spec), columns, pattern, grid)
    for tile, kept, part in _parts(packed):
        if grid is None:
            part.copy_(weight[tile][kept])
            continue
        rows_grid = grid.of_rows(tile)
        codes = rows_grid.codes(weight[tile])
        if bool((rows_grid.values(codes).masked_fill_(~kept, 0) != weight[tile]).any()):
            raise ValueError("its values do not lie on its grid")
        part.copy_(to_bytes(codes[kept], kept, grid.spec))
    if grid is None:
        values += 0.0  # which makes -0 of an explicit zero 0
    return packed


@torch.no_grad()
def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` or a new tensor."""
    weight = packed.values.new_empty(packed.shape, dtype=packed.dtype) if out is None else out
    for tile, kept, part in _parts(packed):
        if packed.grid is None:
            weight[tile] = weight.new_zeros(kept.shape).masked_scatter_(kept, part)
        else:
            codes = part.new_zeros(kept.shape).masked_scatter_(kept, from_bytes(part, kept, packed.grid.spec))
            weight[tile] = packed.grid.of_rows(tile).values(codes).masked_fill_(~kept, 0)
    return weight


def row_starts(mask: torch.Tensor, spec: GridSpec | None = None) -> torch.Tensor:
    """(R,) int64: where each row's values begin; on a grid its bytes."""
    sizes = row_sizes(mask, spec)
    return sizes.cumsum(0) - sizes


def check(
    name: str, values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int], pattern: Pattern | None,
    num_stored: int | None = None, grid: Grid | None = None,
) -> None:  # fmt: skip
    """Hold the tensors of a file, which anyone may have written, against each other before anything reads by them.

    Args:
        num_stored: how many values, or bytes of codes, are said to be there.

    Raises:
        UsageError: naming the weight and what is wrong with it.
    """
    rows, columns = shape
    wrong = _wrong(values, mask, rows, columns, pattern, grid)
    if not wrong and num_stored not in (None, len(values) - PADDING):
        what = "values" if grid is None else "bytes of codes"
        wrong = f"config.json says {num_stored:,} {what} and {len(values) - PADDING:,} are there"
    if wrong:
        raise UsageError(f"{name} is no packed weight of {rows} × {columns}: {wrong}.",
                         "Pack the model again: lors pack MODEL --out DIR")  # fmt: skip


def read_packed(
    name: str, read: Callable[[str], torch.Tensor], key: str, shape: tuple[int, int], pattern: Pattern | None,
    num_stored: int, spec: GridSpec | None,
) -> Packed:  # fmt: skip
    """A packed weight of a file, checked.

    Args:
        read: gives a tensor of the file by its key.
        key: of the values.
        num_stored: how many values, or bytes of codes, config.json says.
    """
    values, mask, *grids = (read(each) for each in (key, mask_key(key), *grid_keys(key, spec)))
    grid = None if spec is None else Grid(spec, *grids)
    check(name, values, mask, shape, pattern, num_stored, grid)
    return Packed(values, mask, row_starts(mask, spec), shape[1], pattern, grid)


def specs_of(settings: Mapping[str, Any]) -> dict[str, GridSpec]:
    """The grids of those packed linears that hold codes, by `quantization_config`, which anyone may have written.

    Raises:
        UsageError: they are none that can be.
    """
    modules, floats, bits = settings["modules"], settings.get("floats"), settings.get("bits")
    if (bits is not None) != (settings.get("version") == GRID_VERSION):
        raise UsageError(f"quantization_config: {bits!r} bits in version {settings.get('version')!r}.")
    if floats is not None and not (isinstance(floats, list) and all(isinstance(name, str) for name in floats)):
        raise UsageError("quantization_config: floats is no list of names.")
    if bits is None:
        return {}
    spec = GridSpec(bits, settings.get("group_size", 0), settings.get("symmetric", True))
    if wrong := wrong_spec(spec):
        raise UsageError(f"quantization_config: {wrong}.")
    return dict.fromkeys((name for name in modules if name not in (floats or ())), spec)


def wrong_spec(spec: GridSpec) -> str:
    """Why weights on such a grid cannot be packed, empty where they can; its values may be anything."""
    known = type(spec.bits) is type(spec.group_size) is int and type(spec.symmetric) is bool
    if not known or spec.bits not in BITS or spec.group_size not in GROUP_SIZES:
        return f"a grid of {spec.bits!r} bits in groups of {spec.group_size!r}, not 4 or 8 in 32, 64 or 128"
    return "a grid of 8 bits is symmetric" if spec.bits == 8 and not spec.symmetric else ""


def _wrong_grid(grid: Grid, rows: int, columns: int, dtype: torch.dtype | None = None) -> str:
    """What does not fit a weight (R, C), or is no grid."""
    spec, scales, zeros = grid.spec, grid.scales, grid.zeros
    if wrong := wrong_spec(spec):
        return wrong
    shape = (rows, spec.num_groups(columns))
    if scales.dtype not in _DTYPES or (dtype is not None and scales.dtype != dtype) or tuple(scales.shape) != shape:
        return f"its scales are {_said(scales)}"
    if not bool((scales.isfinite() & (scales > 0)).all()):
        return "a scale is not above 0, or not finite"
    if (zeros is None) != spec.symmetric:
        return f"it has {'no ' if zeros is None else ''}zero points"
    if zeros is not None and (zeros.dtype != torch.uint8 or tuple(zeros.shape) != shape):
        return f"its zero points are {_said(zeros)}"
    return "a zero point is no code" if zeros is not None and bool((zeros >= spec.num_codes).any()) else ""


def _said(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _wrong(
    values: torch.Tensor, mask: torch.Tensor, rows: int, columns: int, pattern: Pattern | None, grid: Grid | None
) -> str:
    if mask.dtype != torch.int32 or tuple(mask.shape) != (rows, mask_words(columns)):
        return f"its mask is {_said(mask)}"
    has_dtype = values.dtype in _DTYPES if grid is None else values.dtype == torch.uint8
    if values.dim() != 1 or len(values) < PADDING or not has_dtype:
        return f"its values are {_said(values)}"
    if columns % WORD and bool((mask[:, -1] >> columns % WORD & (1 << WORD - columns % WORD) - 1).any()):
        return "its mask has bits beyond its inputs"
    if grid is not None and (wrong := _wrong_grid(grid, rows, columns)):
        return wrong
    spec = None if grid is None else grid.spec
    stored = int(row_sizes(mask, spec).sum())
    if stored != len(values) - PADDING:
        what = "values" if grid is None else "bytes of codes"
        return f"its mask keeps {stored:,} {what} and {len(values) - PADDING:,} are there"
    if bool((values[stored:] != 0).any()):
        return f"the {PADDING} values behind the kept ones are not zero"
    if pattern is not None and pattern.n is not None and pattern.m is not None:
        if columns % pattern.m:
            return f"its inputs are no multiple of {pattern.m}"
        for tile in _tiles(rows, columns):
            groups = to_bools(mask[tile], columns).unflatten(1, (-1, pattern.m)).sum(-1)
            if bool((groups != pattern.n).any()):
                return f"a group of {pattern.m} keeps other than {pattern.n}"
    if spec is not None and spec.bits == 4:
        packed = Packed(values, mask, row_starts(mask, spec), columns, pattern, grid)
        if any(not to_bytes(from_bytes(part, kept, spec), kept, spec).equal(part) for _, kept, part in _parts(packed)):
            return "the last 4 bits of a word that keeps an odd number are not zero"
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


def _parts(packed: Packed) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows at a time: which, what is kept of them (rows, C) bool, and the part of the values that is theirs."""
    ends = [*packed.starts.tolist(), len(packed.values) - PADDING]
    for tile in _tiles(*packed.shape):
        part = packed.values[ends[tile.start] : ends[min(tile.stop, len(ends) - 1)]]
        yield tile, to_bools(packed.mask[tile], packed.columns), part


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    height = max(1, TILE_ELEMENTS // max(1, columns))
    return (slice(first, min(first + height, rows)) for first in range(0, rows, height))
