"""The packed form of a sparse weight, against a naive loop over its places."""

from __future__ import annotations

import pytest
import torch

from lors_cli.errors import UsageError
from lors_cli.models.packed import format as packed_format
from lors_cli.models.packed.format import PADDING, Packed, check, mask_words, pack, packed_bytes, unpack
from lors_cli.sparsity import Pattern

TWO_OF_FOUR = Pattern(2, 4, 0.5)


def sparse(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, share: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0)


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    groups = weight.view(rows, -1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, -1).indices, True)
    return (groups * kept).view(rows, columns).to(dtype)


def naive(weight: torch.Tensor) -> tuple[list[float], list[list[int]]]:
    """Kept values and mask words, place by place."""
    values, words = [], []
    for row in weight.tolist():
        words.append([0] * mask_words(len(row)))
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                words[-1][column // 32] |= 1 << column % 32
    return values, [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in words]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (5, 32), (4, 33), (7, 100), (2, 4096), (64, 65)])
def test_values_and_mask_are_those_of_a_naive_loop(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = sparse(rows, columns, dtype)
    packed = pack(weight)
    values, words = naive(weight)
    assert packed.values[:-PADDING].tolist() == values
    assert packed.values[-PADDING:].tolist() == [0.0] * PADDING
    assert packed.mask.tolist() == words
    assert packed.starts.tolist() == [sum(bool(v) for row in weight.tolist()[:n] for v in row) for n in range(rows)]
    assert torch.equal(unpack(packed), weight)
    check("w", packed.values, packed.mask, (rows, columns), None)


def test_packed_and_unpacked_in_tiles_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(50, 70, torch.float32)
    whole = pack(weight)
    monkeypatch.setattr(packed_format, "TILE_ELEMENTS", 150)
    tiled = pack(weight)
    assert torch.equal(whole.values, tiled.values)
    assert torch.equal(whole.mask, tiled.mask)
    assert torch.equal(unpack(tiled), weight)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:5", "8:16", "1:100"])
def test_n_of_m_keeps_exactly_n_a_group_whatever_zeros_it_has(pattern: str) -> None:
    held = Pattern.parse(pattern)
    assert held.n is not None
    assert held.m is not None
    weight = torch.randn(9, 4 * held.m, generator=torch.Generator().manual_seed(2))
    groups = weight.view(9, -1, held.m)
    for row in range(9):
        for group in range(4):  # from none to n non-zeros, at scattered places
            kept = torch.randperm(held.m, generator=torch.Generator().manual_seed(row))[: (row + group) % (held.n + 1)]
            groups[row, group] *= torch.zeros(held.m).index_fill_(0, kept, 1.0)
    packed = pack(weight, held)
    assert packed.starts.tolist() == [row * 4 * held.n for row in range(9)]
    assert len(packed.values) == 9 * 4 * held.n + PADDING
    assert torch.equal(unpack(packed), weight)
    check("w", packed.values, packed.mask, (9, 4 * held.m), held)


def test_a_weight_that_breaks_its_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 2"):
        pack(torch.ones(2, 8), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack(torch.zeros(2, 6), TWO_OF_FOUR)


def test_zeros_lose_their_sign_and_odd_numbers_stay() -> None:
    weight = torch.tensor([[-0.0, float("nan"), float("inf"), 1e-45], [-0.0, -0.0, -0.0, 3.0]])
    packed = pack(weight)
    assert len(packed.values) - PADDING == 4
    assert torch.equal(unpack(packed).nan_to_num(7.0), weight.nan_to_num(7.0))
    assert not torch.signbit(unpack(packed)[1, :3]).any()
    filled = pack(torch.tensor([[-0.0, -0.0, 0.0, 3.0]]), TWO_OF_FOUR)
    assert not torch.signbit(filled.values).any()


def test_a_packed_weight_takes_what_it_is_said_to() -> None:
    packed = pack(two_of_four(64, 128, torch.bfloat16), TWO_OF_FOUR)
    there = packed.values.nbytes + packed.mask.nbytes
    assert there == packed_bytes(64 * 64, 64, 128, 2) == 64 * 128 * 2 * 9 // 16 + 64


def broken(packed: Packed, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    values, mask = packed.values.clone(), packed.mask.clone()
    if kind == "a bit more":
        mask[1, 0] |= ~mask[1, 0] & -(~mask[1, 0])
    elif kind == "a value less":
        values = values[:-1]
    elif kind == "a bit beyond":
        mask[0, -1] |= 1 << 30
    elif kind == "no zeros behind":
        values[-1] = 1
    elif kind == "another width":
        mask = mask[:, :-1].contiguous()
    elif kind == "wider words":
        mask = mask.long()
    elif kind == "values of integers":
        values = values.int()
    elif kind == "values in two dimensions":
        values = values[None]
    elif kind == "moved within a row":  # as many bits, not N a group
        mask[0, 0] = int(mask[0, 0]) & ~0xFF | 0x0F
    return values, mask


KINDS = ["a bit more", "a value less", "a bit beyond", "no zeros behind", "another width", "wider words",
         "values of integers", "values in two dimensions", "moved within a row"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused_before_they_are_used(kind: str) -> None:
    packed = pack(two_of_four(6, 40, torch.float32), TWO_OF_FOUR)
    check("layer.up", packed.values, packed.mask, (6, 40), TWO_OF_FOUR)
    with pytest.raises(UsageError, match=r"layer\.up is no packed weight of 6 × 40"):
        check("layer.up", *broken(packed, kind), (6, 40), TWO_OF_FOUR)
