"""Which samples an optimiser step takes, and which of them this process: functions of seed, step and place alone.

So a resumed run, and a run on more processes, sees the samples of an unbroken one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

from lors_cli.data.mixture import Mixture
from lors_cli.data.samples import IGNORED, Sample

BLANK = -1
"""The index of a sample without labels, which fills a step that has too few for all processes."""


def place_in_epoch(step: int, num_samples: int, batch_size: int) -> tuple[int, int]:
    """The epoch of a step, and how many steps it has before it; the last of an epoch may have fewer samples."""
    return divmod(step, math.ceil(num_samples / batch_size))


def step_samples(samples: Sequence[Sample], step: int, *, batch_size: int, seed: int) -> list[int]:
    """The samples of a step (from 0), over all processes.

    Samples in memory are shuffled anew in each epoch; a stream and a mixture are in order. Those of a step come longest
    first, but for a stream's, which are alike: its micro-batches then hold samples of like length, at less padding.
    """
    epoch, place = place_in_epoch(step, len(samples), batch_size)
    chosen = range(len(samples))[place * batch_size : (place + 1) * batch_size]
    if isinstance(samples, Mixture):
        return sorted(chosen, key=lambda index: -samples.length(index))
    if not isinstance(samples, list):
        return list(chosen)
    order = _shuffled(len(samples), seed, epoch)
    return sorted((order[index] for index in chosen), key=lambda index: -len(samples[index]["input_ids"]))


@lru_cache(maxsize=1)
def _shuffled(num_samples: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_samples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def micro_batches(chosen: list[int], size: int, rank: int, num_processes: int) -> list[list[int]]:
    """The micro-batches, of at most `size` samples, that one of several processes takes of a step's samples.

    They are dealt out in turn, so that all processes meet samples of like length at a time; a step with too few samples
    for that (the last of an epoch) is filled up with blanks.
    """
    if num_processes > 1:
        chosen = chosen + [BLANK] * (-len(chosen) % (size * num_processes))
    return [chosen[first : first + size] for first in range(rank * size, len(chosen), size * num_processes)]


def sample_at(samples: Sequence[Sample], index: int) -> Sample:
    """A sample, and at `BLANK` one that has no label."""
    if index != BLANK:
        return samples[index]
    first = samples[0]
    blank = {"input_ids": first["input_ids"][:1], "labels": [IGNORED]}
    return {**blank, "position_ids": [0]} if "position_ids" in first else blank


def epochs_after(step: int, num_samples: int, *, batch_size: int, turn_size: int) -> float:
    """Passes over the data after so many steps, counted in turns of `turn_size` samples: a micro-batch a process."""
    epoch, place = place_in_epoch(step - 1, num_samples, batch_size)
    turns = math.ceil(num_samples / turn_size)
    return epoch + min((place + 1) * (batch_size // turn_size), turns) / turns
