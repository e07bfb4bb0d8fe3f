"""Memory for one merged weight at a time, shared by all layers."""

from __future__ import annotations

import threading
from typing import Any

import torch

_scratch: dict[tuple[Any, ...], torch.Tensor] = {}


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device, *, use: str = "merged") -> torch.Tensor:
    """A tensor of memory that all layers share; whatever it held is overwritten by the next one that asks.

    Work on a CUDA stream is in order, so each stream has one buffer, elsewhere each thread has; and each `use`.
    """
    owner: Any = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    key = (device, dtype, owner, use)
    buffer = _scratch.get(key)
    if buffer is None or buffer.numel() < shape.numel():
        _scratch.pop(key, None)
        del buffer
        with torch.inference_mode(False):
            buffer = _scratch[key] = torch.empty(shape.numel(), dtype=dtype, device=device)
    return buffer[: shape.numel()].view(shape)


def scratch_memory() -> list[torch.Tensor]:
    """The shared buffers that there are now."""
    return list(_scratch.values())


def free_scratch() -> None:
    """Give the shared memory back; the next merge takes it anew."""
    _scratch.clear()
