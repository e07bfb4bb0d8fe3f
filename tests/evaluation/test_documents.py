"""Local documents of the seven tasks: what is broken is named with its row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lors_cli.errors import UsageError
from lors_cli.evaluation.documents import check_documents
from lors_cli.recipe.schema import SEVEN_TASKS

ARC = {"question": "q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
BOOLQ = {"question": "q", "passage": "p", "label": 1}
GOOD: dict[str, dict[str, Any]] = {
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "boolq": BOOLQ,
    "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "", "endings": ["a", "b"], "label": "1"},
    "openbookqa": {"question_stem": "q", "choices": ARC["choices"], "answerKey": "A"},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
    "winogrande": {"sentence": "the _ is", "option1": "a", "option2": "b", "answer": "2"},
}


def put(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.mark.parametrize("task", SEVEN_TASKS)
def test_each_column_is_needed(task: str, tmp_path: Path) -> None:
    check_documents(task, put(tmp_path, GOOD[task], GOOD[task]))
    for key in GOOD[task]:
        for value in (None, 7, {}, [1]):
            with pytest.raises(UsageError, match=rf"rows\.jsonl\.gz:2: no document of {task}: '{key}'"):
                check_documents(task, put(tmp_path, GOOD[task], {**GOOD[task], key: value}))


@pytest.mark.parametrize(("task", "change", "message"), [
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "not as many texts as labels"),
    ("arc_easy", {"answerKey": "C"}, "'answerKey' must be one of 'A', 'B', not \"C\""),
    ("boolq", {"label": True}, "must be one of 0, 1, not true"),
    ("boolq", {"label": 2}, "not 2"),
    ("boolq", {"passage": "\ud800"}, "half a surrogate pair"),
    ("hellaswag", {"label": "2"}, "not \"2\""),
    ("winogrande", {"sentence": "nothing to fill in"}, "no _"),
])  # fmt: skip
def test_values(task: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        check_documents(task, put(tmp_path, {**GOOD[task], **change}))


def test_no_object_and_no_row(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an object but 3"):
        check_documents("rte", put(tmp_path, 3))
    with pytest.raises(UsageError, match="is empty"):
        check_documents("rte", put(tmp_path))


@pytest.mark.parametrize("task", SEVEN_TASKS)
def test_the_real_documents_pass(task: str, shared_dir: Path) -> None:
    (path,) = (shared_dir / "data" / "eval" / task).glob("test.jsonl.gz" if "arc" in task or task == "openbookqa" else
                                                         "validation.jsonl.gz")  # fmt: skip
    check_documents(task, path)
