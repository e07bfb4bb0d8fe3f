"""The eval stage: several models, their zero-shot tasks and perplexities, piece by piece.

What is written below the stage's folder, besides the pieces (see `pieces`):

    <model>.json    a model's results       texts/<model>.json    its short texts       stage.json    written last
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lors_cli.data.known import resolve_data_dir
from lors_cli.errors import UsageError
from lors_cli.evaluation.entries import Entry, groups_of, resolve
from lors_cli.evaluation.groups import task_rows
from lors_cli.evaluation.pieces import PERPLEXITY_FIELDS, Piece, pending, pieces_of, whole_fingerprint
from lors_cli.evaluation.plain_results import finite
from lors_cli.evaluation.summary import average
from lors_cli.evaluation.tasks import check_tasks
from lors_cli.evaluation.texts import lacking_texts, published, write_texts
from lors_cli.files import atomic, hashes, locks, records
from lors_cli.machine import environment, processes
from lors_cli.machine.memory import collect_garbage
from lors_cli.models import blocks, loading, sources
from lors_cli.output import console, progress
from lors_cli.recipe.schema import EvalConfig, ModelConfig

_SCRATCH = ".scratch"


def evaluate(
    config: EvalConfig, models: Mapping[str, ModelConfig | str | Path], out: Path | str, *,
    data_dir: Path | str | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Score several models on the configured tasks and texts, as far as that is not done yet.

    Args:
        config: its `models` is not read.
        models: label to model (a folder or hub id, or its settings), in the order of the results; a label names the
            model's files.
        out: stage folder, which all processes see.
        data_dir: folder with local copies of the datasets; default `$LORS_DATA_DIR`, else the hub.

    Returns:
        Label to {"model", "tasks", "average", "perplexity"}, as in `out/<label>.json`.

    Raises:
        UsageError: an unknown task or text, a label that can be no file name, or models without labels.
        MissingError: a model or data that is not there.
    """
    if not isinstance(models, Mapping):
        raise UsageError(f"models are given by label, as in {{'mine': 'folder'}}, not as {models!r}.")
    model_configs = {label: ModelConfig.of(model) for label, model in models.items()}
    out, data_dir = Path(out), resolve_data_dir(data_dir)
    with processes.joined():
        check_tasks(config, data_dir)
        fingerprints = {label: sources.model_fingerprint(model) for label, model in model_configs.items()}
        pieces = pieces_of(config, fingerprints, out, data_dir)
        processes.from_main(partial(_clear, out))
        for label, model_config in model_configs.items():
            mine = [piece for piece in pieces if piece.label == label]
            missing = processes.from_main(partial(pending, mine))
            lacks_texts = processes.from_main(partial(lacking_texts, config, {label: fingerprints[label]}, out))
            if missing or lacks_texts:
                last = partial(write_texts, config=model_config, label=label, model_fingerprint=fingerprints[label],
                               out=out) if lacks_texts else None  # fmt: skip
                already = len(mine) - len(missing)
                _score_model(config, model_config, label, missing, out, data_dir, already=already, last=last)
        return processes.from_main(lambda: _publish(config, model_configs, fingerprints, pieces, out))


def _clear(out: Path) -> None:
    """Remove what processes of a run that was killed have left, however many they were."""
    for scratch in [*out.glob(f"{_SCRATCH}*")]:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(out: Path) -> Path:
    """Where this process writes while it scores."""
    return out / f"{_SCRATCH}{processes.process_index() or ''}"


def _score_model(
    config: EvalConfig, model_config: ModelConfig, label: str, pieces: list[Piece], out: Path, data_dir: Path | None, *,
    already: int, last: Callable[[Any, Any], None] | None,
) -> None:  # fmt: skip
    """Load one model, score its missing pieces, store each, do what is `last` on process 0, and free the model."""
    done = f", {already} done before" if already else ""
    console.info(f"  {label}: {len(pieces)} to score{done} ({model_config.path})")
    scratch = _scratch(out)
    tokenizer = loading.load_tokenizer(model_config)
    if config.apply_chat_template:
        check_chat_template(tokenizer, model_config)
    model = loading.load_model(model_config)
    try:
        for number, piece in enumerate(pieces, start=1):
            started = time.monotonic()
            if piece.kind == "tasks":
                result = _score_task(config, model, tokenizer, piece, scratch, data_dir)
                shown = ", ".join(
                    f"{key} {value:.4f}"
                    for key, value in result.items()
                    if value is not None and key.partition(",")[0] in ("acc", "acc_norm", "exact_match")
                )
            else:
                result = _score_text(config, model_config, model, tokenizer, piece, data_dir)
                shown = f"perplexity {result['value']:.3f}" if result["value"] is not None else "no finite perplexity"
            elapsed_s = time.monotonic() - started
            content = {"fingerprint": piece.fingerprint, "elapsed_s": round(elapsed_s, 3), "result": result}
            if processes.is_main():
                atomic.write_json(piece.path, content)
            console.info(
                f"  {label} {piece.name} ({number}/{len(pieces)}): {shown or 'done'} in {progress.duration(elapsed_s)}"
            )
        if last is not None:
            processes.from_main(partial(last, model, tokenizer))
    finally:
        del model, tokenizer
        collect_garbage()
        shutil.rmtree(scratch, ignore_errors=True)


