"""Which kernel computes with a packed weight where it lies, and why none does."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lors_cli.models.packed import format as by_torch
from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.kernels import cuda, ops


def why_none(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel multiplies with packed weights of this dtype there, empty where one does."""
    if device.type == "cpu":
        return ops.available(dtype) or ""
    return cuda.why_no_cuda_kernel(device, dtype)


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, C) times a packed weight (R, C), and its bias: (…, R)."""
    device = packed.device
    if packed.grid is not None:
        return F.linear(x, unpack(packed), bias)
    if device.type == "cpu" and (torch.compiler.is_compiling() or not why_none(device, packed.dtype)):
        return ops.linear(x, packed.values, packed.mask, packed.starts, bias)
    if device.type == "cuda" and not why_none(device, packed.dtype):
        return cuda.linear_on_cuda(x, packed, bias)
    return F.linear(x, unpack(packed), bias)


@torch.no_grad()
def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` or a new tensor."""
    if packed.grid is not None:
        return by_torch.unpack(packed, out)
    if packed.device.type != "cpu":
        return cuda.unpacked(packed, out)
    if ops.available(packed.dtype) is not None:
        return by_torch.unpack(packed, out)
    weight = packed.values.new_empty(packed.shape) if out is None else out
    return ops.restore(packed.values, packed.mask, packed.starts, weight)
