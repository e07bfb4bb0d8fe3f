"""`deterministic: true`: the same recipe on the same machine gives the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lors_cli.errors import UsageError, first_line

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Settings with which cuBLAS keeps one order of its sums; the first is the faster."""
REFUSAL = "does not have a deterministic implementation"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Have torch choose only operations that give the same bits each time, for as long as the context lasts.

    It must be entered before the first product on a GPU. TF32 and cuDNN's choice by trial are off too. Without
    `wanted` nothing changes.

    Raises:
        UsageError: an operation of the model has no such form on this device.
    """
    if not wanted:
        yield
        return
    import torch

    if os.environ.get(WORKSPACE) not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    filling: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32,
    )  # fmt: skip
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # costs time; nothing here reads memory that it has not written
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False, False
    try:
        yield
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        raise UsageError(
            f"deterministic: {first_line(error)}", "Set deterministic: false, or choose another device."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = before[2]
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[3:]
