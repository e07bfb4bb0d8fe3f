"""The Triton kernel: its numbers in Triton's interpreter (in a process of its own: the variable is read when it is
compiled), and what it takes of a GPU, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.grid import GridSpec
from lors_cli.tuning.kernels.rounding import PERIOD

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "gpu"))

CHECK = """
import torch
from lors_cli.models.packed.format import pack
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels.triton_merge import masked_merge_kernel
from lors_cli.tuning.kernels.masked_merge import masked_merge

generator = torch.Generator().manual_seed(4)
def draw(*shape):
    return torch.randn(*shape, generator=generator)

for rows, columns, rank in ((64, 128, 16), (70, 200, 5), (33, 130, 80), (3, 17, 16)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = draw(rows, columns).to(dtype)
        weight[draw(rows, columns) < 0] = 0
        # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: no rounding of adapters here, and one whole
        # unit of the last place allowed for the result's. float16 is rounded in both.
        A, B = draw(rank, columns).to(dtype).float(), draw(rows, rank).to(dtype).float()
        merged = masked_merge_kernel(weight, A, B, 0.25, torch.full_like(weight, float("nan")))
        exact = weight.double() + 0.25 * (B.to(dtype).double() @ A.to(dtype).double())
        exact[weight == 0] = 0
        assert bool((merged[weight == 0] == 0).all())
        limit = exact.abs() * torch.finfo(dtype).eps * (1.01 if dtype == torch.bfloat16 else 0.505) + 3e-5
        wrong = (merged.double() - exact).abs() > limit
        assert not bool(wrong.any()), (rows, columns, rank, dtype, int(wrong.sum()))
        tiles = masked_merge(weight, A, B, 0.25)
        if columns % 4 == 0:
            pairs = weight.view(rows, -1, 2)
            pairs[..., 1] = torch.where(pairs[..., 0] != 0, 0, pairs[..., 1])  # at most one of two is also 2:4
            plain = masked_merge_kernel(weight, A, B, 0.25, torch.full_like(weight, float("nan")))
            packed = masked_merge_kernel(pack(weight, TWO_OF_FOUR), A, B, 0.25, torch.full_like(weight, float("nan")))
            torch.testing.assert_close(packed, plain, rtol=0, atol=0)
        assert (merged != tiles).double().mean() < 0.01 or dtype != torch.float16
# rounded stochastically: of sums without any rounding of their own the very bits of the tiles
weight = draw(130, 200).bfloat16()
weight[draw(130, 200) < 0] = 0
A, B = (draw(5, 200) * 8).round() / 64, (draw(130, 5) * 8).round() / 64
merged = masked_merge_kernel(weight, A, B, 0.0625, torch.full_like(weight, float("nan")), rounding="stochastic")
torch.testing.assert_close(merged, masked_merge(weight, A, B, 0.0625, rounding="stochastic"), rtol=0, atol=0)
assert bool((merged != masked_merge(weight, A, B, 0.0625)).any())
# into a part of a larger buffer, in another dtype
buffer = torch.zeros(70, 512, dtype=torch.bfloat16)
weight, A, B = draw(70, 200), draw(8, 200), draw(70, 8)
masked_merge_kernel(weight, A, B, 1.0, buffer[:, 100:300])
torch.testing.assert_close(buffer[:, 100:300].float(), weight + B @ A, rtol=1e-2, atol=1e-2)
assert bool((buffer[:, :100] == 0).all()) and bool((buffer[:, 300:] == 0).all())
# launched on the tensors' own GPU (-1: none)
from contextlib import nullcontext
current = []
torch.cuda.device = lambda index: current.append(index) or nullcontext()
masked_merge_kernel(weight, A, B, 1.0, buffer[:, 100:300])
assert current == [-1], current
print("equal")
"""
EXACT = """
import torch
from lors_cli.models.packed.format import pack
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels.triton_merge import masked_merge_kernel
from lors_cli.tuning.kernels.masked_merge import masked_merge_formula

generator = torch.Generator().manual_seed(6)
def whole(limit, *shape):
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()

for rows, columns, rank in ((64, 64, 16), (70, 4, 5), (130, 68, 80), (200, 224, 33)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rounding in ("nearest", "stochastic"):
            # every product and sum is exact in float32; in what they are rounded to too where the interpreter cuts
            fine = 1 if dtype == torch.bfloat16 and rounding == "nearest" else 64
            weight = whole(8, rows, columns // 4, 4) / 8
            places = torch.rand(weight.shape, generator=generator).argsort(-1)
            weight = torch.where(places < 2, weight, 0).view(rows, columns).to(dtype)
            A, B = whole(1, rank, columns) / 8, whole(fine, rows, rank) / fine
            B[whole(8, rows, rank) < 8] = 0
            expected = masked_merge_formula(weight, A, B, 0.5, dtype, rounding) + 0.0
            for base in (weight, pack(weight, TWO_OF_FOUR)):
                found = masked_merge_kernel(base, A, B, 0.5, torch.full_like(weight, float("nan")), rounding=rounding)
                same = (found + 0.0).view(torch.uint8) == expected.view(torch.uint8)
                assert bool(same.all()), (rows, columns, rank, dtype, rounding, type(base), int((~same).sum()))
print("equal")
"""


ON_GRID = """
import torch
from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.format import pack
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels.triton_merge import masked_merge_kernel
from lors_cli.tuning.kernels.masked_merge import masked_merge_formula

generator = torch.Generator().manual_seed(6)
def whole(low, high, *shape):
    return torch.randint(low, high, shape, generator=generator).float()

for rows, columns, rank in ((64, 64, 16), (70, 196, 5), (130, 300, 33)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for spec in (GridSpec(4, 32), GridSpec(4, 64, False), GridSpec(8, 128)):
            groups = (rows, spec.num_groups(columns))
            # few bits, since the interpreter cuts bfloat16 where a GPU rounds; float32 has scales of any bits
            scales = whole(8, 16, *groups) / 64 if dtype != torch.float32 else whole(100, 200, *groups) / 777
            zeros = None if spec.symmetric else whole(5, 11, *groups).byte()
            grid = Grid(spec, scales.to(dtype), zeros)
            middle = spec.middle if zeros is None else 8
            codes = whole(middle - 5, middle + 5, rows, columns // 4, 4)
            weight = grid.values(codes.view(rows, columns).byte())
            places = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
            weight = torch.where(places.view(rows, columns) < 2, weight, 0).to(dtype)
            A, B = whole(-1, 2, rank, columns), whole(-9, 10, rows, rank) / 64
            for rounding in ("nearest", "stochastic"):
                expected = masked_merge_formula(weight, A, B, 0.5, dtype, rounding, grid) + 0.0
                for base in (weight, pack(weight, TWO_OF_FOUR)):
                    out = torch.full_like(weight, float("nan"))
                    found = masked_merge_kernel(base, A, B, 0.5, out, rounding=rounding, grid=grid) + 0.0
                    same = found.view(torch.uint8) == expected.view(torch.uint8)
                    assert bool(same.all()), (rows, columns, dtype, spec, rounding, type(base), int((~same).sum()))
                moved = (expected != weight) & (weight != 0)
                assert moved.any()
print("equal")
"""


@pytest.mark.parametrize("check", [CHECK, EXACT, ON_GRID], ids=["rounded-once", "bits-of-the-formula", "on-a-grid"])
def test_the_kernel_gives_the_exact_sum_rounded_once(check: str) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    done = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_without_spills_and_with_wide_accesses(ahead: Any, capability: int) -> None:
    for case in [*ahead.cases(), *(ahead.cases(64) if capability == 90 else [])]:
        found = ahead.resources(ahead.compiled(case, capability))
        print(ahead.show(case, capability, found))
        assert found["spilled_bytes"] == 0, case
        limit = 128 if case.dtype == torch.float32 else 128 if case.rank > 16 else 84
        assert found["registers"] <= limit, case  # 84: three blocks of 256 threads, 128: two
        widths = set(found["accesses"])
        assert widths <= ({"LDG.E.128", "STG.E.128", "LDG.E"} if case.packed else {"LDG.E.128", "STG.E.128"}), case
        assert found["accesses"].get("LDG.E", 0) <= 2, case  # words of positions


def test_on_a_grid_it_spills_neither(ahead: Any) -> None:
    specs = GridSpec(4, 128), GridSpec(4, 128, symmetric=False), GridSpec(4, 32, symmetric=False)
    for case in (ahead.Case(torch.bfloat16, packed, rounding, spec=spec)
                 for packed in (False, True) for rounding in ("nearest", "stochastic") for spec in specs):  # fmt: skip
        found = ahead.resources(ahead.compiled(case, 90))
        print(ahead.show(case, 90, found))
        assert found["spilled_bytes"] == 0, case
        assert found["registers"] <= (192 if case.spec.group_size == 32 else 144), case


def test_no_shape_spills(ahead: Any) -> None:
    """Nor where rows begin anywhere, and narrow accesses are all that there is."""
    for case in (ahead.Case(torch.bfloat16, False, "stochastic", 5, (70, 1001)),
                 ahead.Case(torch.bfloat16, True, "stochastic", 80, (70, 1004)),
                 ahead.Case(torch.float32, False, "nearest", 80, (70, 1001))):  # fmt: skip
        found = ahead.resources(ahead.compiled(case, 90))
        print(ahead.show(case, 90, found))
        assert found["spilled_bytes"] == 0, case


def test_models_in_use_get_the_hints(ahead: Any) -> None:
    """Every number and pointer that decides about wide accesses is divisible by 16 at these shapes."""
    for rows, columns in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (576, 1536), (576, 576)):
        for case in (ahead.Case(torch.bfloat16, form, "stochastic", 16, (rows, columns)) for form in (False, True)):
            call = case.call()
            assert all(call[name] % 16 == 0 for name in ("num_columns", "stride_weight", "stride_merged", "RANK"))


def test_tiles_are_whole_periods_and_cover_the_weight(ahead: Any) -> None:
    from lors_cli.tuning.kernels.triton_merge import BLOCK, MAX_TILES, launch

    assert BLOCK["ROWS"] % PERIOD == 0
    for rows, columns in ((1, 1), (64, 64), (1024, 4096), (4097, 4096), (14336, 4096)):
        weight, A, B = (torch.empty(shape, device="meta") for shape in ((rows, columns), (4, columns), (rows, 4)))
        (down, across), call = launch(weight, A, B, 1.0, weight, "nearest")
        assert down * call["TILES"] * BLOCK["ROWS"] >= rows > (down - 1) * call["TILES"] * BLOCK["ROWS"]
        assert across * BLOCK["COLUMNS"] >= columns
        assert call["TILES"] in (1, 2, 4, MAX_TILES)
        assert call["TILES"] == 1 or down * across >= 1024
