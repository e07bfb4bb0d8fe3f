"""Models two by two: the differences of their accuracies and perplexities, and whether they may be chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from lors_cli.evaluation.significance import (
    FRACTIONS_NOTE,
    MIN_FOR_INTERVAL,
    Comparison,
    TextComparison,
    interval_text,
    p_text,
)
from lors_cli.output.markdown import NONE, Block, table

_NOTE = (
    "Points of accuracy on the same documents. p is McNemar's exact test, in the last row over all documents; the "
    f"interval there (95 %, from {MIN_FOR_INTERVAL} documents a task on) is a paired bootstrap of the average over "
    "tasks. Of many p some are small by chance."
)


_TEXTS_NOTE = (
    "How much larger the perplexity is than the other model's, on the same windows of text. The interval (95 %, "
    f"from {MIN_FOR_INTERVAL} windows on) is a paired bootstrap over windows, p a permutation test's."
)


def differences(
    comparisons: Sequence[Comparison], texts_compared: Sequence[TextComparison],
    unpaired: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Block]:  # fmt: skip
    """Tables with a row a task or text and a column a pair, and how to read them; nothing without a pair.

    Args:
        unpaired: title to difference by task, of pairs that have not both the same documents' results.
    """
    return [*_of_tasks(comparisons, unpaired or {}), *_of_texts(texts_compared)]


def _of_tasks(pairs: Sequence[Comparison], plain: Mapping[str, Mapping[str, float]]) -> list[Block]:
    if not pairs and not plain:
        return []
    tasks = dict.fromkeys(
        [task for pair in pairs for task in pair.tasks] + [t for found in plain.values() for t in found]
    )
    rows = [
        [task, *(_of_task(pair, task) for pair in pairs), *(_plain(found.get(task)) for found in plain.values())]
        for task in tasks
    ]
    whole = [f"{100 * pair.difference:+.2f}{interval_text(pair)}, {p_text(pair.p_value)}" for pair in pairs]
    whole += [_plain(fmean(found.values())) for found in plain.values()]
    columns = ["task", *(f"{pair.first} − {pair.second}" for pair in pairs), *plain]
    return [table(columns, [*rows, ["average", *whole]]), " ".join(_notes(pairs, plain))]


def _of_texts(texts: Sequence[TextComparison]) -> list[Block]:
    if not texts:
        return []
    found = {(text.text, f"{text.first} − {text.second}"): text for text in texts}
    titles = dict.fromkeys(title for _, title in found)
    rows = [[name, *(_of_text(found.get((name, title))) for title in titles)]
            for name in dict.fromkeys(name for name, _ in found)]  # fmt: skip
    return [table(["perplexity", *titles], rows), _TEXTS_NOTE]


def _of_text(found: TextComparison | None) -> str:
    if found is None:
        return NONE
    return f"{100 * found.difference:+.2f} %{interval_text(found)}, {p_text(found.p_value)}"


def _notes(pairs: Sequence[Comparison], plain: Mapping[str, object]) -> Iterator[str]:
    if pairs:
        yield _NOTE
    if any(pair.test == "permutation" for pair in pairs):
        yield FRACTIONS_NOTE
    if plain:
        yield (
            "Points of accuracy. " * (not pairs) + "Without p: the two models' results of the same documents are not "
            "there, so that nothing can be said of chance; the average is of the tasks above."
        )


def _of_task(pair: Comparison, task: str) -> str:
    if task not in pair.tasks:
        return NONE
    return f"{100 * pair.tasks[task].difference:+.2f}, {p_text(pair.tasks[task].p_value)}"


def _plain(difference: float | None) -> str:
    return NONE if difference is None else f"{100 * difference:+.2f}"
