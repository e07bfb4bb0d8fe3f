"""Scoring a model on one task with lm-evaluation-harness, without its noise.

lm-eval is called below `simple_evaluate`, at `lm_eval.evaluate`: the outer function adds package lists and model
look-ups on the hub to every result, seconds a task, and does for the rest what `_load_task` does here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError, UsageError, innermost, translate
from lors_cli.evaluation.documents import check_documents
from lors_cli.evaluation.tasks import documents_file, task_definition
from lors_cli.machine import processes as parallel
from lors_cli.output import console, progress

_SEED = 1234
_BOOTSTRAP_ROUNDS = 1000
_SHOW_READING_FROM = 1000
_SCORES = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskResult:
    """A task's scores as plain JSON values; what is not a finite number is None."""

    metrics: dict[str, float | int | None]
    """acc, acc_stderr, acc_norm, acc_norm_stderr, other metrics of the task, num_samples."""
    samples: list[dict[str, Any]]
    """A document each: doc_id, target, log_likelihoods of the choices (or responses), acc, acc_norm as 0 or 1."""


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
    """Score a causal LM on one task, zero-shot.

    Args:
        model: causal LM in evaluation mode, on its device.
        tokenizer: its tokenizer.
        task: one of the seven tasks, pydoc_choice, or any task of lm-eval.
        limit: at most so many documents, the first ones.
        batch_size: sequences a forward pass, see `score_choices`.
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

        _seed()
        loaded = _load_task(task, definition, local)
        lm = _shown_model_class()(model, tokenizer, batch_size, title)
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
    return _plain_result(task, title, results)


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
        if known is None and isinstance(error, FileNotFoundError):  # a metric or script that is fetched by name
            known = MissingError(str(error).splitlines()[0])
        if not isinstance(known, MissingError):
            raise
        hint = "Connect, or give a folder of local copies as data_dir (or $LORS_DATA_DIR)."
        raise MissingError(f"The task {name} cannot be loaded: {known.message}", hint) from error
    task = loaded[name]
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    return task


@functools.cache
def _shown_model_class() -> Any:
    """lm-eval's Hugging Face model with our scoring of choices, and our progress in place of its bars."""
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    from lors_cli.evaluation.prefix_tree import Choice
    from lors_cli.evaluation.scoring import score_choices

    class Counter(CacheHook):
        """Hears of every finished request; lm-eval calls it to fill a cache, which is not kept here."""

        def __init__(self, step: progress.Task) -> None:
            super().__init__(None)
            self.step = step

        def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
            self.step.advance()

    class ShownModel(HFLM):
        def __init__(self, model: Any, tokenizer: Any, batch_size: int, title: str) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
            self.title = title
            self.num_cut = 0

        @contextlib.contextmanager
        def counted(self, total: int, unit: str) -> Iterator[None]:
            with progress.progress(self.title, total, unit) as step:
                self.set_cache_hook(Counter(step))
                yield

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            with progress.progress(self.title, len(requests), "requests") as step:
                choices = [self.choice(request) for request in requests]
                return score_choices(self.model, choices, batch_size=self.batch_size, on_progress=step.advance)

        def choice(self, request: Any) -> Choice:
            """A request's tokens, those of lm-eval."""
            context, continuation = self.encode(*request.args)
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"{self.title}: document {request.doc_id} has a choice of {len(continuation)} tokens; "
                    f"1 to {self.max_length} can be scored with this model."
                )
            tokens = [*context, *continuation]
            self.num_cut += len(tokens) > self.max_length + 1
            return Choice(tokens[-(self.max_length + 1) :][:-1], continuation, (request.task_name, request.doc_id))

        def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """As lm-eval's `loglikelihood` has it, where it is no function of its own."""
            if context:
                return self._encode_pair(context, continuation)
            tokens = self.tok_encode(continuation, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                return tokens[:1], tokens[1:]
            return [self.prefix_token_id], tokens

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            with self.counted(len(requests), "requests"):
                return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            """One document at a time, since lm-eval reports none before all are done."""
            with self.counted(len(requests), "documents"):
                score = super().loglikelihood_rolling
                processes = parallel.num_processes()
                mine = [
                    score([request], disable_tqdm=True)[0]
                    for request in requests[parallel.process_index() :: processes]
                ]
                parts = parallel.gather(mine)
                return [parts[number % processes][number // processes] for number in range(len(requests))]

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Any]:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    return ShownModel


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


class _CutRequests(logging.Filter):
    """Collects lm-eval's notices of requests that were cut to the model's length, instead of printing them."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Combined length of context"):
            return console.verbosity() >= 2
        self.found.append(record.getMessage())
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the libraries' logs and bars off the screen below -vv, and their prints off stdout; yields cut requests."""
    import datasets

    from lors_cli.models.quiet import quiet_libraries

    cut: list[str] = []
    harness, model_log = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    levels = harness.level, model_log.level, datasets.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    watch = _CutRequests(cut)
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


def _plain_result(task: str, title: str, results: dict[str, Any]) -> TaskResult:
    """lm-eval's results as plain JSON values, for one task."""
    samples = [_plain_sample(sample) for sample in results["samples"][task]]
    metrics: dict[str, float | int | None] = {}
    for name, value in results["results"][task].items():
        metric, _, choice = name.partition(",")
        if choice:
            metrics[metric if choice == "none" else name] = finite(value)
    broken = sum(1 for sample in results["samples"][task] if _has_nan(sample["filtered_resps"]))
    if broken:  # the largest of NaNs is the first one: such an accuracy says nothing
        console.warn(f"{title}: the model gives NaN on {broken} of {len(samples)} documents; there is no score")
        metrics = dict.fromkeys(metrics)
    metrics["num_samples"] = int(results["n-samples"][task]["effective"])
    return TaskResult(metrics, samples)


def _plain_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one document: not its text, which the data has."""
    plain: dict[str, Any] = {"doc_id": int(sample["doc_id"]), "target": _plain_value(sample["target"])}
    if sample["filter"] != "none":
        plain["filter"] = sample["filter"]
    answers = sample["filtered_resps"]
    if answers and all(isinstance(answer, tuple) and len(answer) == 2 for answer in answers):
        plain["log_likelihoods"] = [finite(answer[0]) for answer in answers]
    else:
        plain["responses"] = _plain_value(answers)
    for name in sample["metrics"]:
        value = _plain_value(sample[name])
        plain[name] = int(value) if name in _SCORES and value is not None else value
    return plain


def _plain_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    number = finite(value)
    return str(value) if number is None and not _is_number(value) else number


def finite(value: Any) -> float | int | None:
    """The value as a plain number, None when it is none or not a finite one."""
    if not _is_number(value):
        return None
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _has_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_nan(item) for item in value)
    return isinstance(value, float) and math.isnan(value)
