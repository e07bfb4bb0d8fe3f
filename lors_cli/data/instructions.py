"""Samples from instruction rows: prompt and response in a template, labels, whole samples packed into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from lors_cli.data.prompts import ChatTemplate, Rendered, template_text, turns_of
from lors_cli.data.samples import EMPTY_OUTPUT, IGNORED, NO_LABEL, Sample, TuneData, isolated_sample
from lors_cli.data.sources import TextSource
from lors_cli.data.tokenising import BATCH_DOCUMENTS, begin_tokens, eos_token_id, offset_encoder
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig

Made = TypeVar("Made")


def instruction_samples(source: TextSource, config: TuneDataConfig, tokenizer: Any) -> TuneData:
    """Prompt and response of each row, in the source's order.

    The whole text is tokenised at once and cut at the boundaries; a token with any character of an answer is learnt,
    so one that spans prompt and answer is too.

    Raises:
        UsageError: no usable row, or one that does not fit the template.
    """
    render = _renderer(config.template, tokenizer)
    encoder = offset_encoder(tokenizer)
    skipped = {EMPTY_OUTPUT: 0, NO_LABEL: 0}
    samples: list[Sample] = []
    num_rows = 0
    rows = source.rows()
    while len(samples) != config.num_samples and (batch := list(islice(rows, BATCH_DOCUMENTS))):
        texts = [
            rendered(row, render, f"{source.name}, row {number}") for number, row in enumerate(batch, num_rows + 1)
        ]
        encodings = iter(encoder([text.text for text in texts if text is not None]))
        for text in texts:
            if len(samples) == config.num_samples:
                break
            num_rows += 1
            if text is None:
                skipped[EMPTY_OUTPUT] += 1
                continue
            sample = _sample(text, *next(encodings), config)
            if any(label != IGNORED for label in sample["labels"][1:]):
                samples.append(sample)
            else:
                skipped[NO_LABEL] += 1
    if not samples:
        counts = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
        raise UsageError(
            f"{source.name} has no usable row among {num_rows}: {counts}.",
            f"Raise max_length ({config.max_length} tokens) or give other rows.",
        )
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    if config.packing == "isolated":
        packs = first_fit([len(sample["input_ids"]) for sample in samples], config.max_length)
        samples = [isolated_sample([samples[index] for index in pack]) for pack in packs]
    return TuneData(samples, num_rows, skipped, num_tokens)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items, none of them longer than `capacity`, in bins: each goes into the first bin that still has room for it.

    Returns:
        Indices of the items of each bin.
    """
    width = 1
    while width < len(lengths):
        width *= 2
    room = [capacity] * (2 * width)  # a tree: the largest room below each node, bins at room[width:]
    bins: list[list[int]] = []
    for index, length in enumerate(lengths):
        node = 1
        while node < width:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        place = node - width
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def rendered(row: dict[str, Any], render: Callable[[dict[str, Any]], Made], place: str) -> Made | None:
    """What `render` makes of a row, None when all its answers are empty.

    Raises:
        UsageError: the row does not fit; the message names its place.
    """
    if not any(turn.learnt and turn.content.strip() for turn in turns_of(row)):
        return None
    try:
        return render(row)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", error.hint) from error


def _renderer(template: str, tokenizer: Any) -> Callable[[dict[str, Any]], Rendered]:
    eos = eos_token_id(tokenizer)
    if template == "chat":
        chat = ChatTemplate(tokenizer, eos)
        return lambda row: chat.render(turns_of(row))
    begin = begin_tokens(tokenizer)

    def render(row: dict[str, Any]) -> Rendered:
        text, boundary = template_text(template, row)
        return Rendered(text, [(boundary, len(text), len(text))], begin, [eos])

    return render


def _sample(text: Rendered, ids: list[int], offsets: list[tuple[int, int]], config: TuneDataConfig) -> Sample:
    """One sample, cut on the right; a response that was cut has no end.

    A token that reaches out of an answer is learnt, one that reaches out of what ends it begins the next turn.
    """
    is_learnt = [
        any(
            (start < answer or end <= stop) and start < stop and (end > first or start >= first)
            for first, answer, stop in text.spans
        )
        for start, end in offsets
    ]
    end = [] if ids[-len(text.end) :] == text.end else text.end
    tokens = [*text.begin, *ids, *end]
    learnt = [*(False for _ in text.begin), *is_learnt, *(True for _ in end)]
    labels = [token if keep or config.train_on_prompt else IGNORED for token, keep in zip(tokens, learnt, strict=True)]
    return {"input_ids": tokens[: config.max_length], "labels": labels[: config.max_length]}
