"""Merged weights kept from one micro-batch to the next, where memory allows."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.machine.memory import available_memory
from lors_cli.models.packed.format import Packed
from lors_cli.output import console
from lors_cli.tuning.kernels.masked_merge import masked_merge
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.kernels.scratch import scratch

Keep = Literal["never", "recompute", "always"]
SHARE_OF_FREE = 0.25
"""All merged weights are kept where they take at most this share of the free memory; activations need the rest."""


class MergedCache:
    """A layer's merged weight, kept while its adapters are unchanged.

    Whether they changed is seen from their version counters, which every in-place operation of torch moves
    (an optimiser's too); writing through `.data` or NumPy does not, and needs `drop()`.

    Args:
        keep: `always` holds it until the adapters change; `recompute` only from the forward pass that a checkpointed
            block repeats during backward to the backward of the same layer; `never` holds nothing.
    """

    def __init__(self, keep: Keep = "never") -> None:
        self.keep = keep
        self._key: tuple[Any, ...] | None = None
        self._merged: torch.Tensor | None = None

    def drop(self) -> None:
        """Forget what is held."""
        self._key = self._merged = None

    def merged(
        self,
        weight: torch.Tensor | Packed,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
        *,
        last_use: bool,
        rounding: Rounding = "nearest",
        grid: Grid | None = None,
    ) -> torch.Tensor:
        """W_t in `dtype`, to be used before any other layer's is asked for; `last_use`: this is the backward pass."""
        base = weight.values if isinstance(weight, Packed) else weight
        on_grid = grid is not None and grid.scales.data_ptr()
        key = (dtype, scale, rounding, on_grid, *((part.data_ptr(), part._version) for part in (base, lora_A, lora_B)))
        if self._merged is not None and self._key == key:
            found = self._merged
            if last_use and self.keep == "recompute":
                self.drop()
            return found
        self.drop()
        # a forward pass within a backward pass is a checkpointed block's second one
        in_backward = torch._C._current_graph_task_id() != -1
        if self.keep == "always" or (self.keep == "recompute" and not last_use and in_backward):
            kept = base.new_empty(weight.shape, dtype=dtype)
            self._merged = masked_merge(weight, lora_A, lora_B, scale, rounding=rounding, grid=grid, out=kept)
            self._key = key
            return self._merged
        shared = scratch(weight.shape, dtype, weight.device)
        return masked_merge(weight, lora_A, lora_B, scale, rounding=rounding, grid=grid, out=shared)


def cache_policy(
    num_bytes: int, device: torch.device, wanted: Literal["auto", "off", "on"], *, checkpointing: bool
) -> tuple[Keep, str]:
    """How long merged weights of `num_bytes` in all are to be kept, and the reason in words.

    `wanted` is `tune.merged_cache`; with `checkpointing` blocks are computed again in backward.
    """
    if wanted == "off":
        return "never", "built anew for every use (merged_cache: off)"
    if wanted == "on":
        return "always", f"kept until the adapters change, {console.gib(num_bytes)} (merged_cache: on)"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory() // processes.num_local_processes()
    sizes = f"{console.gib(num_bytes)} of {console.gib(free)} free"
    if num_bytes <= SHARE_OF_FREE * free:
        return "always", f"kept until the adapters change ({sizes})"
    if checkpointing:
        return "recompute", f"kept for a block at a time, too large to keep them all ({sizes})"
    return "never", f"built anew for every use, too large to keep ({sizes})"
