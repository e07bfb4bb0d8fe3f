"""Token perplexity: how well a model predicts the next token of a text.

Not lm-eval's `wikitext`, which is perplexity a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lors_cli.machine import processes

if TYPE_CHECKING:
    import torch

MAX_BATCH_LOGITS = 2**28
"""Logits that one forward pass may make, unless a single window has more (2^28 in float32: 1 GiB)."""
MAX_CHUNK_LOGITS = 2**26
"""Logits that are turned into float32 at once (256 MiB)."""


def token_perplexity(
    model: Any,
    windows: torch.Tensor,
    *,
    batch_size: int,
    on_progress: Callable[[int], object] = lambda windows: None,
) -> dict[str, Any]:
    """The exponential of the mean negative log-likelihood of every token given those before it in its window.

    Several processes deal out the batches, which are those of one process, and add up in its order.

    Args:
        windows: token ids (windows, sequence_length), int64, one of two tokens at least; the first token of a window is
            not predicted.
        batch_size: windows a forward pass, fewer where their logits would pass `MAX_BATCH_LOGITS`.
        on_progress: called with the number of windows that were scored since the last call.

    Returns:
        `value`, the perplexity; `tokens`, how many were predicted; `sequence_length`; `nll`, the mean in nats, and
        `window_nll`, that of each window. A broken model gives NaN or infinity.
    """
    import torch

    num_windows, sequence_length = windows.shape
    tokens = num_windows * (sequence_length - 1)
    vocabulary_size = model.get_output_embeddings().weight.shape[0]
    step = max(1, min(batch_size, MAX_BATCH_LOGITS // (sequence_length * vocabulary_size)))

    def score(batch: torch.Tensor) -> list[float]:
        inputs = batch.to(model.device)
        return summed_nll(model(input_ids=inputs, use_cache=False).logits[:, :-1], inputs[:, 1:])

    with torch.inference_mode():
        batches = processes.deal(windows.split(step), score, lambda batch: on_progress(len(batch)))
    sums = [nll for batch in batches for nll in batch]
    mean = sum(sums) / tokens
    value = math.exp(mean) if not mean > 700 else math.inf
    window_nll = [nll / (sequence_length - 1) for nll in sums]
    return {
        "value": value, "tokens": tokens, "sequence_length": sequence_length, "nll": mean, "window_nll": window_nll,
    }  # fmt: skip


def summed_nll(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Each row's negative log-likelihood of `targets` (rows, positions), in nats; float32, summed in float64."""
    from torch.nn.functional import cross_entropy

    rows = max(1, MAX_CHUNK_LOGITS // logits.shape[-1])
    sums = []
    for row_logits, row_targets in zip(logits, targets, strict=True):
        total = 0.0
        for start in range(0, len(row_targets), rows):
            part = row_logits[start : start + rows].float()
            losses = cross_entropy(part, row_targets[start : start + rows], reduction="none")
            total += float(losses.cpu().double().sum())
        sums.append(total)
    return sums
