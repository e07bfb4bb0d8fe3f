"""A true lm-eval run on the small real model, against a hand-written log-likelihood loop."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.data.pydoc_text import choice_items
from lors_cli.evaluation.harness import score_task
from lors_cli.output import console, progress

LIMIT = 6


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
    result = score_task(
        model, tokenizer, task, limit=LIMIT, batch_size=4, data_dir=shared_dir / "data", folder=tmp_path
    )
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
    score_task(
        model, tokenizer, "boolq", limit=4, batch_size=4, data_dir=shared_dir / "data", folder=tmp_path, label="x"
    )
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
    options = {"limit": 2, "batch_size": 4, "data_dir": shared_dir / "data", "folder": tmp_path}
    result = score_task(broken, stories[1], "openbookqa", **options)  # type: ignore[arg-type]
    assert result.metrics["acc"] is None
    assert result.samples[0]["log_likelihoods"] == [None] * 4
    assert "NaN on 2 of 2" in told[0]
    json.dumps([result.metrics, result.samples], allow_nan=False)
