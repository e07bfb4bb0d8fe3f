"""Runs, sweeps and stages beside each other: one table, what tells them apart, their differences, their figures."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lors_cli.evaluation.samples import read_accuracies, read_windows
from lors_cli.evaluation.significance import Comparison, TextComparison, compare, compare_texts, pair_title
from lors_cli.files import hashes
from lors_cli.output.markdown import NONE, Block, escape
from lors_cli.report.colours import coloured
from lors_cli.report.differences import differences
from lors_cli.report.groups import groups, model_label, pattern_name
from lors_cli.report.measures import Group, ScoredModel, measures
from lors_cli.report.output import assemble, pictures, table_of, write_files
from lors_cli.report.results import Cell, Results
from lors_cli.report.run import summary
from lors_cli.report.score_figures import accuracy_bars, perplexity_bars
from lors_cli.report.scores import by_model, notes
from lors_cli.report.stage_figures import cost, loss_of_cells, sparsity_by_model
from lors_cli.report.sweep import OF_COST, OF_SCORES, cost_table


@dataclass(frozen=True)
class Source:
    """One of the folders that are compared."""

    root: Path
    label: str
    results: Results

    @property
    def is_single(self) -> bool:
        """Whether it is a run or a stage, no sweep."""
        return not self.results.axes and len(self.results.cells) == 1

    def cell_name(self, name: str) -> str:
        """A cell's name beside those of the other folders."""
        return self.label if self.is_single else f"{self.label}/{name}"

    @cached_property
    def models(self) -> list[ScoredModel]:
        """What was scored or made here, labelled `<folder>/<role>`, of a sweep `<folder>/<name>`."""
        found = [
            model
            for group in groups(self.results)
            for model in group.models
            if model.scores or model.made or model.packed
        ]
        return [
            replace(model, label=f"{self.label}/{(self.is_single and model.role) or model.name}", mark="",
                    cells=tuple(map(self.cell_name, model.cells)))
            for model in found
        ]  # fmt: skip

    def cells(self) -> Iterator[Cell]:
        """Its cells as if they were of one sweep with the others."""
        for cell in self.results.cells:
            folders = {stage: f"{self.label}/{path}" for stage, path in cell.folders.items()}
            scores = {
                role: replace(found, folder=f"{self.label}/{found.folder}") for role, found in cell.scores.items()
            }
            yield replace(cell, name=self.cell_name(cell.name), folders=folders, scores=scores)


@dataclass(frozen=True)
class _Entry:
    """A model, and the folder that its documents' results are in."""

    source: Source
    model: ScoredModel

    @property
    def name(self) -> str:
        """Without its folder."""
        return self.model.label.removeprefix(f"{self.source.label}/")

    @property
    def traits(self) -> tuple[str, ...]:
        """What makes it like another one of its role: methods, dense model, pattern, name, in this order."""
        model = self.model
        return model_label(model.role, model.prune, model.tune), model.base, pattern_name(model.prune), self.name

    @cached_property
    def accuracies(self) -> dict[str, dict[Any, float]]:
        """By task and document, as far as they are there."""
        return read_accuracies(*self._place, self.model.scores) if self.model.scores else {}

    @cached_property
    def windows(self) -> dict[str, dict[Any, float]]:
        """Losses by text and window, as far as they are there."""
        return read_windows(*self._place, self.model.scores) if self.model.scores else {}

    @property
    def _place(self) -> tuple[Path, str]:
        """The folder with its results, and its label there."""
        return self.source.root / self.model.folder, self.model.role or self.name


def write_comparison(found: Mapping[Path, tuple[str, Results]], formats: Collection[str], out: Path) -> list[Path]:
    """Write the reports and `figures/*.png` of several folders; the same results give the same bytes.

    Args:
        found: each folder with its label and results.
    """
    sources = [Source(root, label, results) for root, (label, results) in found.items()]
    entries = _entries(sources)
    title = ", ".join(source.label for source in sources)
    (group,) = coloured([Group(title, tuple(entry.model for entry in entries))])
    scored = Group(title, tuple(model for model in group.models if model.scores))
    cells = [cell for source in sources for cell in source.cells()]
    figures = {
        "accuracy": lambda: accuracy_bars(scored), "perplexity": lambda: perplexity_bars(scored),
        "loss": lambda: loss_of_cells(cells, [group]), "sparsity": lambda: sparsity_by_model([group]),
        "cost": lambda: cost(cells),
    }  # fmt: skip
    return write_files(
        out, formats, figures=figures, groups=[group], caption=f"{escape(title)}.",
        blocks=lambda drawn: _blocks(sources, entries, group, cells, drawn),
    )  # fmt: skip


