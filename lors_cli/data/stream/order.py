"""The order in which packed samples are trained on, as functions of seed and position alone.

They know nothing of workers, of what was read before, or (for the order itself) of the number of processes: so a
resumed run, and a run on more processes, sees the samples of an unbroken one.
"""

from __future__ import annotations

import random
from functools import lru_cache


def shuffled_block(position: int, *, seed: int, buffer: int, num_blocks: int | None) -> int:
    """The block that is trained on at a position.

    Blocks are shuffled within windows of `buffer` consecutive ones, each by a permutation of its own; a pass over all
    blocks is followed by another, shuffled anew.

    Args:
        position: of the sample in the whole run, from 0.
        num_blocks: that the source has; None while its end is not known, and then at least to the end of the
            position's window there must be blocks.
    """
    epoch, place = divmod(position, num_blocks) if num_blocks else (0, position)
    window, inside = divmod(place, buffer)
    first = window * buffer
    size = buffer if num_blocks is None else min(buffer, num_blocks - first)
    return first + _permutation(seed, epoch, window, size)[inside]


@lru_cache(maxsize=32)
def _permutation(seed: int, epoch: int, window: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed} {epoch} {window}").shuffle(order)
    return order
