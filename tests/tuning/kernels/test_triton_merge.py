"""The Triton kernel in Triton's interpreter, in a process of its own: the variable is read when it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from lors_cli.tuning.kernels.compressed import compress
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
            packed = masked_merge_kernel(compress(weight), A, B, 0.25, torch.full_like(weight, float("nan")))
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
print("equal")
"""


def test_the_kernel_gives_the_exact_sum_rounded_once() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"
