"""Whether a model keeps the texts of one sequence apart when their positions say so."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lors_cli.errors import UsageError

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Difference of logits over their spread that is rounding; 0.05 for half-precision dtypes."""


def refuse_mixing(model: PreTrainedModel) -> None:
    """Refuse isolated packing where the model's texts would see one another."""
    obstacle = why_mixed(model)
    if obstacle:
        raise UsageError(
            f"data.packing: isolated cannot be had with {type(model).__name__}: {obstacle}.",
            "Leave packing out: text is then concatenated, and instructions go one a sample.",
        )


@torch.no_grad()
def why_mixed(model: PreTrainedModel) -> str:
    """Why texts of one sequence are not kept apart in this model, in evaluation mode; empty if they are.

    It is tried, on two rows of random tokens: the second text's logits must be those it has alone, whatever the first
    text is. transformers keeps texts apart by positions that start anew, where there is no attention mask.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    before, other, text = (torch.randint(vocabulary, (2, length), generator=generator) for length in (5, 5, 8))
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)

    def logits(ids: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        moved = {name: value.to(model.device) for name, value in {"input_ids": ids, **options}.items()}
        return model(**moved, use_cache=False).logits[:, -text.shape[1] :].float()

    alone = logits(text)
    try:
        first, second = (logits(torch.cat([start, text], 1), position_ids=positions) for start in (before, other))
    except TypeError:
        return "it takes no position_ids"
    limit = TOLERANCE.get(model.dtype, 0.05) * float(alone.std())
    if float((first - second).abs().max()) > limit:
        return "its attention does not end where positions start anew"
    if float((first - alone).abs().max()) > limit:
        return "its positions do not start anew"
    return ""
