"""Scored models and what is measured of them: our number, its standard error, and the paper's."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lors_cli.evaluation.plain_results import finite
from lors_cli.evaluation.summary import average_stderr, recovered
from lors_cli.files.records import StageRecord
from lors_cli.models.sources import short_name
from lors_cli.recipe.tuning import data_name
from lors_cli.report.drawing import Look
from lors_cli.report.paper import TASKS, PaperRow, find_paper_row

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shown in percent."""
_COUNTS = ("num_samples", "num_fewshot")


@dataclass(frozen=True)
class ScoredModel:
    """A model with its scores, or with why it has none."""

    role: str
    """dense, pruned or tuned; empty where it only has a name, as `lors eval NAME=MODEL` gives it."""
    label: str
    base: str
    """Path of the dense model it was made from."""
    cells: tuple[str, ...] = ()
    """Names of the sweep's cells that it belongs to."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What sets it apart in its sweep, beyond methods and pattern."""
    prune: dict[str, Any] = field(default_factory=dict)
    """Config of the prune stage; empty for a dense model."""
    tune: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    error: str | None = None
    scores: dict[str, Any] | None = None
    """As in eval/*.json, None when it has not been evaluated."""
    shares: dict[str, float | None] = field(default_factory=dict)
    """Of `evaluation.recovered`, for a tuned model; None where the loss is inside its own error."""
    limit: float | None = None
    """Documents a task that it was scored on at most; below 1, a share of them."""
    folder: str = ""
    """Where its scores lie, relative to the run, sweep or stage."""
    made: StageRecord | None = None
    """The stage that made it; None for a dense model."""
    packed: StageRecord | None = None
    """The stage that packed it, where one did."""
    eval_s: float | None = None
    chance: dict[str, float] = field(default_factory=dict)
    """Task to the accuracy of guessing, where it is known."""
    look: Look = field(default_factory=Look)
    mark: str = ""
    """What tells it from a model of another group that has the same label: dense model, pattern."""

    @property
    def name(self) -> str:
        """Its label as it stands where no group's title is beside it."""
        return f"{self.mark}: {self.label}" if self.mark else self.label

    @property
    def paper(self) -> PaperRow | None:
        """The paper's row for the same model, methods, pattern and data, which is of zero-shot scores."""
        tasks = (self.scores or {}).get("tasks") or {}
        if any((tasks.get(task) or {}).get("num_fewshot") for task in TASKS):
            return None
        return _paper_row(self, self.role)


@dataclass(frozen=True)
class Group:
    """Models that are compared with each other: a dense one, or what one pruner's result became."""

    title: str
    models: tuple[ScoredModel, ...]


