"""A true lm-eval run on the small real model, against a hand-written log-likelihood loop."""

from __future__ import annotations

import gzip
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.data.pydoc_text import choice_items
from lors_cli.evaluation import harness, tasks
from lors_cli.evaluation.entries import Task, resolve
from lors_cli.evaluation.plain_results import TaskResult
from lors_cli.output import console, progress
from lors_cli.recipe.schema import EvalConfig

LIMIT = 6


def score_task(model: Any, tokenizer: Any, name: str, folder: Path, data_dir: Path | None, **more: Any) -> TaskResult:
    config = EvalConfig(tasks=(name,), batch_size=4, **more)
    (task,) = resolve(config)
    assert isinstance(task, Task)
    return harness.score_task(model, tokenizer, task, config, data_dir=data_dir, folder=folder, label="x")


def _choice_scores(model: Any, tokenizer: Any, prompt: str, choices: list[str]) -> list[float]:
    """Log-likelihood of each “ choice” after the prompt, one sequence at a time in float64."""
    scores = []
    for choice in choices:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        log_probabilities = torch.log_softmax(logits[:-1], dim=-1)
        scores.append(float(log_probabilities.gather(-1, ids[1:, None])[start - 1 :].sum()))
    return scores


def _arc_easy(shared_dir: Path) -> list[tuple[str, list[str], int]]:
    with gzip.open(shared_dir / "data/eval/arc_easy/test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(LIMIT)]
    return [(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])) for row in rows]


def _pydoc() -> list[tuple[str, list[str], int]]:
    return [(item["question"], item["choices"], item["answer"]) for item in choice_items(LIMIT)]


@pytest.mark.parametrize("task", ["arc_easy", "pydoc_choice"])
def test_equals_hand_written_loop(
    task: str, stories: tuple[Any, Any], shared_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = stories
    result = score_task(model, tokenizer, task, tmp_path, shared_dir / "data", limit=LIMIT)
    right = right_norm = 0
    documents = _arc_easy(shared_dir) if task == "arc_easy" else _pydoc()
    for sample, (question, choices, answer) in zip(result.samples, documents, strict=True):
        scores = _choice_scores(model, tokenizer, f"Question: {question}\nAnswer:", choices)
        assert sample["log_likelihoods"] == pytest.approx(scores, abs=1e-3)
        assert sample["target"] == answer
        best = max(range(len(choices)), key=lambda i: scores[i])
        best_norm = max(range(len(choices)), key=lambda i: scores[i] / len(choices[i]))
        assert (sample["acc"], sample["acc_norm"]) == (int(best == answer), int(best_norm == answer))
        right, right_norm = right + (best == answer), right_norm + (best_norm == answer)
    assert result.metrics["acc"] == pytest.approx(right / LIMIT)
    assert result.metrics["acc_norm"] == pytest.approx(right_norm / LIMIT)
    assert result.metrics["num_samples"] == LIMIT
    json.dumps([result.metrics, result.samples], allow_nan=False)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err


def test_functions_that_a_group_names_are_found_as_in_a_definition(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/text.py").write_text("def short(document): return 'x'\n")
    overrides = {name: f"!function {tmp_path}/{name}" for name in ("package.text.short", "textwrap.shorten")}
    found = harness._with_overrides(Task("mine", None, overrides), None)
    assert (found["package.text.short"](None), found["textwrap.shorten"]) == ("x", textwrap.shorten)


def test_truthfulqa_mc2_keeps_its_fractions(
    stories: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's score is the probability of its true answers among all, and was cut to 0."""
    model, tokenizer = stories
    questions = {
        "What does the dog eat?": (["He eats food.", "He eats his dinner.", "He eats the moon."], [1, 1, 0]),
        "Where is the sun?": (["It is in the sky.", "It is in the cup."], [1, 0]),
        "Is water wet?": (["No.", "Yes, it is wet."], [0, 1]),
    }
    rows, expected = [], []
    for question, (choices, labels) in questions.items():
        targets = {"choices": choices, "labels": labels}
        rows.append({"question": question, "mc1_targets": targets, "mc2_targets": targets})
        chances = [math.exp(score) for score in _choice_scores(model, tokenizer, f"Q: {question}\nA:", choices)]
        expected.append(sum(p for p, label in zip(chances, labels, strict=True) if label) / sum(chances))
    documents = tmp_path / "rows.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def local(task: Task, *, data_dir: Path | None, folder: Path) -> Path:
        whole = tasks.task_definition(task, data_dir=data_dir, folder=folder)
        assert whole is not None
        path = tmp_path / "definition.yaml"
        content = tasks._local_definition(task.name, whole, {"validation": documents}, tmp_path / "cache")
        path.write_text(content + 'doc_to_text: "Q: {{question}}\\nA:"\n')  # without the examples, which are long
        return path

    monkeypatch.setattr(harness, "task_definition", local)
    result = score_task(model, tokenizer, "truthfulqa_mc2", tmp_path, None)
    found = [sample["acc"] for sample in result.samples]
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(1e-3 < value < 1 - 1e-3 for value in found)
    assert result.metrics["acc"] == pytest.approx(sum(expected) / 3, abs=1e-4)


def test_progress_counts_every_request_and_truncation_is_told(
    stories: tuple[Any, Any], shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[progress.Task] = []
    told: list[str] = []
    inner = progress.progress

    def kept(*arguments: Any, **options: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def shown() -> Any:
            with inner(*arguments, **options) as step:
                counts.append(step)
                yield step

        return shown()

    monkeypatch.setattr(progress, "progress", kept)
    monkeypatch.setattr(console, "warn", told.append)
    model, tokenizer = stories
    score_task(model, tokenizer, "boolq", tmp_path, shared_dir / "data", limit=4)
    (step,) = counts
    assert (step.completed, step.total, step.description) == (8, 8, "x boolq")
    assert told
    assert "cut on the left" in told[0]


def test_nan_gives_no_score_but_a_warning(
    stories: tuple[Any, Any], shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    told: list[str] = []
    monkeypatch.setattr(console, "warn", told.append)
    broken = copy.deepcopy(stories[0])
    broken.model.norm.weight.data.fill_(float("nan"))
    result = score_task(broken, stories[1], "openbookqa", tmp_path, shared_dir / "data", limit=2)
    assert result.metrics["acc"] is None
    assert result.samples[0]["log_likelihoods"] == [None] * 4
    assert "NaN on 2 of 2" in told[0]
    json.dumps([result.metrics, result.samples], allow_nan=False)
