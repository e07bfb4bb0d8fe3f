"""The card that a checkpoint goes to the hub with: that of its stage, with its scores and its name there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import atomic, hashes, records
from lors_cli.files.records import StageRecord
from lors_cli.models.card import CardScores, model_card, recipe_text
from lors_cli.models.origins import made_from, read_fields
from lors_cli.models.packed.measured import packed_size
from lors_cli.models.sources import is_known_as
from lors_cli.output import console
from lors_cli.output.markdown import table
from lors_cli.pipeline.standing import RECIPE_NAME

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def made_card(folder: Path, record: StageRecord, name: str, scores: Path | None) -> dict[str, Path | bytes]:
    """The card and the recipe of a checkpoint that a stage wrote; a card that was edited stays as it is.

    Args:
        name: on the hub.
        scores: an eval folder; default: that of the run.

    Raises:
        MissingError, UsageError: `scores` holds none of this model.
    """
    place, weights = (folder, record) if record.stage != "pack" else made_from(folder, record) or (folder, record)
    origin = made_from(place, weights)
    base = origin[1] if origin else None
    found = _scores((folder, record), (place, weights), origin, scores)
    card = folder / records.CARD_NAME
    if weights.stage == "pack":  # of what it was made from its card alone is left
        console.info(f"{card} goes as it is, without scores of lors.")
        return {}
    prune = next((made.config for made in (weights, base) if made and made.stage == "prune"), None)
    tune = weights.config if weights.stage == "tune" else None
    dense, fingerprint = (str((base or weights).inputs.get(key, "")) for key in ("path", "model"))
    fields = {key: value for key, value in read_fields(folder).items() if key in FIELDS}
    packed = packed_size(folder, record) if record.stage == "pack" else None
    settings = {"prune": prune, "tune": tune, "pack": {} if packed else None, "eval": found.settings if found else None}
    recipe = recipe_text(fields.get("base_model") or dense, settings, fingerprint)
    files: dict[str, Path | bytes] = {RECIPE_NAME: recipe.encode()}
    if weights.stage == "merge":  # which knows the adapter, not how it was trained
        del files[RECIPE_NAME]
    if card.is_file() and hashes.file_sha256(card) != record.files.get(records.CARD_NAME):
        console.info(f"{card} was edited: it goes as it is, without scores of lors.")
        return files
    text = model_card(
        base_model=dense, prune=prune, tune=tune or weights.metrics.get("adapter"), metrics=weights.metrics,
        environment=record.environment, fields=fields, fingerprint=fingerprint, name=name, scores=found, packed=packed,
    )  # fmt: skip
    return {**files, records.CARD_NAME: text.encode()}


Checkpoint = tuple[Path, StageRecord]
"""A folder and its record."""
FIELDS = ("base_model", "datasets", "license", "license_name", "license_link", "language")
"""Of a card's front matter, what its stage has found out."""


def _scores(
    model: Checkpoint, weights: Checkpoint, base: Checkpoint | None, asked: Path | None
) -> CardScores | None:  # fmt: skip
    """A model's scores, or those of the one that it packs, with those of the models that it was made from."""
    place = asked or model[0].parent / "eval"
    evaluated = records.read_record(place)
    if evaluated is None or not records.is_finished(place, evaluated.fingerprint):
        if asked is not None:
            raise MissingError(f"{asked} is no folder of finished scores.", "lors eval MODEL … --out DIR writes one.")
        return None
    scored = evaluated.inputs.items()

    def label_of(*made: Checkpoint) -> str | None:
        return next((label for label, known in scored if any(is_known_as(known, *each) for each in made)), None)

    mine = {"prune": "pruned", "pack": "packed"}.get(weights[1].stage, "tuned")
    dense = next((label for label, known in scored if known == (base or weights)[1].inputs.get("model")), None)
    labels = {"dense": dense, "pruned": label_of(base) if base else None, mine: label_of(weights, model)}
    contents = {role: atomic.read_json(place / f"{label}.json") for role, label in labels.items() if label is not None}
    if mine in contents:
        return _card_scores(contents, mine, evaluated)
    if asked is not None:
        raise UsageError(f"{asked} has no scores of the model in {model[0]}.", "lors eval scores it.")
    return None


def _card_scores(contents: dict[str, Any], mine: str, evaluated: StageRecord) -> CardScores:
    from lors_cli.report.scores import by_task

    limit = evaluated.config.get("limit")
    some = f"on at most {limit:g} documents a task" if limit and limit >= 1 else f"on {limit or 0:.0%} of the documents"
    harness = (evaluated.environment.get("packages") or {}).get("lm-eval")
    note = (
        f"Accuracies in percent ± standard error, by lm-evaluation-harness{f' {harness}' if harness else ''}, "
        f"{some if limit else 'on all documents'}. "
        "The settings are in the recipe below."
    )
    columns, rows = by_task(contents)
    results = list(_results(contents[mine], evaluated.config))
    return CardScores(table(columns, rows), note, results, evaluated.config)


def _results(content: dict[str, Any], settings: dict[str, Any]) -> Iterator[EvalResult]:
    """A model's scores as the hub's model index has them.

    Args:
        settings: of the evaluation, as its record has them.
    """
    from huggingface_hub import EvalResult

    from lors_cli.evaluation.entries import resolve, tasks_of
    from lors_cli.evaluation.tasks import task_dataset
    from lors_cli.recipe.loading import stage_config
    from lors_cli.recipe.schema import EvalConfig

    config = stage_config("eval", settings)
    assert isinstance(config, EvalConfig)
    tasks = {task.name: task for task in tasks_of(resolve(config))}
    for name, metrics in content.get("tasks", {}).items():
        path, part = task_dataset(tasks[name]) if name in tasks else (None, None)
        asked = {"limit": settings.get("limit"), "num_fewshot": metrics.get("num_fewshot")}
        for metric, value in metrics.items():
            counts = metric in ("num_samples", "num_fewshot") or metric.endswith("_stderr")
            if counts or not isinstance(value, (int, float)):
                continue
            yield EvalResult(
                task_type="text-generation", dataset_type=path or name, dataset_name=name, dataset_config=part,
                dataset_args={key: found for key, found in asked.items() if found} or None,
                metric_type=metric, metric_value=round(value, 4),
            )  # fmt: skip
    for text, found in content.get("perplexity", {}).items():
        if isinstance(found.get("value"), (int, float)):
            yield EvalResult(
                task_type="text-generation", dataset_type=text, dataset_name=text, metric_type="perplexity",
                metric_value=round(found["value"], 4),
            )  # fmt: skip
