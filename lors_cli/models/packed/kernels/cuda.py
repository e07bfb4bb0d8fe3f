"""Products with packed weights on CUDA, and why there are none; imported without Triton too."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from lors_cli.models.packed.format import Packed, unpack


@cache
def why_no_cuda_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why our CUDA kernels cannot compute with such weights, empty when they can."""
    if device.type != "cuda":
        return f"it is for CUDA, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not know {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed"
    return ""


def linear_on_cuda(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y = X·Wᵀ + bias: of at most 8 tokens from the packed weight itself, of more by unpacking it, as for gradients.

    Args:
        x: (…, C) in the weight's dtype, on a device where `why_no_cuda_kernel` is empty.
    """
    from lors_cli.models.packed.kernels.triton_linear import MAX_TOKENS, packed_linear_cuda, unpack_cuda

    tokens = x.reshape(-1, x.shape[-1])
    traced = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if 0 < len(tokens) <= MAX_TOKENS and not traced:
        return packed_linear_cuda(tokens, packed, bias).view(*x.shape[:-1], packed.shape[0])
    return F.linear(x, unpack_cuda(packed), bias)


def unpacked(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (R, C) that was packed: by one kernel where there is one, else by torch's operations."""
    if why_no_cuda_kernel(packed.device, packed.dtype):
        return unpack(packed, out)
    from lors_cli.models.packed.kernels.triton_linear import unpack_cuda

    return unpack_cuda(packed, out)