def _score_task(
    config: EvalConfig, model: Any, tokenizer: Any, piece: Piece, scratch: Path, data_dir: Path | None
) -> dict[str, Any]:
    """Score one task and write its documents."""
    from lors_cli.evaluation.harness import score_task

    assert piece.task is not None
    result = score_task(model, tokenizer, piece.task, config, data_dir=data_dir, folder=scratch, label=piece.label)
    _write_samples(piece, result.samples)
    return result.metrics


def _write_samples(piece: Piece, rows: Iterable[dict[str, Any]]) -> None:
    """Write a piece's documents or windows, on process 0."""
    if processes.is_main():
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        piece.path.unlink(missing_ok=True)  # of other settings: it would be taken for that of these rows
        atomic.write_text(piece.samples, "".join(lines))


def _score_text(
    config: EvalConfig, model_config: ModelConfig, model: Any, tokenizer: Any, piece: Piece, data_dir: Path | None
) -> dict[str, Any]:
    """Measure one perplexity and write its windows."""
    import torch

    from lors_cli.data.tokenising import window_length
    from lors_cli.data.tokens import perplexity_windows
    from lors_cli.evaluation.perplexity import token_perplexity

    length, limit = config.perplexity_length, blocks.model_max_length(model)
    with_bos = model_config.add_bos_token is True and not piece.name.endswith(".safetensors")
    windows = perplexity_windows(
        piece.name,
        tokenizer,
        sequence_length=window_length(length, limit, "perplexity_length") - 1 if with_bos else length,
        model_max_length=limit,
        max_windows=config.perplexity_windows,
        data_dir=data_dir,
    )
    if with_bos:
        windows = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    with progress.progress(f"{piece.label} perplexity {piece.name}", len(windows), "windows") as step:
        found = token_perplexity(model, windows, batch_size=config.batch_size, on_progress=step.advance)
    nlls = found.pop("window_nll")
    _write_samples(piece, ({"tokens": hashes.digits(json.dumps(window), 16), "nll": finite(nll)}
                           for window, nll in zip(windows.tolist(), nlls, strict=True)))  # fmt: skip
    result = {key: finite(value) for key, value in found.items()}
    if result["value"] is None:
        console.warn(f"{piece.label}: the perplexity of {piece.name} is not finite; null is stored")
    return result


def _publish(
    config: EvalConfig,
    model_configs: Mapping[str, ModelConfig],
    model_fingerprints: Mapping[str, str],
    pieces: list[Piece],
    out: Path,
) -> dict[str, dict[str, Any]]:
    """Write each model's results and, last, the stage's record; files that already say so are left alone."""
    locks.check(out)
    stored = [(piece, piece.stored() or {}) for piece in pieces]
    entries = resolve(config)
    results = {
        label: _collect(
            model.path, entries, [(piece, content["result"]) for piece, content in stored if piece.label == label]
        )
        for label, model in model_configs.items()
    }
    for label, content in results.items():
        if atomic.read_json(out / f"{label}.json") != content:
            atomic.write_json(out / f"{label}.json", content)
    files = {f"{label}.json": hashes.file_sha256(out / f"{label}.json") for label in sorted(results)}
    files |= published(config, results, out)
    old, expected = records.read_record(out), whole_fingerprint(config, pieces)
    if old is not None and old.fingerprint == expected and old.files == files:
        return results
    for stale in sorted(records.earlier_files(out) - set(files)):
        (out / stale).unlink(missing_ok=True)
    metrics = {
        label: {
            "average_acc": content["average"]["value"],
            "perplexity": {name: item["value"] for name, item in content["perplexity"].items()},
        }
        for label, content in results.items()
    }
    record = records.StageRecord(
        stage="eval",
        fingerprint=expected,
        config=hashes.plain(config),
        inputs=dict(model_fingerprints),
        metrics=metrics,
        environment=environment.environment(),
        elapsed_s=round(sum(content["elapsed_s"] for _, content in stored), 3),
        files=files,
    )
    atomic.write_json(out / records.RECORD_NAME, asdict(record))
    (out / records.JOURNAL_NAME).unlink(missing_ok=True)
    return results


def _collect(path: str, entries: Sequence[Entry], found: list[tuple[Piece, dict[str, Any]]]) -> dict[str, Any]:
    """One model's results from those of its pieces: results only, no times."""
    scores = {piece.name: result for piece, result in found if piece.kind == "tasks"}
    texts = {piece.name: result for piece, result in found if piece.kind == "perplexity"}
    tasks, groups = task_rows(entries, scores), {group.name: group for group in groups_of(entries)}
    members = {name: [member.name for member in group.members] for name, group in groups.items()}
    return {
        "model": path,
        "tasks": tasks,
        **({"groups": members} if members else {}),
        "average": average(tasks, [entry.name for entry in entries]),
        "perplexity": {name: {key: result[key] for key in PERPLEXITY_FIELDS} for name, result in texts.items()},
    }


def check_chat_template(tokenizer: Any, model: ModelConfig) -> None:
    """Refuse a model without a chat template, for prompts that are to be put into it.

    Raises:
        UsageError: it has none.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"eval.apply_chat_template: {model.path} has no chat template.",
            "Leave it out, or score a model that was tuned for chat.",
        )
