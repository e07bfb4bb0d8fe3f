"""Scoring a model on one task with lm-evaluation-harness, without its noise.

lm-eval is called below `simple_evaluate`, at `lm_eval.evaluate`: the outer function adds package lists and model
look-ups on the hub to every result, seconds a task, and does for the rest what `load_task` does here.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError, innermost, translate
from lors_cli.evaluation.documents import check_documents
from lors_cli.evaluation.entries import Task
from lors_cli.evaluation.plain_results import TaskResult, plain_result
from lors_cli.evaluation.tasks import dataset_error, local_documents, task_definition
from lors_cli.output import console, progress
from lors_cli.recipe.schema import EvalConfig

_SEED = 1234
_BOOTSTRAP_ROUNDS = 1000
"""lm-eval draws from another seed after so many."""
_SHOW_READING_FROM = 1000
_CUT, _NO_SYSTEM = "Combined length of context", "Failed to apply chat template"
"""How lm-eval's notices begin: of a request cut to the model's length, and of a system turn left out."""


def score_task(
    model: Any, tokenizer: Any, task: Task, config: EvalConfig, *, data_dir: Path | None, folder: Path, label: str = ""
) -> TaskResult:
    """Score a causal LM, in evaluation mode, on one task.

    Args:
        config: says how; its tasks are not read.
        data_dir: folder with local copies of the seven tasks' documents, None for the hub.
        folder: for generated files; may be deleted afterwards.
        label: the model's name, for the progress display.

    Raises:
        UsageError: a choice that the model is too short for, or examples that there are not enough documents for.
        MissingError: documents that are neither in `data_dir` nor to be had from the hub.
    """
    local = local_documents(task, data_dir)
    for path in local.values():
        check_documents(task.name, path)
    title = f"{label} {task.name}".strip()
    with _quiet() as told, _in_our_way(title), _own_faults_told(task, config):
        import lm_eval

        from lors_cli.evaluation.shown_model import ShownModel

        _seed()
        loaded = load_task(task, data_dir=data_dir, folder=folder)
        lm = ShownModel(model, tokenizer, config.batch_size, title)
        multiturn = config.apply_chat_template if config.fewshot_as_multiturn is None else config.fewshot_as_multiturn
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {task.name: loaded}},
            limit=config.limit,
            bootstrap_iters=_BOOTSTRAP_ROUNDS,
            log_samples=True,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=multiturn,
        )
    num_cut = lm.num_cut + len(told[_CUT])
    if num_cut:
        console.warn(f"{title}: {num_cut} requests exceed the model's length and were cut on the left")
    if told[_NO_SYSTEM]:
        console.warn(f"{title}: the model's chat template takes no system turn, so the prompts go without theirs")
    assert results is not None
    return plain_result(task.name, title, results)


@contextlib.contextmanager
def _own_faults_told(task: Task, config: EvalConfig) -> Iterator[None]:
    """What goes wrong in lm-eval by a definition of the user's own is told as that.

    Raises:
        UsageError: naming the file.
    """
    try:
        yield
    except Exception as error:
        own = Path(config.include_path).resolve() if config.include_path else None
        place = task.definition or own
        if own is None or place is None or not place.resolve().is_relative_to(own) or translate(error) is not None:
            raise
        ours = Path(__file__).parents[1]
        files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(file.is_relative_to(ours) and file != Path(__file__) for file in files):
            raise
        what = f"{type(error).__name__}: {innermost(error)}"
        raise UsageError(
            f"{place}: lm-eval cannot score {task.name} by this definition: {what}",
            "-vv shows where in lm-eval; its docs/task_guide.md has what a definition says.",
        ) from error


def _seed() -> None:
    """The seeds of lm-eval's own command line; some tasks shuffle their choices when they are loaded."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def load_task(task: Task, *, data_dir: Path | None, folder: Path) -> Any:
    """lm-eval's task object with its documents, its number of examples and the seed of lm-eval's own command line."""
    from lm_eval.tasks import TaskManager

    definition = task_definition(task, data_dir=data_dir, folder=folder)
    try:
        spec = _with_overrides(task, definition) if task.overrides or definition is None else str(definition)
        loaded = TaskManager(include_defaults=False).load([spec])["tasks"][task.name]
    except Exception as error:
        known = translate(error)
        local = local_documents(task, data_dir)
        if local and (known is None or isinstance(known, UsageError)):
            path = ", ".join(map(str, local.values()))
            raise UsageError(f"{path}: not the documents of {task.name}: {innermost(error)}") from error
        raise dataset_error(task.name, error) from error
    loaded.set_config(key="num_fewshot", value=task.num_fewshot)
    loaded.set_fewshot_seed(seed=_SEED)
    if task.num_fewshot:
        _check_examples(task, loaded)
    return loaded


