"""The eval stage: several models, their zero-shot tasks and perplexities, piece by piece.

A piece is one task or one text of one model. It is stored the moment it is finished, under a fingerprint of all
that it depends on, and kept: a later run scores only what is new or has changed. Layout below the stage's folder:

    .pieces/<model>/<task>.json     a finished piece        samples/<model>/<task>.jsonl   its documents
    <model>.json                    a model's results       stage.json                     written last
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lors_cli.data import sources as text
from lors_cli.errors import UsageError
from lors_cli.evaluation.significance import compare_models
from lors_cli.evaluation.summary import average, recovered
from lors_cli.evaluation.tasks import check_tasks, task_fingerprint
from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment, processes
from lors_cli.models import blocks, loading, sources
from lors_cli.output import console, progress
from lors_cli.recipe.schema import EvalConfig, ModelConfig

__all__ = [
    "check_tasks", "compare_models", "eval_fingerprint", "evaluate", "pending_pieces", "recovered", "samples_path",
    "take_over",
]  # fmt: skip

STAGE_VERSION = 2
_VERSIONS = {"tasks": 2, "perplexity": 1}
"""Of the code that scores a piece. Tasks: 2 since choices share their context (same scores up to rounding)."""
_LABEL = re.compile(r"^[A-Za-z0-9][\w.-]{0,99}$")
_SCRATCH = ".scratch"


@dataclass(frozen=True)
class _Piece:
    """One task or one text of one model."""

    label: str
    kind: Literal["tasks", "perplexity"]
    name: str
    fingerprint: str
    path: Path
    samples: Path | None

    def stored(self) -> dict[str, Any] | None:
        """What an earlier run found, None when there is nothing or it is out of date."""
        content = atomic.read_json(self.path)
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            return None
        if not _is_result(self.kind, content.get("result")):
            return None
        return content if self.samples is None or self.samples.is_file() else None


_PERPLEXITY_FIELDS = ("value", "tokens", "sequence_length")


def _is_result(kind: Literal["tasks", "perplexity"], value: Any) -> bool:
    """Whether a stored value is what scoring a piece gives: numbers by name, with those that are read later."""
    if not isinstance(value, dict) or not all(
        item is None or isinstance(item, (int, float)) for item in value.values()
    ):
        return False
    return all(field in value for field in (_PERPLEXITY_FIELDS if kind == "perplexity" else ("num_samples",)))


def evaluate(
    config: EvalConfig, model_configs: dict[str, ModelConfig], out: Path, *, data_dir: Path | None
) -> dict[str, dict[str, Any]]:
    """Score several models on the configured tasks and texts, as far as that is not done yet.

    Args:
        config: tasks, texts, limits; `config.models` is not read.
        model_configs: label to model, in the order of the results; a label names the model's files.
        out: the stage's folder.
        data_dir: folder with local copies of the datasets, None for the hub.

    Returns:
        Label to {"model", "tasks", "average", "perplexity"}, as in `out/<label>.json`.

    Raises:
        UsageError: an unknown task or text, or a label that can be no file name.
        MissingError: a model or data that is not there.
    """
    with processes.joined():
        return _evaluate(config, model_configs, out, data_dir)


def _evaluate(
    config: EvalConfig, model_configs: dict[str, ModelConfig], out: Path, data_dir: Path | None
) -> dict[str, dict[str, Any]]:
    check_tasks(config.tasks, data_dir)
    fingerprints = {label: sources.model_fingerprint(model) for label, model in model_configs.items()}
    pieces = _pieces(config, fingerprints, out, data_dir)
    shutil.rmtree(_scratch(out), ignore_errors=True)  # of a run that was killed
    expected = eval_fingerprint(config, fingerprints, data_dir)
    for label, model_config in model_configs.items():
        mine = [piece for piece in pieces if piece.label == label]
        missing = processes.from_main(lambda: [piece for piece in mine if piece.stored() is None])  # noqa: B023
        if missing:
            _score_model(config, model_config, missing, out, data_dir, already=len(mine) - len(missing))

    def finish() -> dict[str, dict[str, Any]]:
        results = {
            label: _collect(model_config, [piece for piece in pieces if piece.label == label])
            for label, model_config in model_configs.items()
        }
        _publish(config, results, expected, fingerprints, pieces, out)
        return results

    return processes.from_main(finish)


def eval_fingerprint(config: EvalConfig, model_fingerprints: Mapping[str, str], data_dir: Path | None) -> str:
    """The fingerprint that `stage.json` has once all of this is evaluated.

    Args:
        config: as for `evaluate`.
        model_fingerprints: label to `sources.model_fingerprint` of the model.
        data_dir: as for `evaluate`.
    """
    pieces = _pieces(config, model_fingerprints, Path(), data_dir)
    return hashes.fingerprint(
        "eval", STAGE_VERSION, None, {f"{piece.label}/{piece.path.stem}": piece.fingerprint for piece in pieces}
    )


def pending_pieces(
    config: EvalConfig, model_fingerprints: Mapping[str, str | None], out: Path, data_dir: Path | None
) -> list[tuple[str, str]]:
    """What `evaluate` would still have to score; neither models nor documents are loaded for it.

    Args:
        config: as for `evaluate`.
        model_fingerprints: label to `sources.model_fingerprint`, None for a model that is yet to be made.
        out: the stage's folder.
        data_dir: as for `evaluate`.

    Returns:
        Pairs of label and task or text.
    """
    known = {label: fingerprint or "" for label, fingerprint in model_fingerprints.items()}
    pieces = _pieces(config, known, out, data_dir)
    return [
        (piece.label, piece.name)
        for piece in pieces
        if model_fingerprints[piece.label] is None or piece.stored() is None
    ]


def take_over(
    config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path, folders: Iterable[Path], data_dir: Path | None
) -> int:
    """Copy from other evaluations what they have measured already of the same model, and how much that is.

    Args:
        config: as for `evaluate`.
        model_fingerprints: label to `sources.model_fingerprint`.
        out: the stage's folder.
        folders: of other evaluations, with the same labels.
        data_dir: as for `evaluate`.
    """
    taken = 0
    others = [folder for folder in folders if folder != out]
    for piece in _pieces(config, model_fingerprints, out, data_dir):
        if piece.stored() is not None:
            continue
        for folder in others:
            samples = piece.samples and folder / piece.samples.relative_to(out)
            twin = replace(piece, path=folder / piece.path.relative_to(out), samples=samples)
            if twin.stored() is not None:
                if piece.samples and samples:
                    atomic.write_bytes(piece.samples, samples.read_bytes())
                atomic.write_bytes(piece.path, twin.path.read_bytes())
                taken += 1
                break
    return taken


def _pieces(
    config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path, data_dir: Path | None
) -> list[_Piece]:
    """Every piece of the stage, in the order of scoring."""
    from importlib.metadata import version

    for label in model_fingerprints:
        if not _LABEL.match(label) or label in ("stage", "samples"):
            raise UsageError(f"{label!r} cannot be a model's name in the results.", "Use letters, digits, . _ -")
    settings = {"batch_size": config.batch_size, "transformers": version("transformers").split(".")[0]}
    contents: list[tuple[Literal["tasks", "perplexity"], str, list[Any]]] = [
        *(("tasks", name, [task_fingerprint(name, data_dir), config.limit]) for name in config.tasks),
        *(
            ("perplexity", name, [text.fingerprint_source(name, split="validation", data_dir=data_dir),
                                  config.perplexity_windows, config.perplexity_length])
            for name in config.perplexity
        ),
    ]  # fmt: skip
    return [
        _Piece(
            label,
            kind,
            name,
            hashes.fingerprint(f"eval/{kind}", _VERSIONS[kind], settings, {"model": model, "content": content}),
            out / ".pieces" / label / f"{_file_stem(kind, name)}.json",
            samples_path(out, label, name) if kind == "tasks" else None,
        )
        for label, model in model_fingerprints.items()
        for kind, name, content in contents
    ]


def samples_path(out: Path, label: str, task: str) -> Path:
    """Where a task's results are, document by document.

    Args:
        out: the stage's folder.
        label: the model's.
        task: its name.
    """
    return out / "samples" / label / f"{_file_stem('tasks', task)}.jsonl"


def _file_stem(kind: str, name: str) -> str:
    """A file name for a task or text: its own where that is plain, else with a few digits of its hash."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).name)[:80]
    if stem != name:
        stem += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return stem if kind == "tasks" else f"perplexity-{stem}"


