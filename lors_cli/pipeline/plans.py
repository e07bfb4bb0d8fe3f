"""What a recipe or a stage would do: fingerprints, what is done already, what a stage reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lors_cli.errors import UsageError, did_you_mean
from lors_cli.files import atomic, hashes, records
from lors_cli.machine import processes
from lors_cli.output import console
from lors_cli.pipeline.changes import Made, what_changes, what_scores_change
from lors_cli.pipeline.stages import STAGES, Config, Stage
from lors_cli.recipe.schema import EvalConfig, ModelConfig, Recipe

NOT_DONE = "not done yet"


@dataclass(frozen=True)
class StagePlan:
    """A stage and what is known of it before it runs."""

    stage: str
    folder: Path
    config: Config
    models: dict[str, ModelConfig]
    """Those it reads, by role."""
    origin: ModelConfig
    """The dense model, whose sizes all of them share; of those that `lors eval` is given, the largest."""
    fingerprint: str
    status: Literal["done", "resume", "run"]
    detail: str
    """On the status, for people."""
    replaces: str = ""
    """What of an earlier result it replaces, and why."""
    num_processes: int = field(default_factory=processes.num_processes)
    """That share its work; in a dry run, that are to."""
    scored: frozenset[str] = frozenset()
    """Of an eval's models those whose weights it needs no more."""

    @property
    def label(self) -> str:
        """For people: its stage, and which model a sweep's eval scores."""
        return f"eval {next(iter(self.models))}" if self.stage == "eval" else self.stage


def plan_stages(recipe: Recipe, out: Path, data_dir: Path | None) -> list[StagePlan]:
    """What a run of this recipe would do; no weights are loaded, nothing is written."""
    chain = plan_chain(recipe, lambda stage, fingerprint: out / stage, data_dir)
    if recipe.eval is None:
        return chain.plans
    return [*chain.plans, plan_eval(recipe.eval, out / "eval", chain.models, chain.fingerprints, data_dir)]


@dataclass
class Chain:
    """The stages that make models, and the models by role with their fingerprints."""

    plans: list[StagePlan]
    models: dict[str, ModelConfig]
    fingerprints: dict[str, str]


def plan_chain(recipe: Recipe, place: Callable[[str, str], Path], data_dir: Path | None) -> Chain:
    """Pruning and tuning of a recipe, and the models that there are once they are done.

    Args:
        place: stage and fingerprint to the stage's folder.
    """
    from lors_cli.evaluation.tasks import check_tasks
    from lors_cli.models.sources import fingerprint_suffix, model_fingerprint

    recipe = recipe.with_defaults()
    current = "dense"
    chain = Chain([], {current: recipe.model}, {current: model_fingerprint(recipe.model)})
    if recipe.eval is not None:
        check_tasks(recipe.eval, data_dir)
    for stage, doors in STAGES.items():
        config = getattr(recipe, stage)
        if config is None or doors.makes is None or doors.fingerprint is None:
            continue
        config = doors.prepare(config, chain.models[current])
        fingerprint = doors.fingerprint(config, chain.fingerprints[current], data_dir)
        folder = place(stage, fingerprint)
        read = {current: chain.models[current]}
        made = partial(_made, doors, config, chain.models[current], chain.fingerprints[current], data_dir)
        chain.plans.append(_plan(stage, folder, config, read, recipe.model, fingerprint, made))
        current = doors.makes
        chain.models[current] = replace(recipe.model, path=str(folder), revision="main")
        if chain.plans[-1].status == "done":  # something may have been put beside the results
            chain.fingerprints[current] = model_fingerprint(chain.models[current])
        else:
            chain.fingerprints[current] = f"{stage}:{fingerprint}{fingerprint_suffix(recipe.model)}"
    return chain


def _plan(
    stage: str, folder: Path, config: Any, models: dict[str, ModelConfig], origin: ModelConfig, fingerprint: str,
    made: Callable[[], Made],
) -> StagePlan:  # fmt: skip
    plan = partial(StagePlan, stage, folder, config, models, origin, fingerprint)
    if records.is_finished(folder, fingerprint):
        return plan("done", "finished earlier")
    if _is_begun(folder, fingerprint):
        return plan("resume", "begun earlier, resumes from there")
    replaces = what_changes(stage, folder, fingerprint, made)
    return plan("run", replaces or NOT_DONE, replaces)


def _made(doors: Stage, config: Any, model: ModelConfig, model_fingerprint: str, data_dir: Path | None) -> Made:
    """What a stage that makes a model is to make it from."""
    assert doors.inputs is not None
    inputs = {**doors.inputs(config, model_fingerprint, data_dir), "path": model.path}
    return Made(hashes.plain(doors.stored(config, data_dir)), inputs)


