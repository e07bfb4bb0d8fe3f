"""Products with packed weights on CUDA: their numbers in Triton's interpreter (in a process of its own: the variable is
read when they are compiled), and what they take of a GPU, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.models.packed.format import pack
from lors_cli.models.packed.kernels import cuda
from lors_cli.sparsity import TWO_OF_FOUR

sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks" / "gpu"))

DRAW = """
import torch
from lors_cli.models.packed.format import pack
from lors_cli.models.packed.kernels.cuda import linear_on_cuda
from lors_cli.models.packed.kernels.triton_linear import (
    _linear, _unpack, launch_linear, launch_unpack, packed_linear_cuda, unpack_cuda)
from lors_cli.sparsity import Pattern

generator = torch.Generator().manual_seed(4)
def draw(*shape):
    return torch.randn(*shape, generator=generator)
def sparse(rows, columns, pattern, share=0.5):
    '''A weight with some empty rows and some that keep all they may.'''
    weight = draw(rows, columns)
    if pattern is None:
        weight[torch.rand(rows, columns, generator=generator) < share] = 0
        weight[1::5], weight[2::5] = 0, 2.5
        return weight
    ranks = torch.rand(rows, columns // pattern.m, pattern.m, generator=generator).argsort(-1).view(rows, columns)
    weight[ranks >= pattern.n] = 0
    weight[1::5] = 0  # explicit zeros are kept
    return weight
SHAPES = (("2:4", 7, 68), ("2:4", 5, 1032), ("4:8", 6, 72), ("1:4", 5, 100), ("3:6", 5, 66), ("8:16", 5, 336),
          ("unstructured", 7, 45), ("unstructured", 5, 1), ("unstructured", 6, 1061))
def weights():
    for name, rows, columns in SHAPES:
        pattern = None if name == "unstructured" else Pattern.parse(name)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = sparse(rows, columns, pattern).to(dtype)
            yield (name, rows, columns, dtype), weight, pack(weight, pattern)
"""
PRODUCTS = """
# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: a unit of the last place for it, else half a one
LIMITS = {torch.bfloat16: 1.01 * 2**-7, torch.float16: 0.51 * 2**-10, torch.float32: 0.51 * 2**-23}
for number, (case, weight, packed) in enumerate(weights()):
    rows, columns = weight.shape
    for tokens, block_rows in ((1, 1), (1, 4), (1 + number % 8, 2), (8, 4)):
        x, bias = draw(tokens, columns).to(weight.dtype), draw(rows).to(weight.dtype) if number % 2 else None
        y = torch.full((tokens, rows), float("nan"), dtype=weight.dtype)
        warps = 1 + number % 2
        block = {"ROWS": block_rows, "OCTETS": 32 * warps, "num_warps": warps}
        grid, arguments = launch_linear(x, packed, bias, y, block)
        _linear[grid](**arguments)
        terms = x.double()[:, None, :] * weight.double()
        exact = terms.sum(-1) + (0 if bias is None else bias.double())
        limit = exact.abs() * LIMITS[weight.dtype] + (terms.abs().sum(-1) + 1) * 1e-6  # and what float32 sums round
        wrong = (y.double() - exact).abs() > limit
        assert not bool(wrong.any() | y.isnan().any()), (case, tokens, block_rows, (y.double() - exact).abs().max())
# as it is called: any leading dimensions, the block it chooses, and more tokens than the kernel takes
weight = sparse(9, 300, None)
packed, x, bias = pack(weight), draw(2, 3, 300), draw(9)
expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
torch.testing.assert_close(linear_on_cuda(x, packed, bias), expected)
torch.testing.assert_close(packed_linear_cuda(x[:, 1], packed), expected[:, 1] - bias)
for tokens in (0, 9):
    x = draw(tokens, 300)
    torch.testing.assert_close(linear_on_cuda(x, packed, bias), torch.nn.functional.linear(x, weight, bias))
# a gradient reaches x and the bias
x, bias = draw(2, 300).requires_grad_(), draw(9).requires_grad_()
linear_on_cuda(x, packed, bias).sum().backward()
torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 300))
torch.testing.assert_close(bias.grad, torch.full((9,), 2.0))
# launched on the tensors' own GPU (-1: none)
from contextlib import nullcontext
current = []
torch.cuda.device = lambda index: current.append(index) or nullcontext()
packed_linear_cuda(draw(1, 300), packed), unpack_cuda(packed)
assert current == [-1, -1], current
print("equal")
"""
UNPACKING = """
for case, weight, packed in weights():
    whole = torch.full((len(weight), weight.shape[1] + 7), float("nan"), dtype=weight.dtype)
    found = unpack_cuda(packed, whole[:, 3:-4])  # into a part of something larger
    assert torch.equal(found, weight), case
    assert bool(whole[:, :3].isnan().all() & whole[:, -4:].isnan().all()), case
    assert torch.equal(unpack_cuda(packed), weight), case
print("equal")
"""
BEYOND = """
# what lies before and behind the tensors is infinite: nothing of it may reach a result
for case, weight, packed in weights():
    guarded = torch.full((len(packed.values) + 128,), float("inf"), dtype=weight.dtype)
    guarded[64:-64] = packed.values
    packed = type(packed)(guarded[64:-64], packed.mask, packed.starts, packed.columns, packed.pattern)
    x = draw(3, weight.shape[1]).to(weight.dtype)
    y = packed_linear_cuda(x, packed)
    assert bool(y.isfinite().all()), case
    assert torch.equal(unpack_cuda(packed), weight), case
    assert bool((y[:, 1::5] == 0).all()), case
