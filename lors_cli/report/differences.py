"""Models two by two: the differences of their accuracies and perplexities, and whether they may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from lors_cli.evaluation.significance import (
    FRACTIONS_NOTE,
    MIN_FOR_INTERVAL,
    Comparison,
    TextComparison,
    p_text,
)
from lors_cli.output.markdown import NONE, Block, escape, table

_NOTE = (
    "p is McNemar's exact test on the same documents, in the last row over all of them; the interval there (95 %, from "
    f"{MIN_FOR_INTERVAL} documents a task on) is a paired bootstrap of the average over tasks. Of many p some are "
    "small by chance."
)
_TEXTS_NOTE = (
    f"The interval (95 %, from {MIN_FOR_INTERVAL} windows on) is a paired bootstrap over the same windows of text, p a "
    "permutation test's."
)
_WITHOUT_P = "Without p: the two models' results of the same {} are not there, so that nothing can be said of chance."

Plain = Mapping[str, Mapping[str, float]]
"""Title of a pair to its differences by task or text, of all that both models have a number of."""
Columns = Mapping[str, Mapping[str, str]]
"""Title of a pair to its cells by task or text."""


def differences(
    comparisons: Sequence[Comparison], texts_compared: Sequence[TextComparison], plain: Plain | None = None,
    plain_texts: Plain | None = None,
) -> list[Block]:  # fmt: skip
    """Tables with a row a task or text and a column a pair, and how to read them; nothing without a pair.

    What is in `plain` and `plain_texts` alone has no p.
    """
    return [*_of_tasks(comparisons, plain or {}), *_of_texts(texts_compared, plain_texts or {})]


def _of_tasks(pairs: Sequence[Comparison], plain: Plain) -> list[Block]:
    compared = {pair.title: pair for pair in pairs}
    cells = {title: {task: f"{100 * found.difference:+.2f}, {p_text(found.p_value)}"
                     for task, found in pair.tasks.items()} for title, pair in compared.items()}  # fmt: skip
    columns = _columns(plain, "{:+.2f}", cells)
    if not columns:
        return []
    notes = ["Points of accuracy."]
    if pairs:
        notes.append(_NOTE)
    if any(pair.test == "permutation" for pair in pairs):
        notes.append(FRACTIONS_NOTE)
    if columns != cells:
        notes.append(_WITHOUT_P.format("documents"))
    rows, last = _rows(columns), ["average"]
    for title in columns:
        pair = compared.get(title)
        values = {task: found.difference for task, found in pair.tasks.items()} if pair else plain[title]
        last.append(f"{100 * fmean(values.values()):+.2f}"
                    + (f"{pair.interval()}, {p_text(pair.p_value)}" if pair else ""))  # fmt: skip
        if len(values) < len(rows):
            notes.append(escape(f"The average of {title} is of {', '.join(values)}."))
    return [table(["task", *columns], [*rows, last]), " ".join(notes)]


def _of_texts(texts: Sequence[TextComparison], plain: Plain) -> list[Block]:
    cells: dict[str, dict[str, str]] = {}
    for found in texts:
        text = f"{100 * found.difference:+.2f} %{found.interval()}, {p_text(found.p_value)}"
        cells.setdefault(found.title, {})[found.text] = text
    columns = _columns(plain, "{:+.2f} %", cells)
    if not columns:
        return []
    notes = ["How much larger the perplexity is than the other model's."]
    if texts:
        notes.append(_TEXTS_NOTE)
    if columns != cells:
        notes.append(_WITHOUT_P.format("windows"))
    return [table(["perplexity", *columns], _rows(columns)), " ".join(notes)]


def _columns(plain: Plain, form: str, compared: Columns) -> Columns:
    """The cells that were compared, and in `form` what else is plain; no empty column."""
    found = {
        title: {name: form.format(100 * value) for name, value in plain.get(title, {}).items()}
        | dict(compared.get(title, {}))
        for title in {**plain, **compared}
    }
    return {title: cells for title, cells in found.items() if cells}


def _rows(columns: Columns) -> list[list[str]]:
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    return [[name, *(cells.get(name, NONE) for cells in columns.values())] for name in names]
