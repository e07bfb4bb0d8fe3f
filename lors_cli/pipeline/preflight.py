"""What would stop a run after hours, looked for before its first stage: models, texts, tasks, memory and disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lors_cli.data.sources import open_source
from lors_cli.errors import LorsError, ResourceError, UsageError, translate
from lors_cli.evaluation.entries import Task
from lors_cli.machine.devices import free_memory
from lors_cli.models.size import try_size
from lors_cli.output import progress
from lors_cli.output.console import gib
from lors_cli.pipeline import resources
from lors_cli.pipeline.plans import StagePlan, to_come
from lors_cli.pipeline.stages import STAGES, Text
from lors_cli.recipe.schema import ModelConfig, TuneConfig

ROWS = 20
"""Rows of a text that are read; what is wrong with a source shows in the first."""
ERROR = 0.2
"""Of an estimate of memory: what is short by less may still run."""


@dataclass(frozen=True)
class Trouble:
    """What is in a stage's way."""

    stage: str
    error: LorsError


def troubles(plans: Sequence[StagePlan], data_dir: Path | None) -> list[Trouble]:
    """All that is in the way of the stages that are still to be done; weights are neither loaded nor downloaded."""
    found: list[Trouble] = []
    seen: set[tuple[str, str]] = set()
    looked: set[ModelConfig] = set()

    def note(stage: str, error: LorsError | None) -> None:
        if error is not None and (type(error).__name__, error.message) not in seen:
            seen.add((type(error).__name__, error.message))
            found.append(Trouble(stage, error))

    pending = [plan for plan in plans if plan.status != "done"]
    missing = to_come(pending)
    with progress.busy("looking ahead"):
        for plan in pending:
            there = [model for model in plan.models.values() if model.path not in missing and model not in looked]
            looked.update(there)
            note(plan.stage, _met(partial(STAGES[plan.stage].check_shared, plan.config, plan.num_processes)))
            for look in _looks(plan, there, pending, data_dir):
                note(plan.stage, _met(look))
        note("all", _met(lambda: _check_disk(pending)))
    return found


def refuse(found: Sequence[Trouble]) -> None:
    """Raise what was found, in one error with the exit code of the first.

    Raises:
        LorsError: there is something.
    """
    if not found:
        return
    first, *others = [trouble.error for trouble in found]
    if not others:
        raise first
    lines = "\n".join(f"And {trouble.stage}: {trouble.error}" for trouble in found[1:])
    error = LorsError(f"{first}\n{lines}")
    error.exit_code = first.exit_code
    raise error


def _met(look: Callable[[], Any]) -> LorsError | None:
    """What a look ends in, where that is the user's to mend."""
    try:
        look()
    except Exception as error:
        known = translate(error)
        if known is None:
            raise
        return known
    return None


def _looks(
    plan: StagePlan, models: Sequence[ModelConfig], pending: Sequence[StagePlan], data_dir: Path | None
) -> Iterator[Callable[[], Any]]:
    """Everything to look at before one stage: its models that are there and not looked at yet, and all else."""
    with_template = models or [plan.origin]  # whose tokenizer those that are yet to come will have
    yield partial(STAGES[plan.stage].check_packages, plan.config)
    chat = isinstance(plan.config, TuneConfig) and any(data.template == "chat" for _, data in plan.config.data.parts)
    loaded = [model for label, model in plan.models.items() if label not in plan.scored]
    for model in with_template if chat else models:
        yield partial(_check_model, model, chat, model in loaded)
    reads = STAGES[plan.stage].reads(plan.config)
    if reads.teacher is not None:
        yield partial(_check_model, reads.teacher, False, not reads.teacher_is_cached)
    for text in reads.texts:
        yield partial(_check_text, text, data_dir)
    if reads.chat:
        for model in with_template:
            yield partial(_check_chat_template, model, plan, pending, data_dir)
    for task in {task.settings.get("dataset_path"): task for task in reversed(reads.tasks)}.values():
        yield partial(_check_task, task, data_dir)
    for model in dict.fromkeys((plan.origin, *models)):
        size = try_size(model)
        if size is not None:
            yield partial(STAGES[plan.stage].fits, plan.config, size)
    look = resources.check_memory if STAGES[plan.stage].shortage else _check_memory
    yield partial(look, plan)