def _is_begun(folder: Path, fingerprint: str) -> bool:
    """Whether an interrupted call left something to resume from."""
    work, checkpoints = folder / records.WORK_NAME, folder / "checkpoints"
    if atomic.read_json(work / records.FINGERPRINT_NAME) != fingerprint:
        return False
    return records.has_work(folder) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def plan_single(stage: str, config: Any, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> StagePlan:
    """The plan of a stage on its own, whose folder is `out`; only eval takes several models."""
    from lors_cli.evaluation.tasks import check_tasks
    from lors_cli.models.sources import model_fingerprint

    doors = STAGES[stage]
    fingerprints = {label: model_fingerprint(model) for label, model in models.items()}
    if doors.fingerprint is None:
        check_tasks(config, data_dir)
        return replace(plan_eval(config, out, models, fingerprints, data_dir), origin=_largest(models.values()))
    (base,) = fingerprints.values()
    (model,) = models.values()
    config = doors.prepare(config, model)
    made = partial(_made, doors, config, model, base, data_dir)
    return _plan(stage, out, config, models, model, doors.fingerprint(config, base, data_dir), made)


def _largest(models: Iterable[ModelConfig]) -> ModelConfig:
    """Of models that need not be alike the largest, as far as their sizes are known."""
    from lors_cli.models.size import try_size

    return max(models, key=lambda model: size.num_bytes if (size := try_size(model)) else 0)


def plan_eval(
    config: EvalConfig, folder: Path, models: dict[str, ModelConfig], fingerprints: dict[str, str],
    data_dir: Path | None,
) -> StagePlan:  # fmt: skip
    """The plan of an evaluation of those of the models, by role or label, that `config` asks for."""
    from lors_cli.evaluation.pieces import pending, pieces_of, whole_fingerprint
    from lors_cli.evaluation.texts import lacking_texts

    chosen = {role: model for role, model in models.items() if config.models is None or role in config.models}
    if not chosen:
        raise UsageError("models: dense, pruned and tuned are a recipe's; `lors eval` scores the MODELs it is given.")
    pieces = pieces_of(config, {role: fingerprints[role] for role in chosen}, folder, data_dir)
    fingerprint, missing = whole_fingerprint(config, pieces), pending(pieces)
    without_texts = lacking_texts(config, {role: fingerprints[role] for role in chosen}, folder)
    scored = frozenset({*chosen}.difference((piece.label for piece in missing), without_texts))
    plan = partial(StagePlan, "eval", folder, config, chosen, next(iter(models.values())), fingerprint, scored=scored)
    if not missing and not without_texts and records.is_finished(folder, fingerprint):
        return plan("done", "finished earlier")
    detail = f"{len(missing)} of {len(pieces)} measurements to do"
    if not missing and without_texts:
        detail = f"short texts of {', '.join(without_texts)} to do"
    replaces = what_scores_change(folder, fingerprint, config, {role: fingerprints[role] for role in chosen})
    detail += f"; {replaces}" if replaces else ""
    return plan("resume" if len(missing) < len(pieces) else "run", detail, replaces)


def select(plans: list[StagePlan], first: str | None, last: str | None, force: tuple[str, ...] = ()) -> list[StagePlan]:
    """The stages from `first` to `last`, those in `force` to be done again.

    Raises:
        UsageError: the recipe lacks one of them, or a stage before `first` is not finished.
    """
    names = [plan.stage for plan in plans]
    for flag, stage in (("--from", first), ("--until", last)):
        if stage is not None and stage not in names:
            raise UsageError(
                f"{flag} {stage}: this recipe has only {', '.join(names)}.", did_you_mean(stage.lower(), names)
            )
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if start >= end:
        raise UsageError(f"--from {first} comes after --until {last}.")
    unfinished = [plan.stage for plan in plans[:start] if plan.status != "done"]
    if unfinished:
        raise UsageError(f"--from {first}: {unfinished[0]} is not finished with these settings.", "Leave --from out.")
    chosen = plans[start:end]
    odd = [stage for stage in force if stage not in names[start:end]]
    if odd:
        hint = did_you_mean(odd[0].lower(), names[start:end])
        raise UsageError(f"--force {odd[0]}: that stage is not among {', '.join(names[start:end])}.", hint)
    again: dict[str, Any] = {"status": "run", "detail": "done again: --force", "scored": frozenset()}
    return [replace(plan, **again) if plan.stage in force and not is_gone_on_with(plan) else plan for plan in chosen]


def is_gone_on_with(plan: StagePlan) -> bool:
    """Whether --force leaves what there is: a model that was begun, maybe by the same command before a kill."""
    return plan.status == "resume" and STAGES[plan.stage].makes is not None


def describe(plan: StagePlan) -> str:
    """One line on what a stage does."""
    return f"{STAGES[plan.stage].describe(plan.config, plan.models)} ({plan.detail})"


def to_come(plans: Sequence[StagePlan]) -> set[str]:
    """The paths of the models that are yet to be made, whatever of earlier settings lies there."""
    return {str(plan.folder) for plan in plans if plan.status != "done"}


def foresee(plan: StagePlan, missing: Collection[str]) -> str:
    """What a stage's result will be like, where that can be known while models are `to_come`; else empty."""
    there = {role: model for role, model in plan.models.items() if model.path not in missing}
    return STAGES[plan.stage].foresee(plan.config, there)


def announce(plan: StagePlan) -> str:
    """`describe` for a stage that starts now: its state is told only where it is news, and was not told before."""
    detail = plan.detail.removesuffix(plan.replaces).removesuffix("; ")
    return describe(replace(plan, detail=detail or NOT_DONE)).removesuffix(f" ({NOT_DONE})")


def warn_of_replaced(plans: Sequence[StagePlan]) -> None:
    """Say which earlier results will be replaced, and why."""
    for plan in plans:
        if plan.replaces and plan.status != "done":
            console.warn(f"{plan.stage}: {plan.replaces}")