def _paper_row(model: ScoredModel, role: str) -> PaperRow | None:
    prune = model.prune if role != "dense" else {}
    tune = model.tune if role == "tuned" else {}
    if (role != "dense" and not prune.get("method")) or (role == "tuned" and not tune.get("method")):
        return None
    return find_paper_row(
        model.base, prune=prune.get("method"), pattern=prune.get("pattern"), sparsity=prune.get("sparsity"),
        tune=tune.get("method"), data=data_name(tune.get("data") or {}),
    )  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """A column: something measured of every model."""

    kind: Literal["task", "average", "perplexity", "recovered"]
    name: str
    metric: str = ""
    num_fewshot: int = 0

    @property
    def title(self) -> str:
        """As a column's head."""
        if self.kind == "task":
            task = TASKS.get(self.name, self.name) + self.shots
            return task if self.metric == "acc" else f"{task} {self.metric}"
        if self.kind == "average":
            return "average"
        text = "acc" if self.name == "accuracy" else f"ppl {short_name(self.name.removeprefix('perplexity '))}"
        return f"recovered {text}" if self.kind == "recovered" else text

    @property
    def shots(self) -> str:
        """` (5-shot)`; nothing where there are no examples."""
        return f" ({self.num_fewshot}-shot)" if self.num_fewshot else ""

    @property
    def is_percent(self) -> bool:
        """Whether `value` is a share times 100."""
        return self.kind in ("average", "recovered") or self.metric.partition(",")[0] in SHARES

    @property
    def scale(self) -> int:
        """`value` over `stored`."""
        return 100 if self.is_percent else 1

    def stored(self, model: ScoredModel) -> float | None:
        """The model's number as it is on disk, None when it has none."""
        scores = model.scores or {}
        if self.kind == "task":
            found = scores.get("tasks", {}).get(self.name, {})
            return finite(found.get(self.metric)) if (found.get("num_fewshot") or 0) == self.num_fewshot else None
        if self.kind == "average":
            return finite((scores.get("average") or {}).get("value"))
        if self.kind == "perplexity":
            return finite(scores.get("perplexity", {}).get(self.name, {}).get("value"))
        return model.shares.get(self.name)

    def basis(self, model: ScoredModel) -> tuple[Any, ...]:
        """What the number is of: tasks with their documents and examples, or a text's tokens and windows."""
        scores = model.scores or {}
        text = self.name.removeprefix("perplexity ")
        if self.kind == "perplexity" or text != self.name:
            found = scores.get("perplexity", {}).get(text, {})
            return found.get("tokens"), found.get("sequence_length")
        tasks = scores.get("tasks", {})
        names = [self.name] if self.kind == "task" else sorted(_averaged(model))
        kept = [tasks.get(name, {}) for name in names]
        return (*names, *((found.get("num_samples"), found.get("num_fewshot") or 0) for found in kept))

    def is_alike(self, models: Iterable[ScoredModel]) -> bool:
        """Whether the models that have a number have it of the same tasks, documents and windows."""
        return len({self.basis(model) for model in models if self.stored(model) is not None}) <= 1

    def value(self, model: ScoredModel) -> float | None:
        """The model's number as it is shown, None when it has none."""
        found = self.stored(model)
        return None if found is None else self.scale * found

    def stderr(self, model: ScoredModel) -> float | None:
        """The shown number's standard error; an average's takes the tasks as independent."""
        tasks = (model.scores or {}).get("tasks", {})
        metric, comma, name = self.metric.partition(",")
        found = tasks.get(self.name, {}).get(f"{metric}_stderr{comma}{name}") if self.kind == "task" else None
        if self.kind == "average" and self.stored(model) is not None:
            found = average_stderr(model.scores or {})
        error = finite(found)
        return None if error is None else self.scale * error

    def chance(self, model: ScoredModel) -> float | None:
        """What guessing would give, as it is shown; of an average where it is known of all its tasks."""
        names = (
            [self.name] if self.metric in ("acc", "acc_norm") else _averaged(model) if self.kind == "average" else []
        )
        levels = [model.chance[name] for name in names if name in model.chance]
        return 100 * math.fsum(levels) / len(levels) if levels and len(levels) == len(names) else None

    def paper(self, model: ScoredModel) -> float | None:
        """The paper's number for the model, of the same tasks; None when it has none."""
        row = model.paper
        if row is None:
            return None
        if self.kind == "task" and self.metric == "acc":
            return row.acc.get(self.name)
        if self.kind == "average":
            return row.average(_averaged(model))
        return _paper_share(model) if self.kind == "recovered" and self.name == "accuracy" else None


def _averaged(model: ScoredModel) -> list[str]:
    """The tasks that the model's average is over."""
    return list(((model.scores or {}).get("average") or {}).get("tasks") or [])


def _paper_share(model: ScoredModel) -> float | None:
    """What tuning won back in the paper, in percent of what pruning lost."""
    tasks, contents = _averaged(model), {}
    for role in ("dense", "pruned", "tuned"):
        if (row := _paper_row(model, role)) is not None:
            contents[role] = {"average": {"value": row.average(tasks), "tasks": tasks}, "perplexity": {}}
    share = recovered(contents).get("accuracy")
    return None if share is None else 100 * share


def measures(
    models: Iterable[ScoredModel], *, every_metric: bool = False, subtasks: bool = False,
    first: Collection[str] = tuple(TASKS),
) -> list[Measure]:  # fmt: skip
    """What any of the models has a number for: tasks, the average, perplexities, recovered shares.

    Args:
        every_metric: of tasks that have an acc the other metrics as well, which the paper's tables do not have.
        subtasks: those of groups as well.
        first: tasks that lead, in this order; the others follow as they come.
    """
    models = list(models)
    metrics: dict[tuple[str, int], dict[str, None]] = {(task, 0): {} for task in first}
    for model in models:
        scores = model.scores or {}
        inside = {member for members in (scores.get("groups") or {}).values() for member in members}
        for task, found in (scores.get("tasks") or {}).items():
            if subtasks or task not in inside:
                key = task, found.get("num_fewshot") or 0
                metrics.setdefault(key, {}).update(dict.fromkeys(_metrics_of(found, every_metric)))
    texts = dict.fromkeys(text for model in models for text in (model.scores or {}).get("perplexity") or {})
    average = Measure("average", "accuracy")
    return [
        *(Measure("task", task, metric, shots) for (task, shots), found in metrics.items() for metric in found),
        *([average] if any(average.stored(model) is not None for model in models) else []),
        *(Measure("perplexity", text) for text in texts),
        *(Measure("recovered", name) for name in dict.fromkeys(name for model in models for name in model.shares)),
    ]


def _metrics_of(found: dict[str, Any], every_metric: bool) -> list[str]:
    """The accuracies first."""
    if "acc" in found and not every_metric:
        return ["acc"]
    names = [name for name in found if "_stderr" not in name and name not in _COUNTS]
    return sorted(names, key=lambda name: (name != "acc", name != "acc_norm"))
