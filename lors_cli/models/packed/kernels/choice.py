"""Which kernel computes with a packed weight where it lies, and why none does."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lors_cli.models.packed.format import Packed
from lors_cli.models.packed.format import unpack as unpack_by_torch
from lors_cli.models.packed.kernels import ops


def why_none(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel multiplies with packed weights of this dtype there, None where one does."""
    if device.type == "cpu":
        return ops.available(dtype)
    return f"there is none for {device.type}"


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, C) times a packed weight (R, C), and its bias: (…, R)."""
    if torch.compiler.is_compiling() or why_none(packed.device, packed.dtype) is None:
        return ops.linear(x, packed.values, packed.mask, packed.starts, bias)
    return F.linear(x, unpack(packed), bias)


@torch.no_grad()
def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed, in `out` or a new tensor."""
    if packed.device.type != "cpu" or ops.available(packed.dtype) is not None:
        return unpack_by_torch(packed, out)
    weight = packed.values.new_empty(packed.shape) if out is None else out
    return ops.restore(packed.values, packed.mask, packed.starts, weight)
