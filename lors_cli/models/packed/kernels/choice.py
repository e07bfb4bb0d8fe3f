"""Which kernel computes with a packed weight where it lies, and why none does."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from lors_cli.grid import GridSpec
from lors_cli.models.packed import format as by_torch
from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.kernels import cuda, ops
from lors_cli.output import console
from lors_cli.sparsity import Pattern


def why_none(device: torch.device, dtype: torch.dtype, grid: GridSpec | None = None) -> str:
    """Why no kernel multiplies with packed weights of this dtype there, empty where one does.

    Args:
        grid: of quantised weights, whose scales have this dtype.
    """
    if device.type == "cpu":
        return ops.available(dtype, grid) or ""
    return cuda.why_no_cuda_kernel(device, dtype) if grid is None else "it does not know codes of few bits"


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, C) times a packed weight (R, C), and its bias: (…, R).

    Raises:
        ValueError: x has another width.
    """
    if x.shape[-1] != packed.columns:  # whose mask may have as many words
        raise ValueError(f"a packed weight of {packed.columns} columns needs inputs that fit it, not {x.shape[-1]}")
    device, spec = packed.device, packed.spec
    compiled = torch.compiler.is_compiling() and (spec is None or packed.dtype in ops.PREFIXES)
    if device.type == "cpu" and (compiled or not why_none(device, packed.dtype, spec)):
        return ops.linear(x, packed.values, packed.mask, packed.starts, bias, packed.grid, _keeps_half(packed.pattern))
    if device.type == "cuda" and not why_none(device, packed.dtype, spec):
        return cuda.linear_on_cuda(x, packed, bias)
    if not torch.compiler.is_compiling():
        _say_slow(why_none(device, packed.dtype, spec))
    return F.linear(x, unpack(packed), bias)


@cache
def _say_slow(reason: str) -> None:
    """Warn once that weights are unpacked anew each time: loading sees to it only where the model is loaded to."""
    console.warn(f"packed weights are unpacked for every product: {reason}. model.dequantize() unpacks them for good.")


def _keeps_half(pattern: Pattern | None) -> bool:
    """Whether each word of 32 columns keeps 16."""
    return pattern is not None and pattern.n is not None and 2 * pattern.n == pattern.m and 32 % pattern.m == 0


@torch.no_grad()
def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` or a new tensor."""
    spec = packed.spec
    if packed.device.type != "cpu" and spec is None:
        return cuda.unpacked(packed, out)
    if packed.device.type != "cpu" or ops.available(packed.dtype, spec) is not None:
        return by_torch.unpack(packed, out)
    weight = packed.values.new_empty(packed.shape, dtype=packed.dtype) if out is None else out
    return ops.restore(packed.values, packed.mask, packed.starts, weight, packed.grid)
