"""Whether two models that were scored on the same documents or windows of text differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from lors_cli.evaluation.samples import read_accuracies, read_windows

ROUNDS = 10_000
SEED = 0
CONFIDENCE = 0.95
MIN_FOR_INTERVAL = 10
"""Documents of a task, windows of a text: of fewer a bootstrap interval is far too narrow (of 2 it covers a half)."""
_ROLE_PAIRS = (("tuned", "pruned"), ("pruned", "dense"), ("tuned", "dense"))

_MAX_DRAWN = 2**22
"""Numbers that are drawn at once (32 MiB)."""
FRACTIONS_NOTE = (
    "Where scores of a task are neither 0 nor 1, its p, and that of the last row, is a permutation test's: the sign of "
    "each document's difference drawn anew."
)

Scores = Mapping[Any, float]
"""Document of a task to its accuracy (0 or 1, of some tasks a fraction), or window of a text to its mean negative
log-likelihood in nats; what they are known by is the same where both models were given the same."""


@dataclass(frozen=True)
class TaskComparison:
    """Two models on one task."""

    num_documents: int
    difference: float
    """Of the accuracies, 1 is all."""
    better: int
    """Documents that the first model has right and the second has not; of fractions, has more of."""
    worse: int
    """The reverse."""
    p_value: float
    test: str
    """“McNemar” where every score is 0 or 1, else “permutation”."""


@dataclass(frozen=True)
class Pair:
    """Two models, and how sure their difference is."""

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    """Its 95 % interval; None where a task or text has fewer than `MIN_FOR_INTERVAL` documents or windows."""
    p_value: float

    @property
    def title(self) -> str:
        """What is subtracted from what."""
        return pair_title(self.first, self.second)

    def interval(self, name: str = "") -> str:
        """` (-0.20 … +2.20)`, with a `name` in front; nothing where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f" ({name}{100 * self.low:+.2f} … {100 * self.high:+.2f})"


@dataclass(frozen=True)
class Comparison(Pair):
    """Two models on all tasks: first minus second, of the unweighted mean accuracy over the tasks; 1 is all.

    p is McNemar's, all documents of all tasks together, so that a large task counts for more than a small one.
    """

    test: str
    """“permutation” as soon as that of one task is: then p is that of `difference`."""
    tasks: dict[str, TaskComparison]

    def __str__(self) -> str:
        return (
            f"{self.title}: {100 * self.difference:+.2f} points{self.interval('95 % ')}, "
            f"{self.test} {p_text(self.p_value)}"
        )


@dataclass(frozen=True)
class TextComparison(Pair):
    """Two models on one text: the first one's perplexity as a share of the second one's, minus 1.

    p is a permutation test's.
    """

    text: str
    num_windows: int

    def __str__(self) -> str:
        return (
            f"{self.title}: perplexity of {self.text} {100 * self.difference:+.2f} %{self.interval('95 % ')}, "
            f"permutation {p_text(self.p_value)}"
        )


class Compared(TypedDict):
    """The models of an evaluation two by two."""

    comparisons: list[Comparison]
    texts_compared: list[TextComparison]


