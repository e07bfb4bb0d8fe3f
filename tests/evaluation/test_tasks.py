"""Where tasks come from, and what is said of those that do not exist."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lors_cli.errors import MissingError, UsageError
from lors_cli.evaluation import tasks
from lors_cli.evaluation.definitions import definition_text, read_definition
from lors_cli.evaluation.entries import Task, resolve
from lors_cli.recipe.schema import SEVEN_TASKS, EvalConfig


def _local_rte(folder: Path, *, label: int = 0) -> Path:
    path = folder / "eval" / "rte" / "validation.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"sentence1": "A cat sleeps.", "sentence2": "A cat is awake.", "label": label, "idx": 0}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    return path


def named(name: str) -> Task:
    (task,) = resolve(EvalConfig(tasks=(name,)))
    assert isinstance(task, Task)
    return task


def test_unknown_names_are_all_named_with_suggestions() -> None:
    with pytest.raises(UsageError) as caught:
        tasks.check_tasks(EvalConfig(tasks=("arc_esay", "rte", "wikitxt")), None)
    assert caught.value.exit_code == 2
    for part in ("'arc_esay'", "arc_easy", "'wikitxt'", "wikitext"):
        assert part in caught.value.message
    assert "boolq" in (caught.value.hint or "")


def test_other_tasks_of_lm_eval_are_found_in_its_definitions(tmp_path: Path) -> None:
    tasks.check_tasks(
        EvalConfig(
            tasks=(
                "wikitext",
                "mmlu_abstract_algebra",
                "scrolls_qasper",
            )
        ),
        None,
    )
    path = tasks.task_definition(named("mmlu_abstract_algebra"), data_dir=None, folder=tmp_path)
    assert path.is_file()
    assert "mmlu_abstract_algebra" in path.read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("humaneval", "humaneval runs code"),
        ("chartqa", "chartqa shows the model images"),
        ("common_voice_en", "common_voice_en shows the model images or sound"),
        *((name, f"{name} makes its documents with a tokenizer") for name in ("niah_single_1", "ruler_qa_squad")),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tasks.check_tasks(EvalConfig(tasks=(name,)), None)


def test_documents_made_without_a_tokenizer_or_with_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: g\ntask: [ruler]\ndataset_kwargs: {tokenizer: org/model}\n")
    tasks.check_tasks(EvalConfig(tasks=("babilong_qa1", "g"), include_path=str(tmp_path)), None)


def test_a_dataset_is_opened_as_the_task_has_it(tmp_path: Path) -> None:
    """Its files and folder were left out, and a task that names no part of several ended in a traceback."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.json").write_text('{"text": "x"}\n')

    def opened(**settings: Any) -> None:
        tasks.open_dataset(Task("mine", None, {"dataset_path": str(folder), **settings}), None)

    with pytest.raises(MissingError, match=r"rows/nothing doesn't contain any data files"):
        opened(dataset_kwargs={"data_dir": "nothing"})
    opened(dataset_kwargs={"data_files": "a.json", "trust_remote_code": True})
    (folder / "README.md").write_text(
        "---\nconfigs: [{config_name: one, data_files: a.json}, {config_name: two, data_files: a.json}]\n---\n"
    )
    with pytest.raises(UsageError, match=r"The task mine cannot be loaded: Config name is missing.*'one', 'two'"):
        opened()
    with pytest.raises(UsageError, match="BuilderConfig 'three' not found"):
        opened(dataset_name="three")
    opened(dataset_name="two")
    opened(custom_dataset="!function utils.rows")


def test_missing_local_file_is_named(tmp_path: Path) -> None:
    _local_rte(tmp_path)
    tasks.check_tasks(
        EvalConfig(
            tasks=(
                "rte",
                "pydoc_choice",
            )
        ),
        tmp_path,
    )
    for call in (
        lambda: tasks.check_tasks(
            EvalConfig(
                tasks=(
                    "rte",
                    "boolq",
                )
            ),
            tmp_path,
        ),
        lambda: tasks.task_definition(named("boolq"), data_dir=tmp_path, folder=tmp_path / "work"),
        lambda: tasks.task_fingerprint(named("boolq"), tmp_path),
    ):
        with pytest.raises(MissingError, match=r"eval/boolq/validation\.jsonl\.gz") as caught:
            call()
        assert caught.value.exit_code == 3


