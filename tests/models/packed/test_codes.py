"""Weights on a grid, packed as codes: against a naive loop over their places, and against broken files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.models.packed import format as packed_format
from lors_cli.models.packed.format import PADDING, Packed, check, num_stored, pack, packed_bytes, row_starts, unpack
from lors_cli.sparsity import Pattern, keep_largest

TWO_OF_FOUR = Pattern(2, 4, 0.5)
SPECS = [GridSpec(4, 32), GridSpec(4, 64, symmetric=False), GridSpec(4, 128), GridSpec(8, 32), GridSpec(8, 128)]
SHAPES = [(1, 1), (3, 31), (5, 32), (4, 33), (7, 100), (2, 576), (9, 65)]


def on_a_grid(
    rows: int, columns: int, spec: GridSpec, dtype: torch.dtype = torch.bfloat16, pattern: Pattern | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, Grid]:  # fmt: skip
    """A sparse weight that lies on a grid, with a row that keeps nothing and one that keeps all where unstructured."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    if pattern is not None:
        mask = keep_largest(weight.abs().float(), pattern, per_row=False)
    elif rows > 4:
        mask[1], mask[3] = False, True
    grid = fit_grid(weight, mask, spec)
    return grid.rounded(weight) * mask, grid


def naive(weight: torch.Tensor, kept: torch.Tensor, grid: Grid) -> tuple[list[int], list[int]]:
    """The bytes of the codes and where rows begin, place by place."""
    stored: list[int] = []
    starts = []
    for row in range(len(weight)):
        starts.append(len(stored))
        half = 0
        for column in range(weight.shape[1]):
            if column % 32 == 0:
                half = 0
            if not kept[row, column]:
                continue
            group = column // grid.spec.group_size
            zero = 2 ** (grid.spec.bits - 1) if grid.zeros is None else int(grid.zeros[row, group])
            code = zero + round(float(weight[row, column]) / float(grid.scales[row, group]))
            if grid.spec.bits == 8 or half == 0:
                stored.append(code)
            else:
                stored[-1] += 16 * code
            half = 1 - half
    return stored, starts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_codes_are_those_of_a_naive_loop_and_give_the_weight_back(
    rows: int, columns: int, spec: GridSpec, dtype: torch.dtype
) -> None:
    weight, grid = on_a_grid(rows, columns, spec, dtype)
    packed = pack(weight, grid=grid)
    stored, starts = naive(weight, weight != 0, grid)
    assert packed.values.dtype == torch.uint8
    assert packed.values.tolist() == [*stored, *[0] * PADDING]
    assert packed.starts.tolist() == starts
    assert packed.starts.equal(row_starts(packed.mask, spec))
    assert packed.mask.equal(pack(weight).mask)
    assert (packed.dtype, packed.shape) == (dtype, weight.shape)
    assert unpack(packed).dtype == dtype
    assert unpack(packed).equal(weight)
    check("w", packed.values, packed.mask, (rows, columns), None, len(stored), grid)
    assert num_stored(weight, None, spec) == len(stored)
    assert packed.num_bytes == packed_bytes(len(stored), rows, columns, dtype.itemsize, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["2:4", "1:4", "4:8", "3:5", "8:16"])
def test_n_of_m_is_filled_up_with_zeros_whose_code_is_the_zero_point(name: str, spec: GridSpec) -> None:
    pattern = Pattern.parse(name)
    weight, grid = on_a_grid(6, 80, spec, torch.float32, pattern)
    weight[:, ::7] = 0
    packed = pack(weight, pattern, grid)
    n, m = pattern.n, pattern.m
    kept = weight != 0
    for row in range(6):
        for first in range(0, 80, m):
            for column in range(first, first + m):
                if kept[row, first : first + m].sum() < n:
                    kept[row, column] = True
    assert packed.values.tolist() == [*naive(weight, kept, grid)[0], *[0] * PADDING]
    assert unpack(packed).equal(weight)
    check("w", packed.values, packed.mask, (6, 80), pattern, None, grid)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_and_unpacked_in_tiles_are_the_same(monkeypatch: pytest.MonkeyPatch, spec: GridSpec) -> None:
    weight, grid = on_a_grid(50, 70, spec)
    whole = pack(weight, grid=grid)
    monkeypatch.setattr(packed_format, "TILE_ELEMENTS", 150)
    tiled = pack(weight, grid=grid)
    assert whole.values.equal(tiled.values)
    assert unpack(tiled).equal(weight)
    assert num_stored(weight, None, spec) == len(whole.values) - PADDING
    check("w", tiled.values, tiled.mask, (50, 70), None, None, grid)


