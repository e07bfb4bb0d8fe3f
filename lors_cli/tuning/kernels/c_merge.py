"""The masked merge on a CPU in one pass of C: W, plain or packed, is read once and W_t written once.

Legend: W (R, C) sparse weight, A = lora_A (r, C), B = lora_B (R, r), s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0).
"""

from __future__ import annotations

import torch

from lors_cli.grid import Grid
from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.kernels import ops
from lors_cli.models.packed.kernels.build import NATIVE, library
from lors_cli.tuning.kernels.rounding import Rounding, is_stochastic, thresholds_for

LARGEST_RANK = 192
"""Above it MKL adds a product up in parts, on no processor in the order of the ranks."""


def why_not_in_c(
    device: torch.device, dtype: torch.dtype, rounding: Rounding, rank: int = 1, grid: Grid | None = None
) -> str:
    """Why the C kernel does not merge such weights, empty when it does."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if dtype not in ops.PREFIXES:
        return f"it does not know {str(dtype).removeprefix('torch.')}"
    if grid is not None and (reason := ops.why_not_this_grid(grid.spec)):
        return reason
    if grid is None and dtype == torch.bfloat16 and not is_stochastic(rounding, dtype):
        return "it rounds bfloat16 stochastically only"
    if rank > LARGEST_RANK:
        return f"rank {rank} is above {LARGEST_RANK}"
    return ops.available(dtype) or ""


def masked_merge_in_c(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    target: str = NATIVE,
    *,
    grid: Grid | None = None,
    rounding: Rounding = "stochastic",
) -> torch.Tensor:
    """W_t in `out`, of W's dtype: bfloat16 rounded by the thresholds, from float32 sums in the order of the ranks.

    Args:
        grid: that W_t is rounded to, as `rounding` says, instead of W's dtype.
        target: what the compiler may assume of the processor.
    """
    A, B = (adapter.detach().to(weight.dtype).to(torch.float32, copy=True).contiguous() for adapter in (lora_A, lora_B))
    (B if len(A) == 1 else A).mul_(scale)  # as MKL does, whose product of rank 1 is another function
    rows, columns = weight.shape
    by_thresholds = rounding == "stochastic" if grid is not None else weight.dtype == torch.bfloat16
    table = thresholds_for(columns, out.device).data_ptr() if by_thresholds else None
    codes = weight.grid if isinstance(weight, Packed) else None
    if grid is not None:
        assert codes is None or codes.spec == grid.spec
        assert grid.scales.dtype == weight.dtype
        assert grid.scales.shape == (rows, grid.spec.num_groups(columns))
        assert grid.scales.is_contiguous()
        assert grid.zeros is None or grid.zeros.is_contiguous()
    if isinstance(weight, Packed):
        held, mask, starts, stride = weight.values, weight.mask.data_ptr(), weight.starts.data_ptr(), columns
        ops.check(weight.values, weight.mask, weight.starts, columns, codes)
    else:
        held, mask, starts, stride = weight, None, None, weight.stride(0)
    function = getattr(library(target), f"{ops.PREFIXES[weight.dtype]}_merge")
    if function(held.data_ptr(), mask, starts, A.data_ptr(), B.data_ptr(), table, out.data_ptr(), rows, columns, len(A),
                stride, out.stride(0), *ops.in_c(codes or grid), codes is not None, grid is not None):  # fmt: skip
        raise MemoryError(f"no memory for adapters of rank {len(A)} and {columns} inputs")
    return out