def test_checking_the_usual_tasks_needs_no_lm_eval() -> None:
    code = (
        "import sys\n"
        "from lors_cli.evaluation.tasks import check_tasks\n"
        "from lors_cli.recipe.schema import SEVEN_TASKS, EvalConfig\n"
        "check_tasks(EvalConfig(tasks=(*SEVEN_TASKS, 'pydoc_choice')), None)\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", ["plain", "data [v1]*?"])
def test_generated_definition_reads_the_local_file_alone(tmp_path: Path, name: str) -> None:
    from datasets.data_files import DataFilesList

    folder = tmp_path / name
    data = _local_rte(folder)
    path = tasks.task_definition(named("rte"), data_dir=folder, folder=folder / "work")
    content = yaml.safe_load(path.read_text())
    assert content["dataset_path"] == "json"
    ((split, pattern),) = content["dataset_kwargs"]["data_files"].items()
    assert (split, DataFilesList.from_patterns([pattern])) == ("validation", [str(data)])
    assert content["validation_split"] == "validation"
    assert content["training_split"] is content["test_split"] is content["dataset_name"] is None
    assert Path(content["include"]).is_file()


def test_without_data_folder_the_built_in_definition_is_used(tmp_path: Path) -> None:
    for name in SEVEN_TASKS:
        path = tasks.task_definition(named(name), data_dir=None, folder=tmp_path)
        assert f"task: {name}\n" in path.read_text()
    assert not list(tmp_path.iterdir())


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    _local_rte(tmp_path / "one")
    _local_rte(tmp_path / "two")
    _local_rte(tmp_path / "other", label=1)
    one, two, other = (tasks.task_fingerprint(named("rte"), tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert len({one, other, tasks.task_fingerprint(named("rte"), None)}) == 3


def test_pydoc_choice_documents(tmp_path: Path) -> None:
    path = tasks.task_definition(named("pydoc_choice"), data_dir=None, folder=tmp_path)
    (documents,) = yaml.safe_load(path.read_text())["dataset_kwargs"]["data_files"].values()
    items = [json.loads(line) for line in Path(documents).read_text().splitlines()]
    assert len(items) == 120
    assert all(len(item["choices"]) == 4 and 0 <= item["answer"] < 4 for item in items)


def test_local_examples_are_the_training_documents(tmp_path: Path) -> None:
    """With examples, lm-eval draws them from the training split: documents that are scored are no stand-in."""
    _local_rte(tmp_path)
    (task,) = resolve(EvalConfig(tasks=("rte",), num_fewshot=2))
    assert isinstance(task, Task)
    with pytest.raises(MissingError, match=r"No examples for the task rte at .*train\.jsonl\.gz"):
        tasks.local_documents(task, tmp_path)
    before = tasks.task_fingerprint(named("rte"), tmp_path)
    train = tmp_path / "eval/rte/train.jsonl"
    train.write_bytes(gzip.decompress((tmp_path / "eval/rte/validation.jsonl.gz").read_bytes()))
    path = tasks.task_definition(task, data_dir=tmp_path, folder=tmp_path / "work")
    assert path is not None
    content = yaml.safe_load(path.read_text())
    assert content["training_split"] == "train"
    assert content["dataset_kwargs"]["data_files"]["train"] == str(train)
    assert tasks.task_fingerprint(named("rte"), tmp_path) == before
    assert tasks.task_fingerprint(task, tmp_path) != before


@pytest.mark.parametrize("include", ["include: base.yaml", "include: [base.yaml]", "include:\n  - base.yaml"])
def test_what_a_definition_includes_belongs_to_its_fingerprint(tmp_path: Path, include: str) -> None:
    for name, text in (("base", "output_type: multiple_choice\n"), ("mine", f"task: mine\n{include}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    found = definition_text(tmp_path / "mine.yaml")
    assert found == [(tmp_path / f"{name}.yaml").read_text() for name in ("mine", "base")]
    assert read_definition(tmp_path / "mine.yaml") == {"task": "mine", "output_type": "multiple_choice"}