def _check_model(model: ModelConfig, chat: bool, loaded: bool) -> None:
    """Its configuration and tokenizer, downloaded from the hub if it is there; a chat template that is needed, and
    weights of a model that is `loaded`."""
    from lors_cli.data.prompts import ChatTemplate, Turn
    from lors_cli.data.tokenising import eos_token_id
    from lors_cli.models.hub import check_weights, here
    from lors_cli.models.loading import load_tokenizer

    tokenizer, source = load_tokenizer(model), here(model)
    if loaded and source.folder is not None and source.gguf_file is None:
        check_weights(model, source.folder)
    if chat:
        talk = [Turn("user", "Say it."), Turn("assistant", "It.", learnt=True)]
        ChatTemplate(tokenizer, eos_token_id(tokenizer)).render(talk)


def _check_text(text: Text, data_dir: Path | None) -> None:
    """A source's first rows, and that the settings are for what it gives."""
    source = open_source(text.name, split=text.split, data_dir=data_dir, want=text.want, columns=text.columns,
                         chosen=text.chosen)  # fmt: skip
    is_read = text.name != "pydoc" and source.path is None  # all of pydoc is read before its first row
    rows = source.first_rows(ROWS) if is_read else []
    text.fits(source, rows)
    if is_read and not any(any(row.values()) for row in rows):
        raise UsageError(f"The first {ROWS} rows of {text.name} are empty.")


def _check_chat_template(
    model: ModelConfig, plan: StagePlan, pending: Sequence[StagePlan], data_dir: Path | None
) -> None:
    """The chat template that prompts of tasks are put into, unless the models that are scored will get one."""
    from lors_cli.evaluation.stage import check_chat_template
    from lors_cli.models.loading import load_tokenizer

    given = {str(each.folder) for each in pending if STAGES[each.stage].gives_template(each.config, data_dir)}
    if not given.issuperset(scored.path for scored in plan.models.values()):
        check_chat_template(load_tokenizer(model), model)


def _check_task(task: Task, data_dir: Path | None) -> None:
    """The builder of a task's dataset, where that comes from the hub; of a dataset's parts, one's."""
    from lors_cli.evaluation.tasks import open_dataset

    open_dataset(task, data_dir)


def _check_memory(plan: StagePlan) -> None:
    """Refuse what is far from fitting, for stages that cannot tell better themselves."""
    needed, _ = resources.try_estimate(plan)
    if needed is None or plan.num_processes > 1:  # which may share a model
        return
    free = free_memory(plan.origin.device)
    if needed.memory * (1 - ERROR) > free:
        raise ResourceError(
            f"{plan.stage} needs about {gib(needed.memory)} of memory, {gib(free)} are free.",
            "docs/how-to.md, Make it fit, lists settings that need less. Or use a larger machine, or a smaller model.",
        )


def _check_disk(plans: Sequence[StagePlan]) -> None:
    """Refuse stages whose results, and what each needs while it runs, do not fit on the disk together."""
    before = 0
    for plan in plans:
        there = next(folder for folder in (plan.folder.absolute(), *plan.folder.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK):
            raise UsageError(f"{there} cannot be written to.", "Choose another --out.")
        needed, _ = resources.try_estimate(plan)
        size = try_size(plan.origin)
        if needed is None or size is None:
            continue
        free = resources.free_disk(plan.folder)
        if before + needed.disk - resources.occupied(plan.folder) > free:
            raise ResourceError(
                f"{plan.stage} needs about {gib(before + needed.disk)} of disk in {plan.folder.parent}, with the "
                f"stages before it; {gib(free)} are free.",
                "Free some space or choose another --out.",
            )
        before += STAGES[plan.stage].leaves(plan.config, size)