def _with_overrides(task: Task, definition: Path | None) -> dict[str, Any]:
    """A task's definition as its group has it."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml, load_yaml

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if isinstance(value, str) and value.startswith("!function "):
            path = Path(value.removeprefix("!function "))
            return _import_func_in_yml(path.name, path.parent)
        return value

    whole = load_yaml(definition) if definition is not None else {}
    return {**whole, **resolved(dict(task.overrides)), "task": task.name}


def _check_examples(task: Task, loaded: Any) -> None:
    """Refuse more examples than there are; where they are drawn from the questions, a question is none of its own."""
    if not hasattr(loaded, "sampler"):  # of a task that is a class of its own
        return
    there = len(loaded.sampler.fewshot_docs()) - (loaded.fewshot_cfg.split == loaded.config.test_split)
    if task.num_fewshot > there:
        raise UsageError(f"eval.num_fewshot: {task.name} has documents for {there} examples, not {task.num_fewshot}.")


@contextlib.contextmanager
def _in_our_way(title: str) -> Iterator[None]:
    """Our progress for the making of requests, whose bar lm-eval has no switch for, and no processes for errors."""
    import lm_eval.api.metrics as metrics
    import lm_eval.api.task as module

    def shown(documents: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        if total is None or total < _SHOW_READING_FROM:
            yield from documents
            return
        with progress.progress(f"{title}: reading", total, "documents") as step:
            for document in documents:
                yield document
                step.advance()

    def errors(score: Callable[[Any], float], values: Any, iters: int) -> float:
        """lm-eval's bootstrap: its forked workers would take our signals, and it has a bar without a switch too."""
        draw = random.Random(0)
        return metrics.sample_stddev([score(draw.choices(values, k=len(values))) for _ in range(iters)])

    bar, bootstrap = module.tqdm, metrics.bootstrap_stderr
    module.tqdm, metrics.bootstrap_stderr = shown, errors
    try:
        yield
    finally:
        module.tqdm, metrics.bootstrap_stderr = bar, bootstrap


@contextlib.contextmanager
def _quiet() -> Iterator[dict[str, list[str]]]:
    """Keep the libraries' logs and bars off the screen below -vv, and their prints off stdout.

    Yields what they said that the user should know, by how it begins.
    """
    import datasets

    from lors_cli.models.quiet import quiet_libraries

    told: dict[str, list[str]] = {_CUT: [], _NO_SYSTEM: []}

    def watch(record: logging.LogRecord) -> bool:
        """Whether it is to be shown; what we say in our own words is collected instead."""
        for start, messages in told.items():
            if str(record.msg).startswith(start):
                messages.append(record.getMessage())
                return False
        return console.verbosity() >= 2

    harness, model_log = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    levels = harness.level, model_log.level, datasets.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    if console.verbosity() < 2:
        harness.setLevel(logging.ERROR)
        model_log.setLevel(logging.WARNING)
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
    model_log.addFilter(watch)
    try:
        with quiet_libraries(), contextlib.redirect_stdout(sys.stderr):
            yield told
    finally:
        model_log.removeFilter(watch)
        harness.setLevel(levels[0])
        model_log.setLevel(levels[1])
        datasets.logging.set_verbosity(levels[2])
        if bars:
            datasets.enable_progress_bars()
