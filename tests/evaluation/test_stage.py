"""Resuming by piece, whole files, and what the results say; models are stand-ins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.data import tokens
from lors_cli.errors import MissingError, UsageError
from lors_cli.evaluation import harness, perplexity, pieces
from lors_cli.evaluation.entries import Task
from lors_cli.evaluation.pieces import eval_fingerprint, pending, pieces_of
from lors_cli.evaluation.plain_results import TaskResult
from lors_cli.evaluation.stage import evaluate
from lors_cli.files import records
from lors_cli.models import blocks, loading, sources
from lors_cli.recipe.schema import EvalConfig, ModelConfig

CONFIG = EvalConfig(tasks=("rte", "pydoc_choice"), perplexity=("pydoc",), limit=4, generations=False)
MODELS = {"dense": ModelConfig(path="d"), "pruned": ModelConfig(path="p")}


class Bench:
    """Stand-ins for loading and scoring, with a diary of what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[str] = []
        self.scored: list[tuple[str, str]] = []
        self.versions: dict[str, int] = {}
        self.fail_at: tuple[str, str] | None = None
        self.perplexity = 8.0
        self.alive = 0
        monkeypatch.setattr(loading, "load_model", self.load)
        monkeypatch.setattr(loading, "load_tokenizer", lambda config: None)
        monkeypatch.setattr(sources, "model_fingerprint", self.fingerprint)
        monkeypatch.setattr(blocks, "model_max_length", lambda model: 16)
        monkeypatch.setattr(harness, "score_task", self.score)
        monkeypatch.setattr(tokens, "perplexity_windows", lambda *args, **kwargs: torch.zeros(2, 16))
        monkeypatch.setattr(perplexity, "token_perplexity", self.measure)

    def fingerprint(self, config: ModelConfig) -> str:
        return f"{config.path}{self.versions.get(config.path, 0)}"

    def load(self, config: ModelConfig) -> Any:
        self.loaded.append(config.path)
        assert self.alive == 0, "the model before is still there"
        bench = self

        class Model:
            path = config.path

            def __init__(self) -> None:
                bench.alive += 1

            def __del__(self) -> None:
                bench.alive -= 1

        return Model()

    def score(self, model: Any, tokenizer: Any, task: Task, config: EvalConfig, *, label: str, **more: Any) -> Any:
        if self.fail_at == (label, task.name):
            raise KeyboardInterrupt
        self.scored.append((label, task.name))
        sample = {"doc_id": 0, "target": 1, "log_likelihoods": [-1.0, -2.0], "acc": 0}
        return TaskResult({"acc": 0.5, "acc_stderr": 0.1, "num_samples": 4}, [sample])

    def measure(self, model: Any, windows: Any, *, batch_size: int, on_progress: Any) -> dict[str, Any]:
        self.scored.append((model.path, "perplexity"))
        on_progress(2)
        return {"value": self.perplexity, "tokens": 30, "sequence_length": 16, "nll": 2.1, "window_nll": [2.0, 2.2]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_results_have_the_documented_form(bench: Bench, tmp_path: Path) -> None:
    for index in ("", "1", "3"):  # of more processes, which were killed
        (tmp_path / f".scratch{index}/datasets").mkdir(parents=True)
    results = evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    assert bench.loaded == ["d", "p"]
    assert len(bench.scored) == 6
    metrics = {"acc": 0.5, "acc_stderr": 0.1, "num_samples": 4, "num_fewshot": 0}
    assert results["pruned"] == {
        "model": "p",
        "tasks": {"rte": metrics, "pydoc_choice": metrics},
        "average": {"metric": "acc", "value": 0.5, "tasks": ["rte", "pydoc_choice"]},
        "perplexity": {"pydoc": {"value": 8.0, "tokens": 30, "sequence_length": 16}},
    }
    assert json.loads((tmp_path / "pruned.json").read_text()) == results["pruned"]
    assert json.loads((tmp_path / "samples/dense/rte.jsonl").read_text())["log_likelihoods"] == [-1.0, -2.0]
    windows = [json.loads(line) for line in (tmp_path / "samples/dense/perplexity-pydoc.jsonl").open()]
    assert [window["nll"] for window in windows] == [2.0, 2.2]
    assert len({window["tokens"] for window in windows}) == 1  # both are zeros
    fingerprint = eval_fingerprint(CONFIG, {"dense": "d0", "pruned": "p0"}, None)
    assert records.is_finished(tmp_path, fingerprint)
    assert not list(tmp_path.glob(".scratch*"))


def test_perplexities_of_before_windows_were_kept_stand(bench: Bench, tmp_path: Path) -> None:
    first = evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    for path in tmp_path.glob("samples/*/perplexity-*.jsonl"):
        path.unlink()
    bench.scored = []
    assert evaluate(CONFIG, MODELS, tmp_path, data_dir=None) == first
    assert bench.scored == []


def test_second_run_touches_nothing(bench: Bench, tmp_path: Path) -> None:
    first = evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    before, bench.loaded, bench.scored = _files(tmp_path), [], []
    assert evaluate(CONFIG, MODELS, tmp_path, data_dir=None) == first
    assert (bench.loaded, bench.scored) == ([], [])
    assert _files(tmp_path) == before


def _missing(config: EvalConfig, fingerprints: dict[str, str], out: Path) -> list[tuple[str, str]]:
    return [(piece.label, piece.name) for piece in pending(pieces_of(config, fingerprints, out, None))]


def test_only_what_changed_is_scored_again(bench: Bench, tmp_path: Path) -> None:
    evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    bench.versions["p"], bench.loaded, bench.scored = 1, [], []
    evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    assert bench.loaded == ["p"]
    assert bench.scored == [("pruned", "rte"), ("pruned", "pydoc_choice"), ("p", "perplexity")]

    bench.loaded, bench.scored = [], []
    more = replace(CONFIG, tasks=(*CONFIG.tasks, "boolq"))
    expected = [("dense", "boolq"), ("pruned", "boolq")]
    assert _missing(more, {"dense": "d0", "pruned": "p1"}, tmp_path) == expected
    evaluate(more, MODELS, tmp_path, data_dir=None)
    assert bench.scored == expected

    bench.scored = []
    assert evaluate(CONFIG, MODELS, tmp_path, data_dir=None)["dense"]["average"]["tasks"] == list(CONFIG.tasks)
    assert bench.scored == []
    evaluate(replace(CONFIG, batch_size=2, perplexity=()), {"dense": MODELS["dense"]}, tmp_path, data_dir=None)
    assert bench.scored == [("dense", "rte"), ("dense", "pydoc_choice")]
    assert not (tmp_path / "pruned.json").exists()


def test_interrupt_keeps_finished_pieces_and_nothing_half(bench: Bench, tmp_path: Path) -> None:
    bench.fail_at = ("dense", "pydoc_choice")
    with pytest.raises(KeyboardInterrupt):
        evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    assert set(_files(tmp_path)) == {".pieces/dense/rte.json", "samples/dense/rte.jsonl"}
    assert bench.alive == 0
    bench.fail_at, bench.scored = None, []
    evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    assert ("dense", "rte") not in bench.scored
    assert len(bench.scored) == 5


def test_piece_that_is_not_whole_is_scored_again(bench: Bench, tmp_path: Path) -> None:
    evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    (tmp_path / ".pieces/dense/rte.json").write_text('{"fingerprint": ')
    (tmp_path / "samples/pruned/rte.jsonl").unlink()
    known = {"dense": "d0", "pruned": "p0"}
    assert _missing(CONFIG, known, tmp_path) == [("dense", "rte"), ("pruned", "rte")]


def test_model_that_is_yet_to_be_made_is_pending(bench: Bench, tmp_path: Path) -> None:
    evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    expected = [("tuned", "rte"), ("tuned", "pydoc_choice"), ("tuned", "pydoc")]
    assert _missing(CONFIG, {"tuned": "tune:of its plan:auto"}, tmp_path) == expected


def test_perplexity_of_a_broken_model_is_null(bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench.perplexity = float("nan")
    results = evaluate(CONFIG, MODELS, tmp_path, data_dir=None)
    assert results["dense"]["perplexity"]["pydoc"]["value"] is None
    assert "not finite" in capfd.readouterr().err


def test_files_as_texts_get_their_own_pieces(bench: Bench, tmp_path: Path) -> None:
    texts = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "text.txt"
        path.parent.mkdir()
        path.write_text(folder)
        texts.append(str(path))
    config = EvalConfig(tasks=(), perplexity=tuple(texts), generations=False)
    results = evaluate(config, MODELS, tmp_path / "out", data_dir=None)
    assert list(results["dense"]["perplexity"]) == texts
    assert results["dense"]["average"] == {"metric": "acc", "value": None, "tasks": []}
    assert len(list((tmp_path / "out/.pieces/dense").iterdir())) == 2


@pytest.mark.parametrize("label", ["a/b", "..", "stage", "", "a\n", "é"])
def test_labels_are_file_names(bench: Bench, tmp_path: Path, label: str) -> None:
    with pytest.raises(UsageError, match="cannot be a model's name"):
        evaluate(CONFIG, {label: MODELS["dense"]}, tmp_path, data_dir=None)


def test_the_data_folder_is_that_of_the_environment(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("LORS_DATA_DIR", "~/empty")
    for data_dir in (None, "~/empty"):
        with pytest.raises(MissingError, match=f"{tmp_path}/empty/eval/rte"):
            evaluate(CONFIG, MODELS, tmp_path / "out", data_dir=data_dir)


def test_unknown_task_stops_before_any_model_is_loaded(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean boolq"):
        evaluate(EvalConfig(tasks=("bolq",)), MODELS, tmp_path, data_dir=None)
    assert bench.loaded == []
    assert pieces.STAGE_VERSION >= 1
