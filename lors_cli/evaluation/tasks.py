"""Where an evaluation task's documents come from, and what identifies it.

The seven zero-shot tasks use lm-eval's own definitions; with a data folder their documents are read from its files
instead of the hub. pydoc_choice is made on the spot.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lors_cli.data import pydoc_text
from lors_cli.errors import MissingError, UsageError, first_line, translate
from lors_cli.evaluation.definitions import definition_text, tasks_folder
from lors_cli.evaluation.entries import BUILT_IN, PYDOC_TASK, Task, resolve, tasks_of
from lors_cli.files import atomic, hashes
from lors_cli.recipe.schema import EvalConfig

PYDOC_ITEMS = 120
_MAKES_TOKENIZER = re.compile(r"(?<!def )\bget_tokenizer\(.*kwargs")


def check_tasks(config: EvalConfig, data_dir: Path | None) -> None:
    """Refuse tasks that cannot be scored, before anything is loaded or pruned.

    Raises:
        UsageError: names that no definition has, all of them in one message; a task that runs the model's code, shows
            it images, or is to be told its name.
        MissingError: a file of documents that is not in `data_dir`.
    """
    for task in tasks_of(resolve(config)):
        local_documents(task, data_dir)
        if task.settings.get("unsafe_code"):
            raise UsageError(f"The task {task.name} runs code that the model wrote, which lors does not do.")
        if task.settings.get("doc_to_image") or task.settings.get("doc_to_audio"):
            raise UsageError(f"The task {task.name} shows the model images or sound, and lors scores models of text.")
        if _lacks_tokenizer(task.settings):
            raise UsageError(
                f"The task {task.name} makes its documents with a tokenizer, and does not say which.",
                "A group of your own (eval.include_path) can say it: `dataset_kwargs: {tokenizer: org/model}`.",
            )


def _lacks_tokenizer(settings: Mapping[str, Any]) -> bool:
    """Whether documents are made with a tokenizer that lm-eval's own command is given with the model, as RULER's."""
    function = settings.get("custom_dataset")
    given = {
        key for name in ("metadata", "dataset_kwargs") if isinstance(part := settings.get(name), dict) for key in part
    }
    if not isinstance(function, str) or given & {"tokenizer", "pretrained", "model"}:
        return False
    module = _module(function)
    return module.is_file() and _MAKES_TOKENIZER.search(module.read_text(encoding="utf-8")) is not None


def task_definition(task: Task, *, data_dir: Path | None, folder: Path) -> Path | None:
    """The YAML file that lm-eval can load the task from, together with its documents; None where a group has all of it.

    Args:
        data_dir: folder with local copies of the seven tasks' documents, None for the hub.
        folder: where generated files and the documents' Arrow copies are put, made when missing.

    Returns:
        lm-eval's own file, or one in `folder` that includes it and names local documents.

    Raises:
        MissingError: a file of documents that is not in `data_dir`.
    """
    if task.is_own and task.name == PYDOC_TASK:
        documents = folder / f"{PYDOC_TASK}.jsonl"
        items = pydoc_text.choice_items(PYDOC_ITEMS)
        atomic.write_text(documents, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        local = {"test": documents}
    else:
        local = local_documents(task, data_dir)
    if not local or task.definition is None:
        return task.definition
    path = folder / f"{task.name}.yaml"
    atomic.write_text(path, _local_definition(task.name, task.definition, local, folder / "datasets"))
    return path


def task_fingerprint(task: Task, data_dir: Path | None) -> str:
    """A short hash of the task's definition and, as far as they are local, of its documents."""
    from importlib.metadata import version

    text = definition_text(task.definition) if task.definition else []
    inputs: dict[str, Any] = {"lm_eval": version("lm-eval"), "definition": text}
    if task.overrides:
        inputs["overrides"] = _placeless(dict(task.overrides))
    if task.is_own and task.name == PYDOC_TASK:
        inputs["documents"] = [pydoc_text.fingerprint(), PYDOC_ITEMS]
    elif local := local_documents(task, data_dir):
        scored, *examples = [hashes.cached_sha256(path) for path in local.values()]
        inputs |= {"documents": scored, **({"examples": examples} if examples else {})}
    is_users = not task.is_own and (task.definition is None or _is_users(task.definition))
    files = [path for path in _files_of(task.settings if is_users else task.overrides) if _is_users(path)]
    if is_users or files:
        inputs["files"] = [hashes.cached_sha256(path) for path in files]
    return hashes.fingerprint("task", 1, task.name, inputs)


