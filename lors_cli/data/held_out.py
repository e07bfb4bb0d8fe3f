"""What is kept out of training, to measure the loss on.

The split follows from the data and `val_size` alone: it is the same for every method, rank and seed. Of rows, samples
are drawn at random; of text, its first documents are taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lors_cli.data.packing import block_sample
from lors_cli.data.samples import Sample, TuneData, rounded_up
from lors_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

SPLIT_SEED = 0


def num_held_out(val_size: float, num_samples: int) -> int:
    """Samples to hold out of so many, a share rounded up.

    Raises:
        UsageError: none would be left to train on.
    """
    number = rounded_up(val_size, num_samples) if val_size < 1 else int(val_size)
    if number >= num_samples:
        raise UsageError(
            f"val_size: {val_size:g} holds out {number} of {num_samples} samples and leaves none to train on.",
            "Lower val_size, or give more data.",
        )
    return number


def hold_out_samples(data: TuneData, val_size: float | None) -> TuneData:
    """The data with some of its samples held out, drawn at random, both parts in the order they had."""
    import torch

    if val_size is None:
        return data
    number = num_held_out(val_size, len(data.samples))
    order = torch.randperm(len(data.samples), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    kept = [data.samples[index] for index in sorted(order[number:])]
    held_out = [data.samples[index] for index in sorted(order[:number])]
    num_tokens = sum(len(sample["input_ids"]) for sample in kept)
    return replace(data, samples=kept, held_out=held_out, num_tokens=num_tokens)


def hold_out_blocks(
    blocks: torch.Tensor, starts: torch.Tensor, number: int, *, isolated: bool
) -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """The first of a text's blocks as samples, and what is left of it from the next document on, cut to blocks anew.

    A text that has no further document is gone on with where the held-out part ends.

    Args:
        blocks: (blocks, sequence_length) in the text's order, and in `starts` where documents start.
    """
    length = blocks.shape[1]
    pairs = zip(blocks[:number].numpy(), starts[:number].numpy(), strict=True)
    samples = [block_sample(tokens, marks if isolated else None) for tokens, marks in pairs]
    following = starts[number:].flatten().nonzero()
    first = number * length + (int(following[0]) if len(following) else 0)
    end = first + (blocks.numel() - first) // length * length
    left, marks = (part.flatten()[first:end].view(-1, length) for part in (blocks, starts))
    return samples, left, marks
