"""Where an evaluation task's definition and documents come from.

The seven zero-shot tasks use lm-eval's own definitions; with a data folder their documents are read from its files
instead of the hub. pydoc_choice is made on the spot. Every other name is looked up among lm-eval's definitions by a
text scan (0.3 s; lm-eval's own TaskManager parses 14,000 YAML files for it).
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors_cli.data import pydoc_text
from lors_cli.errors import MissingError, UsageError, translate
from lors_cli.files import atomic, hashes
from lors_cli.recipe.schema import SEVEN_TASKS

PYDOC_TASK = "pydoc_choice"
PYDOC_ITEMS = 120
OWN_TASKS = (*SEVEN_TASKS, PYDOC_TASK)
"""Tasks that work without lm-eval's index of names."""
_PYDOC_YAML = Path(__file__).with_name("pydoc_choice.yaml")

_BUILT_IN = {
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "rte": ("glue/rte/default.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}  # lm-eval's definition, below its tasks folder, and the split that it scores
assert tuple(_BUILT_IN) == SEVEN_TASKS

_NAME_LINE = re.compile(r"""^["']?(task|group|class)["']?[ \t]*:[ \t]*["']?([^\s"'#\[]*)""", re.MULTILINE)
_TAG_LINE = re.compile(r"^tag[ \t]*:[ \t]*(\S*)((?:\s*\n[ \t]*-[ \t]*\S+)*)", re.MULTILINE)
_UNSAFE_LINE = re.compile(r"^unsafe_code[ \t]*:[ \t]*true", re.MULTILINE | re.IGNORECASE)
_PATH_LINE = re.compile(r"""^dataset_path[ \t]*:[ \t]*["']?([\w./-]+)""", re.MULTILINE)
_PART_LINE = re.compile(r"""^dataset_name[ \t]*:[ \t]*["']?([\w.~/-]*)""", re.MULTILINE)
_INCLUDE_LINE = re.compile(r"""^include[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)


@dataclass
class TaskNames:
    """What lm-eval's definitions define."""

    tasks: dict[str, Path] = field(default_factory=dict)
    """Task to its YAML file."""
    groups: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Group or tag to those of its tasks that the text scan can tell, maybe none."""


def check_tasks(names: Sequence[str], data_dir: Path | None) -> None:
    """Refuse tasks that cannot be scored, before anything is loaded or pruned.

    Raises:
        UsageError: names that no definition has, all of them in one message; a task that runs the model's code.
        MissingError: a file of documents that is not in `data_dir`.
    """
    unknown = [name for name in names if name not in OWN_TASKS and name not in _lm_eval_names().tasks]
    if unknown:
        raise _unknown_tasks(unknown)
    for name in names:
        documents_file(name, data_dir)
        if name not in OWN_TASKS and _UNSAFE_LINE.search("\n".join(_definition_text(_definition_file(name)))):
            raise UsageError(f"The task {name} runs code that the model wrote, which lors does not do.")


def task_definition(name: str, *, data_dir: Path | None, folder: Path) -> Path:
    """The YAML file that lm-eval can load the task from, together with its documents.

    Args:
        name: one of the seven tasks, pydoc_choice, or any task of lm-eval.
        data_dir: folder with local copies of the seven tasks' documents, None for the hub.
        folder: where generated files and the documents' Arrow copies are put, made when missing.

    Returns:
        lm-eval's own file, or one in `folder` that includes it and names local documents.

    Raises:
        UsageError: an unknown task.
        MissingError: a file of documents that is not in `data_dir`.
    """
    definition = _definition_file(name)
    if name == PYDOC_TASK:
        split, documents = "test", folder / f"{PYDOC_TASK}.jsonl"
        items = pydoc_text.choice_items(PYDOC_ITEMS)
        atomic.write_text(documents, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    else:
        local = documents_file(name, data_dir)
        if local is None:
            return definition
        split, documents = _BUILT_IN[name][1], local
    content = _local_definition(name, definition, split, documents, folder / "datasets")
    path = folder / f"{name}.yaml"
    atomic.write_text(path, content)
    return path


def task_fingerprint(name: str, data_dir: Path | None) -> str:
    """A short hash of the task's definition and, as far as they are local, of its documents."""
    from importlib.metadata import version

    inputs: dict[str, Any] = {"lm_eval": version("lm-eval"), "definition": _definition_text(_definition_file(name))}
    local = documents_file(name, data_dir)
    if name == PYDOC_TASK:
        inputs["documents"] = [pydoc_text.fingerprint(), PYDOC_ITEMS]
    elif local is not None:
        inputs["documents"] = hashes.cached_sha256(local)
    return hashes.fingerprint("task", 1, name, inputs)


def open_dataset(name: str, data_dir: Path | None) -> None:
    """Open the builder of a task's dataset on the hub; nothing where its documents are local or made by code.

    Raises:
        MissingError: it is not to be had, or is a script.
        UsageError: it has no such part.
    """
    if name == PYDOC_TASK or documents_file(name, data_dir) is not None:
        return
    path, part = task_dataset(name)
    if path is None:
        return
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(path, part)
    except Exception as error:
        raise dataset_error(name, error) from error


def task_dataset(name: str) -> tuple[str | None, str | None]:
    """The hub id of the data set that a task's documents come from, and its configuration, as far as there are any."""
    text = "\n".join(_definition_text(_definition_file(name)))
    path, part = (found[1] if (found := pattern.search(text)) else None for pattern in (_PATH_LINE, _PART_LINE))
    if path is None or "/" not in path:  # json and the like, or code of its own
        return None, None
    return path, None if part in ("null", "~", "") else part


def dataset_error(name: str, error: Exception) -> Exception:
    """What to raise where the documents of a task cannot be had; a bug stays itself."""
    known = translate(error)
    if known is None and isinstance(error, FileNotFoundError):  # a metric or script that is fetched by name
        known = MissingError(str(error).splitlines()[0])
    if known is None and "BuilderConfig" in str(error):
        return UsageError(f"The task {name} cannot be loaded: {str(error).splitlines()[0]}")
    if not isinstance(known, MissingError):
        return error
    hint = "Connect, or give a folder of local copies as data_dir (or $LORS_DATA_DIR)."
    if "loading script" in known.message:
        hint = "Score another task, maybe one of the same documents: `lm-eval ls tasks` names them all."
    return MissingError(f"The task {name} cannot be loaded: {known.message}", hint)


def _local_definition(name: str, definition: Path, split: str, documents: Path, cache: Path) -> str:
    """YAML that takes over `definition` but reads `documents`; splits that are not there are switched off."""
    import yaml

    content: dict[str, Any] = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(documents.resolve())},
            "cache_dir": str(cache.resolve()),
        },
        "training_split": None,
        "validation_split": None,
        "test_split": None,
    }
    content[f"{split}_split"] = split
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def documents_file(name: str, data_dir: Path | None) -> Path | None:
    """The local documents of one of the seven tasks; None where the task's documents are not read from a folder.

    Raises:
        MissingError: the folder lacks them.
    """
    if data_dir is None or name not in _BUILT_IN:
        return None
    split = _BUILT_IN[name][1]
    compressed = data_dir / "eval" / name / f"{split}.jsonl.gz"
    for path in (compressed, compressed.with_suffix("")):
        if path.is_file():
            return path
    hint = "Put the file there, or leave data_dir and $LORS_DATA_DIR out to read the task from the hub."
    raise MissingError(f"No documents of the task {name} at {compressed}.", hint)


