"""The masked merged weight: how it is built, into which memory, and how long it is kept.

Legend: W (R, C) sparse weight, A = lora_A (r, C), B = lora_B (R, r), s scale, W_t = (W + s·B·A) ⊙ (W ≠ 0).
"""

from __future__ import annotations

from functools import cache

import torch

from lors_cli.grid import Grid
from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.kernels.choice import unpack
from lors_cli.models.packed.kernels.cuda import why_no_cuda_kernel
from lors_cli.models.packed.kernels.ops import available, instructions
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels.c_merge import masked_merge_in_c, why_not_in_c
from lors_cli.tuning.kernels.on_grid import round_to_grid, row_tiles
from lors_cli.tuning.kernels.rounding import (
    Rounding,
    is_stochastic,
    round_stochastically,
    round_stochastically_formula,
)
from lors_cli.tuning.kernels.scratch import scratch


@torch.no_grad()
def masked_merge(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    *,
    rounding: Rounding = "nearest",
    grid: Grid | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W_t = (W + s·B·A) ⊙ (W ≠ 0), in one rounding order everywhere.

    The adapters are cast to the weight's dtype, the sum is accumulated in float32 (float64 for a float64 weight)
    and rounded once: to a grid or to bfloat16 as `rounding` says, to other dtypes to the nearest. On CUDA one kernel
    reads W once and writes W_t once; on a CPU one in C does, but for bfloat16 to the nearest. Else it is one `addmm`
    that accumulates in float32 itself, where there is such a one, or row tiles that stay in the cache. None makes a
    mask or a second matrix of W's size; only a packed weight is unpacked first, in scratch memory, where no kernel
    reads it: the CUDA kernel wants 2:4, and no codes.

    Args:
        weight: (R, C), plain or packed: the result has the same bits.
        grid: that W lies on, and W_t is to lie on too; its scales have the weight's dtype.
        out: (R, C), where to put the result; its dtype may be another than the weight's. Default: a new tensor.
    """
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if out is None else out
    on_cuda, same_dtype = weight.device.type == "cuda", merged.dtype == weight.dtype
    if on_cuda:
        has_kernel = not why_no_cuda_kernel(weight.device, weight.dtype)
    else:
        in_rows = merged.stride(1) == 1 and (isinstance(weight, Packed) or weight.stride(1) == 1)
        why_not = why_not_in_c(weight.device, weight.dtype, rounding, len(lora_A), grid)
        has_kernel = in_rows and same_dtype and not why_not
    if isinstance(weight, Packed) and not (has_kernel and _reads(weight)):
        weight = unpack(weight, out=scratch(weight.shape, weight.dtype, weight.device, use="restored"))
    if has_kernel and on_cuda:
        from lors_cli.tuning.kernels.triton_merge import masked_merge_kernel

        return masked_merge_kernel(weight, lora_A, lora_B, scale, merged, rounding=rounding, grid=grid)
    if has_kernel:
        return masked_merge_in_c(weight, lora_A, lora_B, scale, merged, grid=grid, rounding=rounding)
    assert not isinstance(weight, Packed)
    A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    by_thresholds = grid is None and is_stochastic(rounding, merged.dtype)
    if grid is None and same_dtype and not by_thresholds and _addmm_rounds_once(weight.device, weight.dtype):
        return mask_by(torch.addmm(weight, B, A, alpha=scale, out=merged), weight)
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = A.to(exact), B.to(exact)
    for rows in row_tiles(*weight.shape, whole=weight.is_cuda):  # float32 tiles of 1 MiB stay in the cache
        part = weight[rows]
        tile = part.to(exact, copy=by_thresholds)  # the rounding works in place, and W is to stay as it is
        if by_thresholds:
            total = torch.addmm(tile, B[rows], A, alpha=scale, out=tile).float()
            mask_by(round_stochastically(total, merged[rows]), part.to(merged.dtype))
        elif grid is not None:
            total = torch.addmm(tile, B[rows], A, alpha=scale).float()
            merged[rows].copy_(mask_by(round_to_grid(total, part, grid.of_rows(rows), rounding), part))
        else:
            merged[rows].copy_(mask_by(torch.addmm(tile, B[rows], A, alpha=scale), tile))
    return merged


def masked_merge_formula(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float, dtype: torch.dtype,
    rounding: Rounding = "nearest", grid: Grid | None = None,
) -> torch.Tensor:  # fmt: skip
    """`masked_merge` to `dtype` as one plain expression, for torch.compile to fuse."""
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = lora_A.to(weight.dtype).to(exact), lora_B.to(weight.dtype).to(exact)
    total = torch.addmm(weight.to(exact), B, A, alpha=scale)
    if grid is not None:
        total = round_to_grid(total.float(), weight, grid, rounding)
    elif is_stochastic(rounding, dtype):
        total = round_stochastically_formula(total.float())
    return total.to(dtype).mul(weight.sign().square().to(dtype))


def _reads(weight: Packed) -> bool:
    """Whether the kernel reads such a packed weight: on CUDA no codes, and 2:4 alone."""
    if weight.device.type == "cpu":
        return not available(weight.dtype, weight.spec)
    return weight.grid is None and weight.pattern == TWO_OF_FOUR


def codes_on_cuda(weight: torch.Tensor | Packed) -> bool:
    """Whether torch's operations have to unpack it, slowly: no CUDA kernel reads codes."""
    return isinstance(weight, Packed) and weight.grid is not None and weight.device.type == "cuda"


def mask_by(merged: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`merged` with zeros where the weight is zero, in place; both have one dtype."""
    # the backward of hardshrink at 0 is "keep where |W| > 0": one vectorised pass, no bool tensor
    return torch.ops.aten.hardshrink_backward.grad_input(merged, weight, 0.0, grad_input=merged)


@cache
def _addmm_rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm of this dtype accumulates at least in float32 and rounds its result once."""
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def how_merged(
    device: torch.device, dtype: torch.dtype, rounding: Rounding = "nearest", rank: int = 1, grid: Grid | None = None,
    weight: torch.Tensor | Packed | None = None,
) -> str:  # fmt: skip
    """In words: by what `masked_merge` builds a merged weight, and why not by something faster.

    Args:
        weight: as it is held, where that is known; a packed one may have to be unpacked first.
    """
    on_cpu = device.type == "cpu"
    missing = why_not_in_c(device, dtype, rounding, rank, grid) if on_cpu else why_no_cuda_kernel(device, dtype)
    if isinstance(weight, Packed) and (missing or not _reads(weight)):
        by_torch = " by torch's operations, as no CUDA kernel reads codes" if codes_on_cuda(weight) else ""
        return f"unpacking{by_torch}, then {how_merged(device, dtype, rounding, rank, grid)}"
    if not missing:
        return f"one pass in C ({instructions()})" if on_cpu else "one CUDA kernel"
    why = f"no {'C' if on_cpu else 'CUDA'} kernel: {missing}"
    if grid is not None:
        return f"float32 tiles, rounded to the grid ({why})"
    if is_stochastic(rounding, dtype):
        return f"float32 tiles, rounded stochastically ({why})"
    if _addmm_rounds_once(device, dtype):
        return f"one addmm and a mask ({why})"
    name = str(dtype).removeprefix("torch.")
    return f"float32 tiles ({why}; addmm of {name} is not known to round once here)"
