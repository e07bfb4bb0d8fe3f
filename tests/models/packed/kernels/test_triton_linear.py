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

from lors_cli.models.packed.format import Packed, pack
from lors_cli.models.packed.kernels import cuda
from lors_cli.sparsity import TWO_OF_FOUR, Pattern

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
# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: a whole unit of the last place for it, else half a one
LIMITS = {torch.bfloat16: 1.01 * 2**-7, torch.float16: 0.51 * 2**-10, torch.float32: 0.51 * 2**-23}
for number, (case, weight, packed) in enumerate(weights()):
    rows, columns = weight.shape
    for tokens, block_rows in ((1, 1), (1, 4), (1 + number % 8, 2), (8, 4)):
        x, bias = draw(tokens, columns).to(weight.dtype), draw(rows).to(weight.dtype) if number % 2 else None
        y = torch.full((tokens, rows), float("nan"), dtype=weight.dtype)
        warps = 1 + number % 2
        grid, arguments = launch_linear(x, packed, bias, y, {"ROWS": block_rows, "OCTETS": 32 * warps, "num_warps": warps})
        _linear[grid](**arguments)
        terms = x.double()[:, None, :] * weight.double()
        exact = terms.sum(-1) + (0 if bias is None else bias.double())
        # the rounding of the result, and that of sums in float32
        limit = exact.abs() * LIMITS[weight.dtype] + (terms.abs().sum(-1) + 1) * 2e-6 * (weight.dtype != torch.float16) \\
            + (terms.abs().sum(-1) + 1) * 1e-6
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
OUT_OF_BOUNDS = """
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


@pytest.mark.parametrize("check", [PRODUCTS, UNPACKING, OUT_OF_BOUNDS], ids=["products", "unpacking", "in-bounds"])
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


@pytest.fixture(scope="module")
def ahead() -> Any:
    """benchmarks/gpu/ahead.py, which compiles for GPUs that are not here."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    import ahead

    if not ahead.TOOL.is_file():
        pytest.skip(f"this wheel of Triton has no {ahead.TOOL.name}: registers and spills cannot be read")
    return ahead