print("equal")
"""


@pytest.mark.parametrize("check", [PRODUCTS, UNPACKING, BEYOND], ids=["products", "unpacking", "nothing-beyond"])
def test_numbers_in_the_interpreter(check: str) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    done = subprocess.run(
        [sys.executable, "-c", DRAW + check], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def test_why_there_is_no_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert cuda.why_no_cuda_kernel(torch.device("cpu"), torch.bfloat16) == "it is for CUDA, not cpu"
    assert cuda.why_no_cuda_kernel(gpu, torch.float64) == "it does not know float64"
    for capability, triton, words in (((7, 5), True, "the GPU is older than Ampere"), ((9, 0), True, ""),
                                      ((9, 0), False, "the package triton is not installed")):  # fmt: skip
        cuda.why_no_cuda_kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        if not triton:
            monkeypatch.setitem(sys.modules, "triton", None)
        elif not words:
            pytest.importorskip("triton", reason="Triton has no wheel for this system")
        assert cuda.why_no_cuda_kernel(gpu, torch.bfloat16) == words
    cuda.why_no_cuda_kernel.cache_clear()


def test_where_there_is_no_kernel_torch_unpacks() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0], [0.0] * 5])
    out = torch.full((2, 5), float("nan"))
    assert torch.equal(cuda.unpacked(pack(weight), out), weight)
    assert torch.equal(out, weight)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_without_spills_and_with_wide_accesses(ahead: Any, capability: int) -> None:
    for case in ahead.packed_cases():
        if capability != 90 and case.dtype != torch.bfloat16:
            continue
        found = ahead.resources(ahead.compiled(case, capability))
        print(ahead.show(case, capability, found))
        accesses, pairs = found["accesses"], case.pattern == TWO_OF_FOUR
        value = "LDG.E" if case.dtype == torch.float32 else "LDG.E.U16"
        assert found["spilled_bytes"] == 0, case
        if not case.tokens:  # eight places a thread, written 16 bytes at once
            assert found["registers"] <= 40
            assert accesses["STG.E.128"] == 1, case
            assert accesses[value] == 8, case
            continue
        assert found["registers"] <= (216 if case.dtype == torch.float32 else 80 if case.tokens == 1 else 168), case
        inputs = case.tokens * case.dtype.itemsize // 2
        if pairs:  # of each of four rows four values and a byte of the mask
            values = "LDG.E.128" if case.dtype == torch.float32 else "LDG.E.64"
            assert accesses.get("LDG.E.128", 0) == inputs + 4 * (values == "LDG.E.128"), case
            assert accesses[values] >= 4, case
            assert value not in accesses, case
        else:
            assert accesses["LDG.E.128"] == inputs, case
            assert accesses[value] == 32, case
        assert accesses["LDG.E.U8"] == 4, case


def test_what_a_product_costs_in_instructions(ahead: Any) -> None:
    """A loop's body handles four rows of an octet a thread; README.md of benchmarks/gpu reckons with these."""
    for pattern, tokens, limit in (
        (TWO_OF_FOUR, 1, 7),
        (TWO_OF_FOUR, 2, 9),
        (TWO_OF_FOUR, 8, 22),
        (None, 1, 16),
        (None, 8, 28),
    ):
        found = ahead.resources(ahead.compiled(ahead.PackedCase(torch.bfloat16, pattern, tokens), 90))
        assert found["in_loop"] / 32 <= limit, (pattern, tokens, found)


def test_no_shape_spills(ahead: Any) -> None:
    """Nor where rows begin anywhere."""
    for case in (ahead.PackedCase(torch.bfloat16, None, 8, (4097, 1001)),
                 ahead.PackedCase(torch.float32, None, 7, (70, 33)),
                 ahead.PackedCase(torch.bfloat16, TWO_OF_FOUR, 8, (4097, 1004))):  # fmt: skip
        found = ahead.resources(ahead.compiled(case, 90))
        assert found["spilled_bytes"] == 0, (case, found)


def test_programs_cover_the_weight_and_are_many(ahead: Any) -> None:
    from lors_cli.models.packed.kernels.triton_linear import MAX_ROWS, MIN_PROGRAMS, launch_linear

    for rows, columns in ((1, 1), (64, 64), (192, 576), (1024, 4096), (4097, 4096), (14336, 4096), (4096, 14336)):
        x, y = ahead.empty(torch.bfloat16, 1, columns), ahead.empty(torch.bfloat16, 1, rows)
        (programs,), call = launch_linear(x, ahead.empty_packed(torch.bfloat16, (rows, columns), None), None, y)
        assert programs * call["ROWS"] >= rows > (programs - 1) * call["ROWS"]
        assert call["STEPS"] * call["OCTETS"] * 8 >= columns > (call["STEPS"] - 1) * call["OCTETS"] * 8
        assert call["OCTETS"] == 32 * call["num_warps"]
        assert call["ROWS"] in (1, 2, MAX_ROWS)
        assert call["ROWS"] == 1 or programs >= MIN_PROGRAMS
        assert call["OCTETS"] * 8 < 1 << 15  # what a row's sums may come to, of four in one integer
