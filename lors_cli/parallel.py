"""Several processes on one job, as torchrun starts them: who this one is, and what they tell each other.

Without torchrun every function here answers for a single process and does nothing else.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


PATIENCE = timedelta(days=1)
"""How long processes wait for one that solves, reads or writes alone."""


def num_processes() -> int:
    """How many processes share the job."""
    started_together = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if started_together else 1


def process_index() -> int:
    """This one's number, from 0."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def local_index() -> int:
    """This one's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0")) if num_processes() > 1 else 0


def num_local_processes() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_processes() > 1 else 1


def is_main() -> bool:
    """Whether this process writes results and speaks to the user."""
    return process_index() == 0


def start(device: torch.device) -> None:
    """Join the others: over NCCL on GPUs, over Gloo elsewhere.

    Args:
        device: where this process computes.
    """
    import torch.distributed as dist

    if num_processes() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the others."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `tensor`, in place."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def send_to_all(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Process `source`'s `tensor`, in place of everyone's."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, source)
    return tensor


def wait_for_all() -> None:
    """Go on once every process has come here."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.barrier()
