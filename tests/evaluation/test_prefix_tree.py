"""Prefix trees hold every sequence, see what it would see, and stay within their limits."""

from __future__ import annotations

from collections.abc import Callable

from lors_cli.evaluation.prefix_tree import ROW_TOKENS, Choice, build_rows, make_batches

Questions = Callable[..., list[Choice]]


def test_rows_are_prefix_trees(questions: Questions) -> None:
    choices = questions(seed=3, contexts=25, longest=200)
    rows = build_rows(choices, max_tokens=700)
    numbers = sorted(number for row in rows for number, _ in row.reads)
    assert numbers == list(range(len(choices)))
    for row in rows:
        mask = row.mask()
        assert row.positions == [int(seen.sum()) - 1 for seen in mask]
        for number, nodes in row.reads:
            choice = choices[number]
            path = mask[nodes[-1]].nonzero().squeeze(1).tolist()  # what the last node sees
            assert [row.tokens[node] for node in path] == list(choice.tokens)
            assert path[-len(choice.targets) :] == nodes
    shared = sum(len(row.tokens) for row in rows)
    assert shared < 0.5 * sum(len(choice.tokens) for choice in choices)


def test_limits_of_a_row(questions: Questions) -> None:
    choices = questions(seed=4, contexts=6, longest=100)
    longest = max(len(choice.tokens) for choice in choices)
    for row in build_rows(choices, max_tokens=longest):
        assert len(row.tokens) <= longest
    assert not any(row.branches for row in build_rows(choices, max_tokens=900, branches=False))
    for row in build_rows(choices, max_tokens=900, window=40):
        assert not row.branches or max(row.positions) < 40
    apart = [Choice([1, 2, 3, number], [4], 0) for number in range(5)]  # three tokens in common are not worth a row
    assert len(build_rows(apart, max_tokens=900)) == 5
    many = [Choice([*range(3, 20), number], [1, 2], 0) for number in range(2000)]
    assert max(len(row.tokens) for row in build_rows(many, max_tokens=10**6)) <= ROW_TOKENS


def test_batches_are_sorted_and_within_the_budget(questions: Questions) -> None:
    rows = build_rows(questions(seed=5, contexts=40), max_tokens=300)
    batches = list(make_batches(rows, 300))
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    for batch in batches:
        lengths = [len(row.tokens) for row in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert len(batch) * lengths[0] <= 300
        assert len({row.branches for row in batch}) == 1