def _scratch(out: Path) -> Path:
    """Where this process writes while it scores."""
    return out / f"{_SCRATCH}{processes.process_index() or ''}"


def _score_model(
    config: EvalConfig,
    model_config: ModelConfig,
    pieces: list[_Piece],
    out: Path,
    data_dir: Path | None,
    already: int,
) -> None:
    """Load one model, score its missing pieces, store each, and free the model."""
    label = pieces[0].label
    done = f", {already} done before" if already else ""
    console.info(f"  {label}: {len(pieces)} to score{done} ({model_config.path})")
    scratch = _scratch(out)
    model, tokenizer = loading.load_model(model_config), loading.load_tokenizer(model_config)
    try:
        for number, piece in enumerate(pieces, start=1):
            started = time.monotonic()
            if piece.kind == "tasks":
                result = _score_task(config, model, tokenizer, piece, scratch, data_dir)
                shown = ", ".join(
                    f"{key} {result[key]:.4f}" for key in ("acc", "acc_norm") if result.get(key) is not None
                )
            else:
                result = _score_text(config, model, tokenizer, piece, data_dir)
                shown = f"perplexity {result['value']:.3f}" if result["value"] is not None else "no finite perplexity"
            elapsed_s = time.monotonic() - started
            content = {"fingerprint": piece.fingerprint, "elapsed_s": round(elapsed_s, 3), "result": result}
            if processes.is_main():
                atomic.write_json(piece.path, content)
            console.info(
                f"  {label} {piece.name} ({number}/{len(pieces)}): {shown or 'done'} in {progress.duration(elapsed_s)}"
            )
    finally:
        del model, tokenizer
        _free_memory()
        shutil.rmtree(scratch, ignore_errors=True)