def test_what_does_not_lie_on_its_grid_is_refused() -> None:
    weight, grid = on_a_grid(4, 64, GridSpec(4, 32))
    place = tuple(weight.nonzero()[0].tolist())
    between = weight[place] + 0.4 * grid.scales[place[0], place[1] // 32]
    for wrong in (between, weight[place] * 1e3, float("nan"), float("inf")):
        moved = weight.clone()
        moved[place] = wrong
        with pytest.raises(ValueError, match="do not lie on its grid"):
            pack(moved, grid=grid)
    with pytest.raises(ValueError, match="its scales are bfloat16"):
        pack(weight.float(), grid=grid)
    with pytest.raises(ValueError, match="its scales are"):
        pack(weight[:3], grid=grid)


def test_zeros_lose_their_sign() -> None:
    weight, grid = on_a_grid(4, 64, GridSpec(4, 32))
    again = unpack(pack(torch.where(weight == 0, -0.0, weight), grid=grid))
    assert again.view(torch.int16).equal(weight.masked_fill(weight == 0, 0).view(torch.int16))


def changed(packed: Packed, **parts: torch.Tensor | GridSpec | None) -> Packed:
    """With other values, mask or parts of the grid."""
    assert packed.grid is not None
    grid = replace(packed.grid, **{key: part for key, part in parts.items() if key in ("scales", "zeros", "spec")})
    return replace(packed, grid=grid, **{key: part for key, part in parts.items() if key in ("values", "mask")})


def with_bits(packed: Packed) -> torch.Tensor:
    """The mask with a bit more in the first word that has room."""
    mask = packed.mask.clone()
    mask[0, 0] = int(mask[0, 0]) | 0x0F0F
    return mask


def odd_word(packed: Packed) -> torch.Tensor:
    """The values with the last 4 bits of the first word that keeps an odd number set."""
    at = 0
    for word in packed.mask.flatten().tolist():
        count = (word & 0xFFFFFFFF).bit_count()
        at += (count + 1) // 2
        if count % 2:
            values = packed.values.clone()
            values[at - 1] |= 0x10
            return values
    raise AssertionError("no word keeps an odd number")


def ones_at(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


BREAKS: dict[str, tuple[Callable[[Packed], Packed], str]] = {
    "floats": (lambda p: changed(p, values=p.values.bfloat16()), "its values are bfloat16"),
    "signed": (lambda p: changed(p, values=p.values.to(torch.int8)), "its values are int8"),
    "a byte less": (lambda p: changed(p, values=p.values[:-1]), "its mask keeps"),
    "a byte more": (lambda p: changed(p, values=torch.cat([p.values, p.values[-1:]])), "its mask keeps"),
    "other bits": (lambda p: changed(p, mask=with_bits(p)), "its mask keeps"),
    "no zeros behind": (lambda p: changed(p, values=torch.cat([p.values[:-1], p.values[-1:] + 1])), "not zero"),
    "4 bits too many": (lambda p: changed(p, values=odd_word(p)), "odd number"),
    "scales of another shape": (lambda p: changed(p, scales=p.grid.scales[:, :-1]), "its scales are"),
    "scales of a row less": (lambda p: changed(p, scales=p.grid.scales[1:]), "its scales are"),
    "scales that are none": (lambda p: changed(p, scales=p.grid.scales.int()), "its scales are int32"),
    "small floats": (lambda p: changed(p, scales=p.grid.scales.to(torch.float8_e4m3fn)), "its scales are float8"),
    "a scale of 0": (lambda p: changed(p, scales=ones_at(p.grid.scales, 0)), "not above 0"),
    "a scale below 0": (lambda p: changed(p, scales=ones_at(p.grid.scales, -1)), "not above 0"),
    "a scale that is no number": (lambda p: changed(p, scales=ones_at(p.grid.scales, float("nan"))), "not finite"),
    "an endless scale": (lambda p: changed(p, scales=ones_at(p.grid.scales, float("inf"))), "not finite"),
    "no zero points": (lambda p: changed(p, zeros=None), "no zero points"),
    "zero points of floats": (lambda p: changed(p, zeros=p.grid.zeros.bfloat16()), "its zero points are"),
    "fewer zero points": (lambda p: changed(p, zeros=p.grid.zeros[:, 1:]), "its zero points are"),
    "a zero point that is no code": (lambda p: changed(p, zeros=ones_at(p.grid.zeros, 16)), "is no code"),
    "zero points of a symmetric one": (lambda p: changed(p, spec=GridSpec(4, 64)), "it has zero points"),
    "another group size": (lambda p: changed(p, spec=GridSpec(4, 48, symmetric=False)), "groups of 48"),
    "no group size": (lambda p: changed(p, spec=GridSpec(4, 0, symmetric=False)), "groups of 0"),
    "3 bits": (lambda p: changed(p, spec=GridSpec(3, 64, symmetric=False)), "3 bits"),
    "4.0 bits": (lambda p: changed(p, spec=GridSpec(4.0, 64, symmetric=False)), "4.0 bits"),
    "8 bits with zero points": (lambda p: changed(p, spec=GridSpec(8, 64, symmetric=False)), "8 bits is symmetric"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_files_are_refused_before_they_are_used(kind: str) -> None:
    weight, grid = on_a_grid(6, 100, GridSpec(4, 64, symmetric=False))
    packed = pack(weight, grid=grid)
    check("layer.up", packed.values, packed.mask, (6, 100), None, None, packed.grid)
    make, said = BREAKS[kind]
    broken = make(packed)
    with pytest.raises(UsageError, match=rf"layer\.up is no packed weight of 6 × 100: .*{said}"):
        check("layer.up", broken.values, broken.mask, (6, 100), None, None, broken.grid)
    with pytest.raises(UsageError, match=r"config\.json says 7 bytes of codes"):
        check("layer.up", packed.values, packed.mask, (6, 100), None, 7, packed.grid)


@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (1536, 576), (576, 576), (192, 576), (4096, 4096)])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=["2:4", "unstructured"])
def test_int4_in_groups_of_128_takes_at_most_three_and_a_quarter_bits_a_weight(
    rows: int, columns: int, pattern: Pattern | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(rows, columns, generator=generator)
    kept = keep_largest(scores, pattern or Pattern(None, None, 0.5), per_row=False)
    weight = torch.randint(1, 8, (rows, columns), generator=generator).bfloat16() * kept
    grid = Grid(GridSpec(4, 128), torch.ones(rows, -(-columns // 128), dtype=torch.bfloat16))
    packed = pack(weight, pattern, grid)
    bits = 8 * packed.num_bytes / weight.numel()
    print(f"{rows} × {columns}, {pattern}: {bits:.4f} bits a weight")
    assert 3.1 < bits <= 3.25
