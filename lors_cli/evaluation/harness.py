"""Scoring a model on one task with lm-evaluation-harness, without its noise.

lm-eval is called below `simple_evaluate`, at `lm_eval.evaluate`: the outer function adds package lists and model
look-ups on the hub to every result, seconds a task, and does for the rest what `_load_task` does here.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError, innermost, translate
from lors_cli.evaluation.documents import check_documents
from lors_cli.evaluation.plain_results import TaskResult, plain_result
from lors_cli.evaluation.tasks import dataset_error, documents_file, task_definition
from lors_cli.output import console, progress

_SEED = 1234
_BOOTSTRAP_ROUNDS = 1000
_SHOW_READING_FROM = 1000


def score_task(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    limit: int | None,
    batch_size: int,
    data_dir: Path | None,
    folder: Path,
    label: str = "",
) -> TaskResult:
    """Score a causal LM, in evaluation mode, on one task, zero-shot.

    Args:
        limit: at most so many documents, the first ones.
        data_dir: folder with local copies of the seven tasks' documents, None for the hub.
        folder: for generated files; may be deleted afterwards.
        label: the model's name, for the progress display.

    Raises:
        UsageError: an unknown task, or a choice that the model is too short for.
        MissingError: documents that are neither in `data_dir` nor to be had from the hub.
    """
    definition = task_definition(task, data_dir=data_dir, folder=folder)
    local = documents_file(task, data_dir)
    if local is not None:
        check_documents(task, local)
    title = f"{label} {task}".strip()
    with _quiet() as cut_requests, _shown_reading(title):
        import lm_eval

        from lors_cli.evaluation.shown_model import ShownModel

        _seed()
        loaded = _load_task(task, definition, local)
        lm = ShownModel(model, tokenizer, batch_size, title)
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {task: loaded}},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ROUNDS,
            log_samples=True,
        )
    num_cut = lm.num_cut + len(cut_requests)
    if num_cut:
        console.warn(f"{title}: {num_cut} requests exceed the model's length and were cut on the left")
    assert results is not None
    return plain_result(task, title, results)


def _seed() -> None:
    """The seeds of lm-eval's own command line; some tasks shuffle their choices when they are loaded."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _load_task(name: str, definition: Path, local: Path | None) -> Any:
    """lm-eval's task object, zero-shot and with a fixed seed, its documents loaded, from the file `local` if given."""
    from lm_eval.tasks import TaskManager

    try:
        loaded = TaskManager(include_defaults=False).load([str(definition)])["tasks"]
    except Exception as error:
        known = translate(error)
        if local is not None and (known is None or isinstance(known, UsageError)):
            raise UsageError(f"{local}: not the documents of {name}: {innermost(error)}") from error
        raise dataset_error(name, error) from error
    task = loaded[name]
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    return task


@contextlib.contextmanager
def _shown_reading(title: str) -> Iterator[None]:
    """Our progress for the making of requests, whose bar lm-eval has no switch for."""
    import lm_eval.api.task as module

    def shown(documents: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        if total is None or total < _SHOW_READING_FROM:
            yield from documents
            return
        with progress.progress(f"{title}: reading", total, "documents") as step:
            for document in documents:
                yield document
                step.advance()

    original = module.tqdm
    module.tqdm = shown
    try:
        yield
    finally:
        module.tqdm = original


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the libraries' logs and bars off the screen below -vv, and their prints off stdout; yields cut requests."""
    import datasets

    from lors_cli.models.quiet import quiet_libraries

    cut: list[str] = []

    def watch(record: logging.LogRecord) -> bool:
        """Whether it is to be shown; notices of requests that were cut to the model's length are collected instead."""
        if not str(record.msg).startswith("Combined length of context"):
            return console.verbosity() >= 2
        cut.append(record.getMessage())
        return False

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
            yield cut
    finally:
        model_log.removeFilter(watch)
        harness.setLevel(levels[0])
        model_log.setLevel(levels[1])
        datasets.logging.set_verbosity(levels[2])
        if bars:
            datasets.enable_progress_bars()
