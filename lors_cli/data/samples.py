"""What a model is tuned on: samples with labels, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Sample = dict[str, list[int]]
"""input_ids and labels of the same length; of isolated texts also position_ids, which start anew with each."""

IGNORED = -100
"""The label that the loss passes over."""
EMPTY_OUTPUT = "empty output"
NO_LABEL = "no label after truncation"


@dataclass(frozen=True)
class TuneData:
    """What a model is tuned on."""

    samples: Sequence[Sample]
    """Each with a label at index 1 or later; IGNORED where there is no label."""
    num_rows: int
    """Rows of the source that were used or skipped; for packed text the number of blocks."""
    skipped: dict[str, int]
    """Rows left out, by reason: EMPTY_OUTPUT, NO_LABEL."""
    num_tokens: int
    num_steps: int | None = None
    """Optimiser steps that the samples are for, where they are those of the whole run, in order."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What a run records of the source."""
    close: Callable[[], None] = lambda: None
    """Ends what goes on in the background."""
    held_out: Sequence[Sample] = ()
    """Samples that are not trained on."""

    def first_drawn(self, number: int, seed: int) -> list[int]:
        """Samples to look at before training: drawn at random, or the first of samples that are in order."""
        import torch

        if self.num_steps is not None:
            return list(range(min(number, len(self.samples))))
        return torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed))[:number].tolist()


def rounded_up(share: float, number: int) -> int:
    """A share of so many, or several times as many, as a whole number: 1.1 of 50 is 55, though the floats make more."""
    return math.ceil(round(share * number, 9))


class PadCollator:
    """Makes a batch of samples of different length.

    Padding goes by length, never by token: where the padding token is the end-of-sequence token, as in SmolLM2, a
    response's real end keeps its label and its attention.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The batch of samples; where one has position_ids, those without are one text each.

        Isolated texts go without attention_mask: transformers keeps texts apart by their positions where there is
        none. Padding then repeats the last position, so that each padding token is a text of its own.

        Returns:
            input_ids, labels, and attention_mask or position_ids, each (samples, longest sample) int64.
        """
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), longest)
        isolated = any("position_ids" in sample for sample in samples)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "position_ids" if isolated else "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = torch.tensor(sample["input_ids"])
            batch["labels"][row, :length] = torch.tensor(sample["labels"])
            if isolated:
                positions = sample.get("position_ids") or list(range(length))
                batch["position_ids"][row, :length] = torch.tensor(positions)
                batch["position_ids"][row, length:] = positions[-1]
            else:
                batch["attention_mask"][row, :length] = 1
        return batch


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch of `PadCollator`, its padding left out."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    positions = batch["position_ids"]
    repeats = (positions[:, 1:] == positions[:, :-1]).flip(1).long()
    return positions.numel() - int(repeats.cumprod(1).sum())


def isolated_sample(texts: Sequence[Sample]) -> Sample:
    """Texts as one sample in which none sees another: positions start anew, no text predicts the next one's start."""
    return {
        "input_ids": [token for text in texts for token in text["input_ids"]],
        "labels": [label for text in texts for label in (IGNORED, *text["labels"][1:])],
        "position_ids": [position for text in texts for position in range(len(text["input_ids"]))],
    }
