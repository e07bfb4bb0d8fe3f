"""What the cells of a sweep need: stages in folders named by their fingerprints, so that cells share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lors_cli.data.sources import resolve_data_dir
from lors_cli.errors import LorsError
from lors_cli.models.size import try_size
from lors_cli.pipeline.plans import StagePlan, plan_chain, plan_eval
from lors_cli.pipeline.stages import STAGES
from lors_cli.sweep.cells import Cell, in_cells

FINGERPRINT_DIGITS = 12
STAGES_NAME = "stages"


@dataclass(frozen=True)
class CellPlan:
    """A cell and its stages, each model scored before the next one is made.

    `stages` has the folders of prune and tune, `models` those of the scores, by role.
    """

    cell: Cell
    plans: tuple[StagePlan, ...]
    stages: dict[str, Path]
    models: dict[str, Path]
    data_dir: Path | None

    @property
    def is_done(self) -> bool:
        """Whether every stage is finished."""
        return all(plan.status == "done" for plan in self.plans)


def plan_cells(cells: Sequence[Cell], out: Path) -> list[CellPlan]:
    """What every cell would do; no weights are loaded, nothing is written.

    Raises:
        LorsError: of the first cell's kind, with what is wrong in all cells that cannot work: a model, a dataset or a
            task that is not there, a pattern or rank that does not fit the model.
    """
    plans = []
    problems: dict[str, tuple[LorsError, list[str]]] = {}
    for cell in cells:
        try:
            plans.append(_plan_cell(cell, out))
        except LorsError as error:
            problems.setdefault(error.message, (error, []))[1].append(cell.name)
    if problems:
        first = next(iter(problems.values()))[0]
        lines = [f"{message} ({in_cells(names)})" for message, (_, names) in problems.items()]
        raise type(first)("\n".join(lines), first.hint)
    return plans


def _plan_cell(cell: Cell, out: Path) -> CellPlan:
    from lors_cli.evaluation.pieces import eval_fingerprint

    recipe = cell.recipe
    data_dir = resolve_data_dir(recipe.data_dir)
    size = try_size(recipe.model)
    for stage, doors in STAGES.items():
        if size is not None and getattr(recipe, stage) is not None:
            doors.fits(getattr(recipe, stage), size)

    def place(stage: str, fingerprint: str) -> Path:
        return out / STAGES_NAME / f"{stage}-{fingerprint[:FINGERPRINT_DIGITS]}"

    chain = plan_chain(recipe, place, data_dir)
    makers = {doors.makes: stage for stage, doors in STAGES.items() if getattr(recipe, stage) is not None}
    by_stage = {plan.stage: plan for plan in chain.plans}
    ordered: list[StagePlan] = []
    models: dict[str, Path] = {}
    for role in chain.models:
        if role in makers:
            ordered.append(by_stage[makers[role]])
        if recipe.eval is None or role not in (recipe.eval.models or ()):
            continue
        config = replace(recipe.eval, models=(role,))
        folder = place("eval", eval_fingerprint(config, {role: chain.fingerprints[role]}, data_dir))
        ordered.append(plan_eval(config, folder, chain.models, chain.fingerprints, data_dir))
        models[role] = folder
    stages = {plan.stage: plan.folder for plan in chain.plans}
    return CellPlan(cell, tuple(ordered), stages, models, data_dir)


def distinct(plans: Iterable[CellPlan]) -> dict[Path, tuple[StagePlan, list[str]]]:
    """Every stage once, in the order of running, with the names of the cells that need it."""
    found: dict[Path, tuple[StagePlan, list[str]]] = {}
    for cell_plan in plans:
        for plan in cell_plan.plans:
            found.setdefault(plan.folder, (plan, []))[1].append(cell_plan.cell.name)
    return found
