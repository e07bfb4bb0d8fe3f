"""The pieces of an evaluation: one task or one text of one model, stored under a fingerprint of all it depends on.

A piece is kept once it is finished: a later run scores only what is new or has changed. Below the stage's folder:

    .pieces/<model>/<task>.json     a finished piece        samples/<model>/<task>.jsonl   its documents or windows
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lors_cli.data import sources
from lors_cli.evaluation.entries import OWN_TASKS, Task, groups_of, resolve, tasks_of
from lors_cli.evaluation.tasks import task_fingerprint
from lors_cli.files import atomic, hashes
from lors_cli.recipe.evaluation import check_label
from lors_cli.recipe.schema import EvalConfig

STAGE_VERSION = 2
PERPLEXITY_FIELDS = ("value", "tokens", "sequence_length")
_VERSIONS = {"tasks": 3, "tasks with whole scores": 2, "perplexity": 1}
"""Of the code that scores a piece. Tasks: 2 since choices share their context (same scores up to rounding), 3 since a
document's score may be a fraction, which no document of our own tasks has."""

Kind = Literal["tasks", "perplexity"]


@dataclass(frozen=True)
class Piece:
    """One task or one text of one model."""

    label: str
    kind: Kind
    name: str
    fingerprint: str
    path: Path
    samples: Path
    """Its results document by document; of a text window by window, which lors did not always keep."""
    task: Task | None = None

    def stored(self) -> dict[str, Any] | None:
        """What an earlier run found, None when there is nothing or it is out of date."""
        content = atomic.read_json(self.path)
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            return None
        if not _is_result(self.kind, content.get("result")):
            return None
        return content if self.kind == "perplexity" or self.samples.is_file() else None


def _is_result(kind: Kind, value: Any) -> bool:
    """Whether a stored value is what scoring a piece gives: numbers by name, with those that are read later."""
    needed = PERPLEXITY_FIELDS if kind == "perplexity" else ("num_samples",)
    return (
        isinstance(value, dict)
        and all(item is None or isinstance(item, (int, float)) for item in value.values())
        and all(field in value for field in needed)
    )


def pieces_of(
    config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path, data_dir: Path | None
) -> list[Piece]:
    """Every piece of the stage, in the order of scoring."""
    from importlib.metadata import version

    for label in model_fingerprints:
        check_label(label)
    settings = {"batch_size": config.batch_size, "transformers": version("transformers").split(".")[0]}
    contents: list[tuple[Kind, str, list[Any], Task | None]] = [
        *(("tasks", task.name, _task_content(config, task, data_dir), task) for task in tasks_of(resolve(config))),
        *(
            ("perplexity", name, [sources.fingerprint_source(name, split="validation", data_dir=data_dir),
                                  config.perplexity_windows, config.perplexity_length], None)
            for name in config.perplexity
        ),
    ]  # fmt: skip
    return [
        Piece(
            label,
            kind,
            name,
            hashes.fingerprint(f"eval/{kind}", _version(kind, name), settings, {"model": model, "content": content}),
            out / ".pieces" / label / f"{_file_stem(kind, name)}.json",
            samples_path(out, label, name, kind),
            task,
        )
        for label, model in model_fingerprints.items()
        for kind, name, content, task in contents
    ]


def _task_content(config: EvalConfig, task: Task, data_dir: Path | None) -> list[Any]:
    """What a task's scores depend on; what is at its default is not in it."""
    limit = config.limit if config.limit is None or config.limit < 1 else int(config.limit)
    one_turn = config.apply_chat_template and config.fewshot_as_multiturn is False
    prompts = {
        "num_fewshot": task.num_fewshot, "apply_chat_template": config.apply_chat_template,
        "examples_in_one_turn": one_turn, "system_instruction": config.system_instruction,
    }  # fmt: skip
    given = {key: value for key, value in prompts.items() if value}
    return [task_fingerprint(task, data_dir), limit, *([given] if given else [])]


def _version(kind: Kind, name: str) -> int:
    return _VERSIONS["tasks with whole scores" if kind == "tasks" and name in OWN_TASKS else kind]


def samples_path(out: Path, label: str, name: str, kind: Kind = "tasks") -> Path:
    """Where results of the model `label` are, document by document or window by window, below the stage's folder."""
    return out / "samples" / label / f"{_file_stem(kind, name)}.jsonl"


def _file_stem(kind: Kind, name: str) -> str:
    """A file name for a task or text: its own where that is plain, else with a few digits of its hash."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).name)[:80]
    if stem != name:
        stem += "-" + hashes.digits(name, 8)
    return stem if kind == "tasks" else f"perplexity-{stem}"


def whole_fingerprint(config: EvalConfig, pieces: Sequence[Piece]) -> str:
    """The stage's fingerprint, of all its pieces and of the groups that they are in."""
    inputs = {f"{piece.label}/{piece.path.stem}": piece.fingerprint for piece in pieces}
    groups = {
        group.name: [[member.name for member in group.members], [asdict(metric) for metric in group.metrics]]
        for group in groups_of(resolve(config))
    }
    return hashes.fingerprint("eval", STAGE_VERSION, groups or None, inputs)


def eval_fingerprint(config: EvalConfig, model_fingerprints: Mapping[str, str], data_dir: Path | None) -> str:
    """The fingerprint that `stage.json` has once all of this is evaluated."""
    return whole_fingerprint(config, pieces_of(config, model_fingerprints, Path(), data_dir))


def pending(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that are still to be scored."""
    return [piece for piece in pieces if piece.stored() is None]


def take_over(
    config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path, folders: Iterable[Path], data_dir: Path | None
) -> int:
    """Copy from other evaluations what they have measured already of the same models, and how many pieces that is."""
    taken = 0
    others = [folder for folder in folders if folder != out]
    for piece in pending(pieces_of(config, model_fingerprints, out, data_dir)):
        for folder in others:
            samples = folder / piece.samples.relative_to(out)
            twin = replace(piece, path=folder / piece.path.relative_to(out), samples=samples)
            if twin.stored() is not None:
                if samples.is_file():
                    atomic.write_bytes(piece.samples, samples.read_bytes())
                atomic.write_bytes(piece.path, twin.path.read_bytes())
                taken += 1
                break
    return taken
