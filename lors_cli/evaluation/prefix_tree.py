"""Token sequences as prefix trees: what they have in common is in a batch once.

A tree is one row of a batch: every node is a token, its position is its depth, and it attends to its ancestors
alone. So each sequence sees what it would see in a row of its own, and a question with four choices costs one context
and four continuations instead of four of both.

Source: SpecInfer §4.2 (tree attention), arXiv:2305.09781.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

MIN_SHARED = 8
"""Tokens that two sequences must have in common to be put into one row."""
ROW_TOKENS = 1024
"""A row with branches has at most so many tokens, or twice its longest sequence: attention is quadratic in them."""


@dataclass(frozen=True)
class Choice:
    """A continuation to score."""

    tokens: Sequence[int]
    """What the model reads: the context and the continuation without its last token."""
    targets: Sequence[int]
    """The continuation; the last len(targets) tokens predict it."""
    document: Hashable = None
    """Choices of the same document may share a row."""


@dataclass
class Row:
    """The prefix tree of several token sequences."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """First node, end, and parent of the first (-1: none) of each run of nodes that follow one another."""
    reads: list[tuple[int, list[int]]] = field(default_factory=list)
    """Number of a choice and the nodes that predict its targets."""

    @property
    def branches(self) -> bool:
        """Whether some token does not follow the one before it."""
        return any(parent != first - 1 for first, _, parent in self.segments)

    def extend(self, path: list[int], tokens: Sequence[int]) -> list[int]:
        """Add what `tokens` has beyond the nodes of `path`; the nodes of the whole sequence."""
        first, depth = len(self.tokens), len(path)
        new = tokens[depth:]
        if new:
            self.segments.append((first, first + len(new), path[-1] if path else -1))
            self.tokens += new
            self.positions += range(depth, len(tokens))
        return path + list(range(first, len(self.tokens)))

    def mask(self) -> torch.Tensor:
        """Which nodes (rows) see which (columns): themselves and their ancestors; bool (nodes, nodes)."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for first, end, parent in self.segments:
            if parent >= 0:
                seen[first:end] = seen[parent]
            seen[first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
        return seen


def build_rows(
    choices: Sequence[Choice], *, max_tokens: int, branches: bool = True, window: int | None = None
) -> list[Row]:
    """Rows that hold every choice; equal sequences and prefixes of one another are always computed once.

    Args:
        max_tokens: a row with branches is no longer than this.
        window: a document with a longer sequence gets rows without any.
    """
    documents: dict[Hashable, list[int]] = {}
    for number, choice in enumerate(choices):
        documents.setdefault(choice.document, []).append(number)
    rows: list[Row] = []
    for numbers in documents.values():
        longest = max(len(choices[number].tokens) for number in numbers)
        may_branch = branches and (window is None or longest <= window)
        limit = min(max_tokens, max(ROW_TOKENS, 2 * longest))
        path: list[int] = []
        before: Sequence[int] = ()
        for number in sorted(numbers, key=lambda number: tuple(choices[number].tokens)):
            choice = choices[number]
            shared = _common(before, choice.tokens)
            if not before or (shared < len(before) and not (
                may_branch and shared >= MIN_SHARED and len(rows[-1].tokens) + len(choice.tokens) - shared <= limit
            )):  # fmt: skip
                rows.append(Row())
                shared = 0
            path = rows[-1].extend(path[:shared], choice.tokens)
            rows[-1].reads.append((number, path[len(path) - len(choice.targets) :]))
            before = choice.tokens
    return rows


def _common(some: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    apart = (number for number, (one, two) in enumerate(zip(some, other, strict=False)) if one != two)
    return next(apart, min(len(some), len(other)))


def make_batches(rows: Iterable[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows by length, the longest first, those with branches apart; padded, a batch has at most `max_tokens` tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.branches, -len(row.tokens))):
        longest = len(batch[0].tokens) if batch else 0
        if batch and ((len(batch) + 1) * longest > max_tokens or row.branches != batch[0].branches):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
