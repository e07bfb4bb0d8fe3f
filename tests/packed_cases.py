"""Packed weights made bit by bit, and what their products and merged weights have to be."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.kernels import ops

DTYPES = [torch.bfloat16, torch.float32]
TARGETS = ["native", *(["x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else [])]


@pytest.fixture(scope="module")
def kernels_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The libraries are built once for the module, and not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if reason := ops.available(torch.float32):
            pytest.skip(reason)
        yield


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """What the kernels are built for."""
    if request.param == "x86-64-v3" and not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("this processor has no AVX2")
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the kernels compute in."""
    return request.param  # type: ignore[no-any-return]


@dataclass
class Case:
    """A sparse weight, plain and packed, inputs for it and perhaps a bias."""

    weight: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    offsets: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor | None
    grid: Grid | None = None

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.values, self.mask, self.offsets


def pack(weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The format of DESIGN §5, in plain loops."""
    rows, columns = weight.shape
    values: list[torch.Tensor] = []
    offsets, words = [], []
    for row in range(rows):
        offsets.append(len(values))
        word = [0] * ((columns + 31) // 32)
        for column in kept[row].nonzero().flatten().tolist():
            values.append(weight[row, column])
            word[column // 32] |= 1 << column % 32
        words.append([bits - (1 << 32) if bits >= 1 << 31 else bits for bits in word])
    tail = torch.zeros(32, dtype=weight.dtype)
    return (
        torch.cat([torch.stack(values), tail]) if values else tail,
        torch.tensor(words, dtype=torch.int32),
        torch.tensor(offsets),
    )


def random_case(dice: random.Random, dtype: torch.dtype, batch: int | None = None) -> Case:
    """Any shape; N:M or unstructured, with rows that keep nothing or all."""
    rows, columns = (
        dice.randint(1, 40),
        dice.choice([dice.randint(1, 70), dice.randint(71, 300), 32 * dice.randint(1, 6)]),
    )
    torch.manual_seed(dice.randrange(1 << 30))
    if dice.random() < 0.4:
        columns = (columns + 3) // 4 * 4
        kept = torch.rand(rows, columns // 4, 4).argsort(-1).lt(2).view(rows, columns)
    else:
        kept = torch.rand(rows, columns) < dice.random()
        kept[torch.rand(rows) < 0.1] = False
        kept[torch.rand(rows) < 0.1] = True
    weight = torch.randn(rows, columns).mul(kept).to(dtype)
    x = torch.randn(batch if batch is not None else dice.randint(1, 9), columns).to(dtype)
    return Case(weight, *pack(weight, kept), x, torch.randn(rows).to(dtype) if dice.random() < 0.5 else None)


def pack_codes(
    codes: torch.Tensor, kept: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The format of issue 23, in plain loops: with 4 bits two codes a byte, a word of 32 columns from a byte on."""
    held: list[int] = []
    offsets = []
    for row in range(len(codes)):
        offsets.append(len(held))
        for first in range(0, codes.shape[1], 32):
            word = [first + place for place in kept[row, first : first + 32].nonzero().flatten().tolist()]
            found = [int(codes[row, column]) for column in word]
            if bits == 4:
                found = [low + 16 * high for low, high in zip(found[::2], [*found[1::2], 0], strict=False)]
            held += found
    _, mask, _ = pack(codes, kept)
    return torch.tensor([*held, *[0] * 32], dtype=torch.uint8), mask, torch.tensor(offsets)


def random_grid(dice: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Grid:
    """Any grid that kernels know, with scales of any size."""
    bits = dice.choice((4, 8))
    spec = GridSpec(bits, dice.choice((32, 64, 128)), symmetric=bits == 8 or dice.random() < 0.5)
    shape = (rows, spec.num_groups(columns))
    scales = (torch.rand(shape) + 0.5) * 2.0 ** torch.randint(-8, 3, shape)
    zeros = None if spec.symmetric else torch.randint(0, 16, shape, dtype=torch.uint8)
    return Grid(spec, scales.to(dtype), zeros)


def random_code_case(dice: random.Random, dtype: torch.dtype, batch: int | None = None) -> Case:
    """The same of a quantised weight: codes of any value, also in a last group and word that are not full."""
    plain = random_case(dice, dtype, dice.randint(1, 40) if batch is None else batch)
    rows, columns = plain.weight.shape
    kept = (plain.mask.long().unsqueeze(-1) >> torch.arange(32) & 1).bool().flatten(1)[:, :columns]
    grid = random_grid(dice, rows, columns, dtype)
    codes = torch.randint(0, grid.spec.num_codes, (rows, columns), dtype=torch.uint8)
    weight = grid.values(codes).masked_fill(~kept, 0)
    return Case(weight, *pack_codes(codes, kept, grid.spec.bits), plain.x, plain.bias, grid)


def merged(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """(W + B·A) where W is not zero, a fused multiply-add after the other, rounded by a table of thresholds if any."""
    total = torch.zeros(weight.shape)
    for k in range(len(A)):
        total = (total.double() + B[:, k : k + 1].double() * A[k].double()).float()  # the product is exact in float64
    total = weight.float() + total
    if table is not None:
        bits = total.view(torch.int32).long() + table[torch.arange(len(weight)) % len(table)]
        total = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return total.masked_fill(weight == 0, 0)


def check(case: Case, result: torch.Tensor) -> None:
    """Within half a step of its dtype, and what sums in float32 may lose, of the product in float64."""
    x, weight = case.x.double(), case.weight.double()
    bias = 0 if case.bias is None else case.bias.double()
    exact, size = x @ weight.T + bias, x.abs() @ weight.abs().T + (0 if case.bias is None else bias.abs())  # type: ignore[union-attr]
    half_a_step = torch.finfo(case.x.dtype).eps / 2
    allowed = half_a_step * 1.01 * exact.abs() + 1e-6 * size + 1e-30
    assert result.shape == exact.shape
    assert result.dtype == case.x.dtype
    wrong = (result.double() - exact).abs() > allowed
    assert not wrong.any(), f"{case.weight.shape}, batch {len(x)}: {wrong.sum()} wrong"