def _entries(sources: Sequence[Source]) -> list[_Entry]:
    """Every model; a dense one that several folders scored alike is there once."""
    entries: list[_Entry] = []
    dense: dict[str, int] = {}
    for source in sources:
        for model in source.models:
            key = json.dumps([model.base, model.scores], sort_keys=True)
            if model.role == "dense" and key in dense:
                first = entries[dense[key]]
                both = replace(first.model, cells=(*first.model.cells, *model.cells))
                entries[dense[key]] = replace(first, model=both)
                continue
            if model.role == "dense":
                dense[key] = len(entries)
            entries.append(_Entry(source, model))
    if len(dense) == 1:
        (place,) = dense.values()
        if sum(model.role == "dense" for source in sources for model in source.models) > 1:
            entries[place] = replace(entries[place], model=replace(entries[place].model, label="dense"))
    return entries


def _blocks(
    sources: Sequence[Source], entries: Sequence[_Entry], group: Group, cells: Sequence[Cell], drawn: Collection[str]
) -> list[Block]:
    about = [[source.label, summary(source.results.cells[0]) if source.is_single else f"Sweep {source.results.name}."]
             for source in sources]  # fmt: skip
    return assemble(f"{group.title} compared", table_of(["folder", "what was done"], about, prose=True), {
        "Results": [by_model([group]), *notes([group]), *pictures(OF_SCORES, drawn)] if group.models else [],
        "Differences": _differences(sources, entries),
        "Settings that differ": table_of(["setting", *(s.label for s in sources if s.is_single)], _settings(sources)),
        "Tuning": pictures({"loss": "Training loss; held-out loss dashed where it was measured."}, drawn),
        "Sparsity and cost": [*cost_table(cells), *pictures(OF_COST, drawn)],
    })  # fmt: skip


def _differences(sources: Sequence[Source], entries: Sequence[_Entry]) -> list[Block]:
    """Each model of the later folders against its like in the first one, as far as both are scored."""
    paired: list[Comparison] = []
    texts: list[TextComparison] = []
    plain: dict[str, dict[str, float]] = {}
    plain_texts: dict[str, dict[str, float]] = {}
    for entry in entries:
        other = _counterpart(entry, [e for e in entries if e.source is sources[0] and e.model.scores])
        if entry.source is sources[0] or other is None or not entry.model.scores:
            continue
        labels = entry.model.label, other.model.label
        some, others = entry.accuracies, other.accuracies
        shared = [task for task in some if task in others and some[task].keys() == others[task].keys()]
        found = compare(*labels, *({task: accuracies[task] for task in shared} for accuracies in (some, others)))
        paired += [found] if found else []
        texts += compare_texts(*labels, entry.windows, other.windows)
        title = pair_title(*labels)
        plain[title], plain_texts[title] = _plain(entry.model, other.model)
    return differences(paired, texts, plain, plain_texts)


def _counterpart(entry: _Entry, others: Sequence[_Entry]) -> _Entry | None:
    """Of the same role the one with most in common, of models without one that of the same name; else the last one."""
    like = [other for other in others if entry.model.role == other.model.role
            and (entry.model.role or entry.name == other.name)]  # fmt: skip

    def in_common(other: _Entry) -> list[bool]:
        return [mine == theirs for mine, theirs in zip(entry.traits, other.traits, strict=True)]

    return max(like or others[-1:], key=in_common, default=None)


def _plain(some: ScoredModel, other: ScoredModel) -> tuple[dict[str, float], dict[str, float]]:
    """What both models have: of tasks the difference of the accuracies, of texts the perplexities' as a share."""
    tasks, texts = dict[str, float](), dict[str, float]()
    for item in measures([some, other]):
        mine, theirs = item.stored(some), item.stored(other)
        if mine is None or theirs is None:
            continue
        if item.kind == "task" and item.metric == "acc":
            tasks[item.name] = mine - theirs
        elif item.kind == "perplexity":
            texts[item.name] = mine / theirs - 1
    return tasks, texts


def _settings(sources: Sequence[Source]) -> list[list[str]]:
    """The settings of the stages that all the runs have, and that are not the same in all of them."""
    cells = [source.results.cells[0] for source in sources if source.is_single]
    shared = [stage for stage in (cells[0].records if cells else ()) if all(stage in cell.records for cell in cells)]
    flat = [
        {"model": cell.base}
        | {key: value for stage in shared for key, value in hashes.flat(cell.records[stage].config, f"{stage}.")}
        for cell in cells
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(_spoken(settings.get(key)) for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _spoken(value: Any) -> str:
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
