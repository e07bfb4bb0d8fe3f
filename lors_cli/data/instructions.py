"""Samples from instruction rows: prompt and response in a template, labels, whole samples packed into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lors_cli.data.prompts import TEMPLATES, Template, chat_prompts
from lors_cli.data.samples import EMPTY_OUTPUT, IGNORED, NO_LABEL, Sample, TuneData, isolated_sample
from lors_cli.data.sources import TextSource
from lors_cli.data.tokenising import BATCH_DOCUMENTS, begin_tokens, encode, eos_token_id
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import TuneDataConfig

Rows = list[dict[str, str]]
Parts = tuple[list[int], list[int], list[int]]
"""Tokens of the prompt, of the response, and those that end it."""


def instruction_samples(source: TextSource, config: TuneDataConfig, tokenizer: Any) -> TuneData:
    """Prompt and response of each row, in the source's order.

    Both are tokenised apart and then joined, so that no token spans the boundary and a prompt's tokens are the
    same whatever follows it. What ends the response is joined by its ids.

    Raises:
        UsageError: no usable row, or no such template or packing for it.
    """
    if config.packing == "concatenated":
        raise UsageError(
            f"data.packing: concatenated would let the instructions of {source.name} see one another.",
            "Choose isolated, or leave packing out.",
        )
    parts = (
        _chat_parts(tokenizer) if config.template == "chat" else _template_parts(TEMPLATES[config.template], tokenizer)
    )
    skipped = {EMPTY_OUTPUT: 0, NO_LABEL: 0}
    samples: list[Sample] = []
    num_rows = 0
    rows = source.rows()
    while len(samples) != config.num_samples and (batch := list(islice(rows, BATCH_DOCUMENTS))):
        for row, (prompt, response, end) in zip(batch, parts(batch), strict=True):
            if len(samples) == config.num_samples:
                break
            num_rows += 1
            if not row["output"].strip():
                skipped[EMPTY_OUTPUT] += 1
                continue
            sample = _sample(prompt, response, end, config)
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


def _sample(prompt: list[int], response: list[int], end: list[int], config: TuneDataConfig) -> Sample:
    """One sample, cut on the right; a response that was cut has no end."""
    ended = response if response[-len(end) :] == end else response + end
    labels = prompt if config.train_on_prompt else [IGNORED] * len(prompt)
    return {
        "input_ids": (prompt + ended)[: config.max_length],
        "labels": (labels + ended)[: config.max_length],
    }


def _template_parts(template: Template, tokenizer: Any) -> Callable[[Rows], list[Parts]]:
    begin, end = begin_tokens(tokenizer), [eos_token_id(tokenizer)]
    before = "" if template.before_response == " " and _puts_space_first(tokenizer) else template.before_response

    def parts(rows: Rows) -> list[Parts]:
        prompts = encode(tokenizer, [template.prompt(row["instruction"], row["input"]) for row in rows])
        responses = encode(tokenizer, [before + row["output"] for row in rows])
        return [(begin + prompt, response, end) for prompt, response in zip(prompts, responses, strict=True)]

    return parts


def _chat_parts(tokenizer: Any) -> Callable[[Rows], list[Parts]]:
    def parts(rows: Rows) -> list[Parts]:
        texts = chat_prompts(tokenizer, rows)
        prompts = encode(tokenizer, [before for before, _ in texts])
        responses = encode(tokenizer, [row["output"] for row in rows])
        ends = [ids or [eos_token_id(tokenizer)] for ids in encode(tokenizer, [after for _, after in texts])]
        return list(zip(prompts, responses, ends, strict=True))

    return parts


def _puts_space_first(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before every text by itself, as Llama 2's does."""
    (ids,) = encode(tokenizer, ["a"])
    return " " in tokenizer.decode(ids + ids)