def p_text(p_value: float) -> str:
    """`p = 0.02`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def pair_title(first: str, second: str) -> str:
    """`tuned − pruned`."""
    return f"{first} − {second}"


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of McNemar's test: of equal models, a coin's toss tells which has a document right.

    `better` counts the documents that only the first model has right, `worse` those that only the second has.

    Source: McNemar 1947, doi:10.1007/BF02295996; the exact form is the sign test.
    """
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_interval(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean over tasks of the mean difference, documents drawn anew within each task.

    Args:
        differences: of each task, the two models' difference on each document.

    Source: paired bootstrap, Efron & Tibshirani 1993, §13.3.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    means = np.zeros(ROUNDS)
    for task in differences:
        # Documents with the same difference are alike: only how many of each kind are drawn matters.
        values, counts = np.unique(np.asarray(task, dtype=np.float64), return_counts=True)
        for part in _parts(len(values)):
            drawn = generator.multinomial(len(task), counts / len(task), size=len(means[part]))
            means[part] += drawn @ values / len(task) / len(differences)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def permutation_test(differences: Sequence[Sequence[float]]) -> float:
    """Two-sided p-value of the mean over tasks of the mean difference: of equal models, either has the larger score.

    For scores of 0 and 1 in one task it is McNemar's test, up to chance.

    Args:
        differences: of each task, the two models' difference on each document.

    Source: paired randomisation test, Efron & Tibshirani 1993, §15; p as in Phipson & Smyth 2010, arXiv:1603.05766.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    found, means = 0.0, np.zeros(ROUNDS)
    for task in differences:
        sizes, counts = np.unique(np.abs(np.asarray(task, dtype=np.float64)), return_counts=True)
        found += float(np.sum(task)) / len(task)
        for part in _parts(len(sizes)):
            positive = generator.binomial(counts, 0.5, size=(len(means[part]), len(sizes)))
            means[part] += (2 * positive - counts) @ sizes / len(task)
    as_far = np.abs(means) >= abs(found) - 1e-9  # the same mean in another order of summation
    return float((1 + np.count_nonzero(as_far)) / (ROUNDS + 1))


def _parts(width: int) -> Iterator[slice]:
    """All rounds, as many at a time as draw no more than `_MAX_DRAWN` numbers of `width` a round."""
    step = max(1, _MAX_DRAWN // width)
    return (slice(first, min(first + step, ROUNDS)) for first in range(0, ROUNDS, step))


def compare(first: str, second: str, some: Mapping[str, Scores], other: Mapping[str, Scores]) -> Comparison | None:
    """The first model against the second, by their accuracies by task and document.

    Returns:
        None where there is no task, or the tasks or their documents are not the same.
    """
    if not some or {task: set(found) for task, found in some.items()} != {
        task: set(found) for task, found in other.items()
    }:
        return None
    tasks, differences = {}, []
    for task, found in some.items():
        apart = [found[document] - other[task][document] for document in sorted(found)]
        better, worse = sum(value > 0 for value in apart), sum(value < 0 for value in apart)
        whole = {*found.values(), *other[task].values()} <= {0, 1}
        tested = _test(better, worse, [apart], whole)
        tasks[task] = TaskComparison(len(apart), sum(apart) / len(apart), better, worse, *tested)
        differences.append(apart)
    better, worse = sum(task.better for task in tasks.values()), sum(task.worse for task in tasks.values())
    tested = _test(better, worse, differences, all(task.test == "McNemar" for task in tasks.values()))
    difference = sum(task.difference for task in tasks.values()) / len(tasks)
    low, high = _interval(differences)
    return Comparison(first, second, difference, low, high, *tested, tasks)


def compare_texts(
    first: str, second: str, some: Mapping[str, Scores], other: Mapping[str, Scores]
) -> list[TextComparison]:
    """The first model against the second, by their losses by text and window.

    Returns:
        A comparison a text that both were scored on the same windows of; none of perplexities past all numbers.
    """
    found = []
    for text, losses in some.items():
        if losses.keys() != other.get(text, {}).keys():
            continue
        apart = [[losses[window] - other[text][window] for window in sorted(losses)]]
        try:
            ratio = math.expm1(fmean(apart[0]))
            low, high = (None if end is None else math.expm1(end) for end in _interval(apart))
        except OverflowError:
            continue
        found.append(TextComparison(first, second, ratio, low, high, permutation_test(apart), text, len(losses)))
    return found


def _interval(differences: Sequence[Sequence[float]]) -> tuple[float, float] | tuple[None, None]:
    """`bootstrap_interval` where there are enough documents or windows."""
    return bootstrap_interval(differences) if min(map(len, differences)) >= MIN_FOR_INTERVAL else (None, None)


def _test(better: int, worse: int, differences: Sequence[Sequence[float]], whole: bool) -> tuple[float, str]:
    """The p-value and the test's name; `whole` scores are 0 or 1."""
    return (mcnemar(better, worse), "McNemar") if whole else (permutation_test(differences), "permutation")


def compare_models(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> Compared:
    """The models of an evaluation two by two, on the tasks that their averages are of and the texts of perplexities.

    `folder` is the stage's, with `samples/`; `results` are as `evaluate` returns them.

    Returns:
        Tuned against pruned, pruned against dense, tuned against dense, as far as they are there; models of other
        names each against the first. A pair whose documents' or windows' results are not there is left out.
    """
    read = {label: read_accuracies(folder, label, result) for label, result in results.items()}
    accuracies = {label: found if len(found) == len(results[label]["average"]["tasks"]) else {}
                  for label, found in read.items()}  # fmt: skip
    windows = {label: read_windows(folder, label, result) for label, result in results.items()}
    pairs = _pairs(results)
    found = [compare(*pair, accuracies[pair[0]], accuracies[pair[1]]) for pair in pairs]
    texts = [text for pair in pairs for text in compare_texts(*pair, windows[pair[0]], windows[pair[1]])]
    return {"comparisons": [each for each in found if each is not None], "texts_compared": texts}


def _pairs(results: Mapping[str, object]) -> list[tuple[str, str]]:
    """The labels that are compared."""
    pairs = [pair for pair in _ROLE_PAIRS if set(pair) <= results.keys()]
    paired = {label for pair in pairs for label in pair}
    return pairs + [(label, base) for base in [*results][:1] for label in [*results][1:] if label not in paired]
