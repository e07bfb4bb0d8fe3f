"""Scored models and what is measured of them: our number, its standard error, and the paper's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lors_cli.files.records import StageRecord
from lors_cli.models.sources import short_name
from lors_cli.report.names import TASKS, task_name
from lors_cli.report.paper import PaperRow, find_paper_row


@dataclass(frozen=True)
class ScoredModel:
    """A model with its scores, or with why it has none."""

    role: str
    """dense, pruned or tuned."""
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
    """As in DESIGN §4, None when it has not been evaluated."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of `evaluation.recovered`, for a tuned model."""
    limit: int | None = None
    """Documents a task that it was scored on at most."""
    made: StageRecord | None = None
    """The stage that made it; None for a dense model."""
    eval_s: float | None = None

    @property
    def paper(self) -> PaperRow | None:
        """The paper's row for the same model, methods, pattern and data."""
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
        tune=tune.get("method"), data=(tune.get("data") or {}).get("dataset"),
    )  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """A column: something measured of every model."""

    kind: Literal["task", "average", "perplexity", "recovered"]
    name: str
    metric: str = ""

    @property
    def title(self) -> str:
        """As a column's head."""
        if self.kind == "task":
            return task_name(self.name) if self.metric == "acc" else f"{task_name(self.name)} {self.metric}"
        if self.kind == "average":
            return "average"
        text = "acc" if self.name == "accuracy" else f"ppl {short_name(self.name.removeprefix('perplexity '))}"
        return f"recovered {text}" if self.kind == "recovered" else text

    @property
    def is_percent(self) -> bool:
        """Whether `value` is a share times 100."""
        return self.kind in ("average", "recovered") or self.metric in ("acc", "acc_norm")

    def value(self, model: ScoredModel) -> float | None:
        """The model's number, None when it has none."""
        scores = model.scores or {}
        if self.kind == "task":
            found = scores.get("tasks", {}).get(self.name, {}).get(self.metric)
        elif self.kind == "average":
            found = (scores.get("average") or {}).get("value")
        elif self.kind == "perplexity":
            found = scores.get("perplexity", {}).get(self.name, {}).get("value")
        else:
            found = model.shares.get(self.name)
        return self._scaled(found)

    def stderr(self, model: ScoredModel) -> float | None:
        """The number's standard error; an average's takes the tasks as independent."""
        tasks = (model.scores or {}).get("tasks", {})
        if self.kind == "task":
            return self._scaled(tasks.get(self.name, {}).get(f"{self.metric}_stderr"))
        if self.kind != "average" or self.value(model) is None:
            return None
        errors = [tasks.get(name, {}).get("acc_stderr") for name in averaged_tasks(model)]
        if not errors or None in errors:
            return None
        return self._scaled(math.sqrt(math.fsum(error**2 for error in errors)) / len(errors))

    def paper(self, model: ScoredModel) -> float | None:
        """The paper's number for the model, of the same tasks; None when it has none."""
        row = model.paper
        if row is None:
            return None
        if self.kind == "task" and self.metric == "acc":
            return row.acc.get(self.name)
        if self.kind == "average":
            return row.average(averaged_tasks(model))
        if self.kind == "recovered" and self.name == "accuracy":
            return _paper_share(model)
        return None

    def _scaled(self, value: Any) -> float | None:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return 100 * value if self.is_percent else float(value)


def averaged_tasks(model: ScoredModel) -> list[str]:
    """The tasks that the model's average is over."""
    return list(((model.scores or {}).get("average") or {}).get("tasks") or [])


def _paper_share(model: ScoredModel) -> float | None:
    """What tuning won back in the paper, in percent of what pruning lost."""
    from lors_cli.evaluation.summary import recovered

    tasks = averaged_tasks(model)
    rows = {role: _paper_row(model, role) for role in ("dense", "pruned", "tuned")}
    averages = {role: row.average(tasks) for role, row in rows.items() if row is not None}
    content = {
        role: {"average": {"value": value, "tasks": tasks}, "perplexity": {}} for role, value in averages.items()
    }
    share = recovered(content).get("accuracy")
    return None if share is None else 100 * share


def measures(models: Iterable[ScoredModel], *, with_norm: bool = False) -> list[Measure]:
    """What any of the models has a number for: tasks in the paper's order, the average, perplexities, recovered shares.

    Args:
        models: all that are shown together.
        with_norm: acc_norm as well, which the paper's tables do not have.
    """
    models = list(models)
    metrics: dict[str, dict[str, None]] = {task: {} for task in TASKS}
    texts: dict[str, None] = {}
    shares: dict[str, None] = {}
    for model in models:
        for task, found in ((model.scores or {}).get("tasks") or {}).items():
            metrics.setdefault(task, {}).update(dict.fromkeys(_metrics_of(found, with_norm)))
        texts.update(dict.fromkeys((model.scores or {}).get("perplexity") or {}))
        shares.update(dict.fromkeys(model.shares))
    columns = [Measure("task", task, metric) for task, found in metrics.items() for metric in found]
    average = Measure("average", "accuracy")
    return [
        *columns,
        *([average] if any(average.value(model) is not None for model in models) else []),
        *(Measure("perplexity", text) for text in texts),
        *(Measure("recovered", name) for name in shares),
    ]


def _metrics_of(found: dict[str, Any], with_norm: bool) -> list[str]:
    usual: list[str] = [name for name in ("acc", "acc_norm") if name in found and (with_norm or name == "acc")]
    if usual:
        return usual
    return [name for name in found if "_stderr" not in name and name != "num_samples"]
