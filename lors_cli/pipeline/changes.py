"""What a stage would replace in its folder, and why: settings, inputs and code that are no longer the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError, shorten
from lors_cli.files import atomic, hashes, records
from lors_cli.output.console import counted
from lors_cli.pipeline.stages import STAGES
from lors_cli.recipe.loading import stage_config

LISTED = 6
"""Settings that a message names."""
KEEP = "to keep it: --out OTHER"
_CONTENTS = {
    "data": "data.dataset", "mix": "data.mix", "calibration": "calibration.dataset", "teacher": "distill.teacher",
}  # fmt: skip
"""What is read beside the model, by its key in a record's inputs, and the setting that names it."""


@dataclass(frozen=True)
class Made:
    """What a result is made from: the settings of its stage, as stored, and the fingerprints of what it reads."""

    config: dict[str, Any]
    inputs: dict[str, Any]


def what_changes(stage: str, folder: Path, fingerprint: str, wanted: Callable[[], Made]) -> str:
    """What lies in a stage's folder that the stage would replace or drop, and why; "" where nothing does.

    Args:
        wanted: what is to be made, asked for only if it is needed.
    """
    parts = []
    record = records.read_record(folder)
    if record is not None and record.fingerprint == fingerprint:
        parts.append("a file of the finished result was changed or removed; it is made anew")
    elif record is not None:
        why = _differences(stage, Made(record.config, record.inputs), wanted())
        parts.append(f"{why}, replaces {_result(record)}; {KEEP}")
    begun = atomic.read_json(folder / records.WORK_NAME / records.FINGERPRINT_NAME)
    done = _progress(folder, str(begun)) if begun not in (None, fingerprint) else ""
    if done:
        known: Any = atomic.read_json(folder / records.WORK_NAME / records.MADE_NAME)
        why = _differences(stage, Made(**known), wanted()) if records.is_made(known) else "other settings"
        parts.append(f"{why}, drops what an interrupted run had done ({done})" + ("" if record else f"; {KEEP}"))
    return "; ".join(parts)


def what_scores_change(folder: Path, fingerprint: str, config: Any, models: Mapping[str, str]) -> str:
    """Which scores in an evaluation's folder would be replaced, and why; what is only added is not told.

    Args:
        models: fingerprints by label.
    """
    record = records.read_record(folder)
    if record is None or record.stage != "eval" or record.fingerprint == fingerprint:
        return ""
    words = [f"{key} {_shown(before)} → {_shown(after)}"
             for key, before, after in changed_settings("eval", record.config, hashes.plain(config))
             if not (isinstance(before, list) and isinstance(after, list) and set(before) <= set(after))]  # fmt: skip
    for label, known in record.inputs.items():
        if label not in models:
            words.append(f"{label} is not asked for")
        elif models[label] != known:
            words.append(f"{label} has changed")
    return f"{', '.join(words)}, replaces scores of {', '.join(record.inputs)}; {KEEP}" if words else ""


def _result(record: records.StageRecord) -> str:
    """A finished model in a few words."""
    config, metrics = record.config, record.metrics
    if record.stage == "prune":
        return f"a model pruned to {metrics.get('pattern', config.get('pattern'))} by {config.get('method')}"
    if record.stage == "pack":
        return f"a packed model ({metrics.get('pattern')})"
    return f"a model tuned for {counted(metrics.get('steps', 0), 'step')}"


def _progress(folder: Path, begun: str) -> str:
    """How far an interrupted run of the fingerprint `begun` came, "" where it has nothing to resume from."""
    from lors_cli.tuning.training.checkpoints import step_of, whole_checkpoints  # which loads torch

    steps = [step_of(path) for path in whole_checkpoints(folder / "checkpoints", begun)]
    blocks = len(list((folder / records.WORK_NAME).glob("block_*.json")))
    if steps:
        return f"up to step {max(steps)}"
    return counted(blocks, "block") if blocks else ""


def _differences(stage: str, old: Made, new: Made) -> str:
    """Every setting and input that is another one, in words."""
    settings = list(changed_settings(stage, old.config, new.config))
    words = [f"{key} {_shown(before)} → {_shown(after)}" for key, before, after in settings[:LISTED]]
    if len(settings) > LISTED:
        words.append(f"{len(settings) - LISTED} more settings")
    words += _inputs(old.inputs, new.inputs, {key for key, *_ in settings})
    return ", ".join(words) or "its data or the version of lors changed"


def changed_settings(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of the settings that move the result and are not the same.

    Args:
        old: as a record has them, perhaps without settings that came later.
    """
    try:
        old = hashes.plain(stage_config(stage, dict(old)))
    except UsageError:  # of a version that knew other settings
        old = dict(old)
    before, after = dict(hashes.flat(old)), dict(hashes.flat(new))
    for key in after | before:
        if key not in STAGES[stage].without_effect and before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):  # of a mix
        value = [f"{part['dataset']} {part['weight']:g}" for part in value]
    if isinstance(value, list):
        return shorten(f"[{', '.join(map(str, value))}]")
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else shorten(str(value))


def _inputs(old: Mapping[str, Any], new: Mapping[str, Any], settings: set[str]) -> Iterator[str]:
    """What is read and is another, where no setting has said so, and code that computes otherwise."""
    if old.get("model") != new.get("model"):
        source, _, dtype = str(new.get("model")).rpartition(":")
        before, _, old_dtype = str(old.get("model")).rpartition(":")
        if source == before:
            yield f"dtype {old_dtype} → {dtype}"
        elif old.get("path") != new.get("path"):
            yield f"model {old.get('path')} → {new.get('path')}"
        else:
            yield "the model it reads has changed"
    for key, setting in _CONTENTS.items():
        if key in old and key in new and old[key] != new[key] and setting not in settings:
            yield f"the content of {setting} has changed"
    if "version" in old and old["version"] != new.get("version"):
        yield "this version of lors computes it otherwise"