def _files_of(settings: Mapping[str, Any]) -> Iterator[Path]:
    """The local files that a definition of the user's names: modules of its functions, and documents."""
    yield from (_module(text) for text in _texts(settings) if text.startswith("!function "))
    for text in _texts([settings.get("dataset_path"), settings.get("dataset_kwargs")]):
        for path in map(Path, sorted(glob.glob(text))):
            yield from sorted(file for file in (path, *path.rglob("*")) if file.is_file())


def _module(function: str) -> Path:
    """The module of a `!function`, where lm-eval looks first: `folder/package.module.name`."""
    path = Path(function.removeprefix("!function "))
    return path.parent / (path.name.rpartition(".")[0].replace(".", "/") + ".py")


def _is_users(path: Path) -> bool:
    """Whether a file is there, and not lm-eval's."""
    return path.is_file() and not path.is_relative_to(tasks_folder())


def _placeless(value: Any) -> Any:
    """Settings with each function of the user's by its name alone; `_files_of` has its module."""
    if isinstance(value, dict):
        return {key: _placeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placeless(item) for item in value]
    is_function = isinstance(value, str) and value.startswith("!function ") and _is_users(_module(value))
    return f"!function {Path(value.removeprefix('!function ')).name}" if is_function else value


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def open_dataset(task: Task, data_dir: Path | None) -> None:
    """Open the builder of a task's dataset on the hub; nothing where its documents are local or made by code.

    Raises:
        MissingError: it is not to be had, or is a script.
        UsageError: it has no such part, or several and the task names none.
    """
    path, part = task_dataset(task)
    if path is None or task.settings.get("custom_dataset") or local_documents(task, data_dir):
        return
    from datasets import load_dataset_builder

    given = task.settings.get("dataset_kwargs") or {}
    where = {key: given[key] for key in ("data_files", "data_dir", "revision") if key in given}
    try:
        load_dataset_builder(path, part, **where)
    except Exception as error:
        raise dataset_error(task.name, error) from error


def task_dataset(task: Task) -> tuple[str | None, str | None]:
    """The hub id of the data set that a task's documents come from, and its configuration, as far as there are any."""
    path, part = task.settings.get("dataset_path"), task.settings.get("dataset_name")
    if not isinstance(path, str) or "/" not in path:  # json and the like, or code of its own
        return None, None
    return path, part


def dataset_error(name: str, error: Exception) -> Exception:
    """What to raise where the documents of a task cannot be had; a bug stays itself."""
    known = translate(error)
    if known is None and isinstance(error, FileNotFoundError):  # a metric or script that is fetched by name
        known = MissingError(first_line(error))
    if known is None and ("BuilderConfig" in str(error) or "Config name is missing" in str(error)):
        return UsageError(f"The task {name} cannot be loaded: {' '.join(str(error).splitlines()[:2])}")
    if not isinstance(known, MissingError):
        return error
    hint = "Connect, or give a folder of local copies as data_dir (or $LORS_DATA_DIR)."
    if "loading script" in known.message:
        hint = "Score another task, maybe one of the same documents: `lm-eval ls tasks` names them all."
    return MissingError(f"The task {name} cannot be loaded: {known.message}", hint)


def _local_definition(name: str, definition: Path, local: Mapping[str, Path], cache: Path) -> str:
    """YAML that takes over `definition` but reads the files in `local`, by split; other splits are switched off."""
    import yaml

    content: dict[str, Any] = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: glob.escape(str(path.resolve())) for split, path in local.items()},
            "cache_dir": str(cache.resolve()),
        },
    }
    for split in ("training", "validation", "test"):
        there = {"training": "train"}.get(split, split)
        content[f"{split}_split"] = there if there in local else None
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def local_documents(task: Task, data_dir: Path | None) -> dict[str, Path]:
    """Local documents of one of the seven tasks, by split: those that are scored, then those for examples if needed.

    Returns:
        Nothing where the task's documents are not read from a folder.

    Raises:
        MissingError: the folder lacks them.
    """
    if data_dir is None or not task.is_own or task.name not in BUILT_IN:
        return {}
    splits = [BUILT_IN[task.name][1], *(["train"] if task.num_fewshot else [])]
    return {split: _documents_file(task.name, split, data_dir) for split in splits}


def _documents_file(name: str, split: str, data_dir: Path) -> Path:
    compressed = data_dir / "eval" / name / f"{split}.jsonl.gz"
    for path in (compressed, compressed.with_suffix("")):
        if path.is_file():
            return path
    what = "examples for" if split == "train" else "documents of"
    hint = "Put the file there, or leave data_dir and $LORS_DATA_DIR out to read the task from the hub."
    raise MissingError(f"No {what} the task {name} at {compressed}.", hint)
