"""Samples of several sources, mixed by weight: which source a sample is of follows from its position alone.

A source's own samples come in an order of its own, shuffled anew in each pass over it. Nothing depends on the number of
processes, or on what was read before: a resumed run sees the samples of an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lors_cli.data.samples import Sample, TuneData
from lors_cli.data.stream.order import shuffled_block
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig


def dealt(weights: Sequence[float], number: int) -> list[int]:
    """For each of so many positions the source that it is of: the one that is furthest behind its weight.

    Every stretch has its shares to within a sample or two, and so has every optimiser step.

    Args:
        weights: they add up to 1.
    """
    counts = [0] * len(weights)
    found = []
    for position in range(1, number + 1):
        behind = [weight * position - count for weight, count in zip(weights, counts, strict=True)]
        source = behind.index(max(behind))
        counts[source] += 1
        found.append(source)
    return found


class Mixture(Sequence[Sample]):
    """The samples of a whole run over several sources, in the order in which they are trained on.

    Args:
        parts: the samples of each source: a list, which is shuffled here, or a stream for as many samples as it has.
        order: the source of each position.
        max_length: tokens of a stream's samples.
    """

    def __init__(self, parts: Sequence[Sequence[Sample]], order: Sequence[int], max_length: int, seed: int) -> None:
        self.parts, self.order, self.max_length, self.seed = parts, order, max_length, seed
        counts = [0] * len(parts)
        self._places: list[int] = []
        for source in order:
            self._places.append(counts[source])
            counts[source] += 1

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        source, place = self.located(range(len(self))[index])
        return self.parts[source][place]

    def located(self, position: int) -> tuple[int, int]:
        """The source of a position, and the index of its sample there."""
        source, place = self.order[position], self._places[position]
        part = self.parts[source]
        if isinstance(part, list):
            place = shuffled_block(place, seed=self.seed, buffer=len(part), num_blocks=len(part))
        return source, place

    def length(self, position: int) -> int:
        """Tokens of a sample; one of a stream is not read for that."""
        source, place = self.located(position)
        part = self.parts[source]
        return len(part[place]["input_ids"]) if isinstance(part, list) else self.max_length


def mixed_data(config: TuneConfig, load: Callable[[TuneConfig], TuneData]) -> TuneData:
    """What a run over several sources trains on.

    Args:
        load: gives what one source alone would be trained on.

    Raises:
        UsageError: a weight that comes to no sample, or what `load` raises.
    """
    assert config.max_steps is not None
    weights, sources = zip(*config.data.parts, strict=True)
    order = dealt(weights, config.max_steps * config.batch_size)
    counts = [order.count(source) for source in range(len(sources))]
    found: list[TuneData] = []

    def close() -> None:
        for part in found:
            part.close()

    try:
        for data, number, val_size in zip(sources, counts, _val_sizes(config, weights), strict=True):
            found.append(load(_alone(config, data, number, val_size)))
    except BaseException:
        close()
        raise
    samples = Mixture([part.samples for part in found], order, config.data.max_length, config.seed)
    reasons = dict.fromkeys(reason for part in found for reason in part.skipped)
    return TuneData(
        samples, sum(part.num_rows for part in found),
        {reason: sum(part.skipped.get(reason, 0) for part in found) for reason in reasons},
        sum(map(samples.length, range(len(samples)))), config.max_steps, close=close,
        origin={"mix": [_told(*part) for part in zip(sources, weights, counts, found, strict=True)]},
        held_out=_in_turn([part.held_out for part in found]),
    )  # fmt: skip


def _alone(config: TuneConfig, data: TuneDataConfig, num_samples: int, val_size: float | None) -> TuneConfig:
    """The settings of a run that takes so many samples of one of the sources, one a step."""
    if num_samples == 0:
        raise UsageError(
            f"data.mix: the weight of {data.dataset} is too low for a single one of {config.max_steps} steps with "
            f"{config.batch_size} samples each.",
            "Raise its weight or max_steps, or leave it out.",
        )
    return replace(config, data=data, max_steps=num_samples, batch_size=1, per_device_batch_size=None,
                   val_size=val_size, eval_steps=None, early_stopping_patience=None,
                   load_best_model_at_end=None)  # fmt: skip


def _val_sizes(config: TuneConfig, weights: Sequence[float]) -> list[float | None]:
    """What each source holds out: its share of a number of samples; a share below 1 is that of each."""
    if config.val_size is None or config.val_size < 1:
        return [config.val_size] * len(weights)
    order = dealt(weights, int(config.val_size))
    return [order.count(source) or None for source in range(len(weights))]


def _in_turn(parts: Sequence[Sequence[Sample]]) -> list[Sample]:
    """The samples of all parts, so that the first few have a share of each."""
    total = sum(map(len, parts))
    left = [iter(part) for part in parts]
    return [next(left[source]) for source in dealt([len(part) / max(total, 1) for part in parts], total)]


def _told(data: TuneDataConfig, weight: float, num_samples: int, found: TuneData) -> dict[str, Any]:
    """What a run records of one of its sources; how often it is passed over, unless no more of it was read."""
    is_whole = isinstance(found.samples, list) and len(found.samples) != num_samples
    passes = {"passes": round(num_samples / len(found.samples), 4)} if is_whole else {}
    return {"dataset": data.dataset, "weight": weight, "num_samples": num_samples, **passes, **found.origin}