def _score_task(
    config: EvalConfig, model: Any, tokenizer: Any, piece: _Piece, scratch: Path, data_dir: Path | None
) -> dict[str, Any]:
    """Score one task and write its documents."""
    from lors_cli.evaluation.harness import score_task

    result = score_task(
        model,
        tokenizer,
        piece.name,
        limit=config.limit,
        batch_size=config.batch_size,
        data_dir=data_dir,
        folder=scratch,
        label=piece.label,
    )
    assert piece.samples is not None
    if not processes.is_main():
        return result.metrics
    lines = (json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n" for sample in result.samples)
    piece.path.unlink(missing_ok=True)  # of other settings: it would be taken for that of these documents
    atomic.write_text(piece.samples, "".join(lines))
    return result.metrics


def _score_text(config: EvalConfig, model: Any, tokenizer: Any, piece: _Piece, data_dir: Path | None) -> dict[str, Any]:
    """Measure one perplexity."""
    from lors_cli.data.tokens import perplexity_windows
    from lors_cli.evaluation.harness import finite
    from lors_cli.evaluation.perplexity import token_perplexity

    windows = perplexity_windows(
        piece.name,
        tokenizer,
        sequence_length=config.perplexity_length,
        model_max_length=blocks.model_max_length(model),
        max_windows=config.perplexity_windows,
        data_dir=data_dir,
    )
    with progress.progress(f"{piece.label} perplexity {piece.name}", len(windows), "windows") as step:
        found = token_perplexity(model, windows, batch_size=config.batch_size, on_progress=step.advance)
    result = {key: finite(value) for key, value in found.items()}
    if result["value"] is None:
        console.warn(f"{piece.label}: the perplexity of {piece.name} is not finite; null is stored")
    return result


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _collect(model_config: ModelConfig, pieces: list[_Piece]) -> dict[str, Any]:
    """One model's results from its stored pieces: results only, no times."""
    stored: dict[str, dict[str, Any]] = {"tasks": {}, "perplexity": {}}
    for piece in pieces:
        content = piece.stored()
        assert content is not None, piece
        stored[piece.kind][piece.name] = content["result"]
    return {
        "model": model_config.path,
        "tasks": stored["tasks"],
        "average": average(stored["tasks"]),
        "perplexity": {
            name: {key: result[key] for key in _PERPLEXITY_FIELDS} for name, result in stored["perplexity"].items()
        },
    }


def _publish(
    config: EvalConfig,
    results: dict[str, dict[str, Any]],
    expected: str,
    model_fingerprints: dict[str, str],
    pieces: list[_Piece],
    out: Path,
) -> None:
    """Write each model's results and, last, the stage's record; files that already say so are left alone."""
    for label, content in results.items():
        if atomic.read_json(out / f"{label}.json") != content:
            atomic.write_json(out / f"{label}.json", content)
    files = {f"{label}.json": hashes.file_sha256(out / f"{label}.json") for label in sorted(results)}
    old = records.read_record(out)
    if old is not None and old.fingerprint == expected and old.files == files:
        return
    for stale in sorted(set(old.files if old else ()) - set(files)):
        (out / stale).unlink(missing_ok=True)
    metrics = {
        label: {
            "average_acc": content["average"]["value"],
            "perplexity": {name: item["value"] for name, item in content["perplexity"].items()},
        }
        for label, content in results.items()
    }
    elapsed_s = sum((piece.stored() or {})["elapsed_s"] for piece in pieces)
    record = records.StageRecord(
        stage="eval",
        fingerprint=expected,
        config=hashes.plain(config),
        inputs=dict(model_fingerprints),
        metrics=metrics,
        environment=environment.environment(),
        elapsed_s=round(elapsed_s, 3),
        files=files,
    )
    atomic.write_json(out / records.RECORD_NAME, asdict(record))