def _definition_file(name: str) -> Path:
    if name == PYDOC_TASK:
        return _PYDOC_YAML
    if name in _BUILT_IN:
        path = _tasks_folder() / _BUILT_IN[name][0]
        assert path.is_file(), path
        return path
    found = _lm_eval_names().tasks.get(name)
    if found is None:
        raise _unknown_tasks([name])
    return found


def _definition_text(path: Path) -> list[str]:
    """The file's text and that of every file it includes."""
    text = path.read_text(encoding="utf-8")
    included = [_definition_text(path.parent / name) for name in _INCLUDE_LINE.findall(text)]
    return [text, *(part for parts in included for part in parts)]


@functools.cache
def _tasks_folder() -> Path:
    """lm-eval's folder of definitions, without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingError("The package lm-eval is not installed.", "pip install lm-eval==0.4.13")
    return Path(spec.origin).parent / "tasks"


@functools.cache
def _lm_eval_names() -> TaskNames:
    """Every name that lm-eval's definitions define, in the order in which lm-eval would take them."""
    names = TaskNames()
    for folder, folders, files in os.walk(_tasks_folder()):
        folders.sort()
        for file in sorted(files):
            if file.endswith(".yaml"):
                _scan(Path(folder, file), names)
    return names


def _scan(path: Path, names: TaskNames) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    found = dict(_NAME_LINE.findall(text))
    group, task = found.get("group"), found.get("task")
    if task and ("class" in found or group is None):
        names.tasks.setdefault(task, path)
        tags = _TAG_LINE.search(text)
        for tag in re.findall(r"[^\s\[\],\"'-][^\s\[\],\"']*", " ".join(tags.groups())) if tags else ():
            names.groups[tag].append(task)
    if group:
        members = re.findall(r"^[ \t]*-[ \t]*(?:task:[ \t]*)?([\w.-]+)[ \t]*$", text, re.MULTILINE)
        names.groups[group].extend([task] if task and "class" in found else members)


def _unknown_tasks(unknown: Sequence[str]) -> UsageError:
    """One message for all of them, with the names that were perhaps meant."""
    names = _lm_eval_names()
    known = [PYDOC_TASK, *SEVEN_TASKS, *names.tasks]
    parts = []
    for name in unknown:
        if name in names.groups:
            members = [member for member in names.groups[name] if member in names.tasks]
            listing = f", such as {', '.join(members[:6])}" if members else ""
            parts.append(f"{name} is a group of lm-eval; give its tasks by name{listing}")
            continue
        close = difflib.get_close_matches(name, known[: 1 + len(SEVEN_TASKS)], n=2)
        close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.75)
        parts.append(f"there is no task {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    hint = f"Tasks: {', '.join(SEVEN_TASKS)}, {PYDOC_TASK}, or any other that `lm-eval ls tasks` lists."
    return UsageError(f"eval.tasks: {' — '.join(parts)}", hint)
