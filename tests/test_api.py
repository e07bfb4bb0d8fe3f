"""`from lors_cli import …`: names that come when they are asked for, stages from Python, docs/api.md."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lors_cli
from lors_cli import (
    CalibrationConfig,
    EvalConfig,
    LorsError,
    MissingError,
    ModelConfig,
    PruneConfig,
    Task,
    TuneConfig,
    TuneDataConfig,
    UsageError,
    evaluate,
    generate,
    load,
    on_progress,
    prune,
    tune,
)

ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path | None = None, *options: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_import_is_instant_and_names_are_shown() -> None:
    code = (
        "import sys, lors_cli; print(*dir(lors_cli)); "
        "print(*{'torch', 'transformers', 'pydantic', 'rich', 'yaml', 'typer'} & sys.modules.keys())"
    )
    names, loaded, *_ = run(code).stdout.split("\n")
    assert loaded == ""
    assert set(lors_cli.__all__) <= set(names.split())


def test_plans_status_and_reports_of_runs_need_no_torch() -> None:
    code = (
        "import sys, lors_cli.cli.views.runs, lors_cli.pipeline.running, lors_cli.pruning, lors_cli.sweep.status; "
        "print(*{'torch', 'transformers'} & sys.modules.keys())"
    )
    assert run(code).stdout == "\n"


def test_typed_names_are_those_that_are_found() -> None:
    tree = ast.parse(Path(lors_cli.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    of_types = {
        (node.module, alias.asname) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    found = {(f"lors_cli.{module}", name) for module, names in lors_cli._PLACES.items() for name in names}
    assert of_types == found
    for name in lors_cli.__all__:
        assert getattr(lors_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        lors_cli.prun  # noqa: B018


CALIBRATION = CalibrationConfig(dataset="text.jsonl", num_samples=4, sequence_length=32)
PRUNE = PruneConfig(method="wanda", calibration=CALIBRATION)
TUNE = TuneConfig(
    rank=2, max_steps=2, batch_size=2, learning_rate=1e-3, data=TuneDataConfig(dataset="rows.jsonl", max_length=256)
)
EVAL = EvalConfig(tasks=(), perplexity=("text.jsonl",), perplexity_length=32, perplexity_windows=1)


def test_stages_from_python_take_texts_for_paths_and_tell_how_far_they_are(at_workshop: Path) -> None:
    seen: dict[str, list[int]] = {}

    def listen(task: Task) -> None:
        seen.setdefault(task.description, []).append(task.completed)

    with on_progress(listen):
        pruned = prune(PRUNE, "dense", "sparse")
        tuned = tune(TUNE, "sparse", "tuned")
        scores = evaluate(EVAL, {"dense": "dense", "tuned": ModelConfig(path="tuned")}, "scores")
    assert pruned.metrics["sparsity"] == 0.5
    assert tuned.metrics["violations"] == 0
    assert scores["tuned"]["perplexity"]["text.jsonl"]["value"] > 0
    assert (Path("scores") / "stage.json").is_file()
    assert seen["tune"] == [0, 0, 1, 2]
    assert seen["prune"][-1] == 2
    count = sum(map(len, seen.values()))
    prune(PRUNE, "dense", "sparse-2")
    assert sum(map(len, seen.values())) == count, "nobody listens any more"
    assert len(repr(tuned)) < 1500
    assert "layers" not in repr(pruned)


def test_exception_of_a_listener_ends_the_work(at_workshop: Path) -> None:
    def stop(task: Task) -> None:
        raise StopAsyncIteration

    with on_progress(stop), pytest.raises(StopAsyncIteration):
        prune(PRUNE, "dense", "sparse")
    assert not Path("sparse/stage.json").exists()


def test_adapter_on_its_base_says_what_the_merged_model_says(at_finished: Path) -> None:
    import torch

    merged, tokenizer = load("runs/tiny/tune")
    adapted, _ = load(Path("runs/tiny/tune/adapter"))
    ids = torch.tensor([tokenizer("say 3").input_ids])
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, adapted(ids).logits)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert not merged.training
    assert not adapted.training
    single, _ = load("dense", dtype="float32", device="cpu")
    assert single.dtype == torch.float32


def test_load_refuses_what_the_command_line_refuses(at_finished: Path) -> None:
    with pytest.raises(MissingError, match="nothing"):
        load("./nothing")
    with pytest.raises(UsageError, match="ModelConfig: dtype: must be one of"):
        load("dense", dtype="fp16")
    with pytest.raises(ValueError, match="device"):
        load("dense", device="gpu")


def test_generate_answers_in_the_model_s_own_format(at_finished: Path) -> None:
    pieces: list[str] = []
    (said,) = generate("runs/tiny/tune", "say 3", max_new_tokens=8, on_text=pieces.append)
    assert "".join(pieces) == said.text
    raw = generate("runs/tiny/tune", ["say 3", "say 4"], raw=True, max_new_tokens=8)
    assert [each.prompt for each in raw] == ["say 3", "say 4"]
    assert raw[0].text != said.text
    with pytest.raises(LorsError, match="Give one of the two"):
        generate("runs/tiny/tune", "say 3", raw=True, template="alpaca")


def test_no_warning_of_any_library_on_the_way(at_workshop: Path) -> None:
    code = f"""
from lors_cli import *
from lors_cli import CalibrationConfig, EvalConfig, PruneConfig, TuneConfig, TuneDataConfig
if __name__ == "__main__":
    prune({PRUNE!r}, "dense", "sparse")
    tune({TUNE!r}, "sparse", "tuned")
    evaluate({EVAL!r}, {{"tuned": "tuned"}}, "scores")
    load("tuned/adapter")
    generate("tuned", "say 3", max_new_tokens=4, temperature=0.5, top_p=0.9)
"""
    result = run(code, at_workshop, "-W", "error")
    assert result.returncode == 0, result.stderr
    assert "arning" not in result.stderr
    assert result.stdout == ""


def test_the_page_is_what_the_docstrings_say() -> None:
    page = run((ROOT / "docs" / "make_api.py").read_text(encoding="utf-8"))
    assert page.returncode == 0, page.stderr
    assert page.stdout == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "write it anew: python docs/make_api.py > docs/api.md"
    )
    headings = {line[4:] for line in page.stdout.splitlines() if line.startswith("### ")}
    assert headings == {*lors_cli.__all__} - {"__version__"}


def test_a_model_without_a_label_is_refused_in_words(tmp_path: Path) -> None:
    """It ended in an AttributeError: 'str' has no items."""
    with pytest.raises(UsageError, match=r"given by label, as in \{'mine': 'folder'\}, not as 'model'"):
        evaluate(EvalConfig(tasks=(), perplexity=("pydoc",)), "model", tmp_path)  # type: ignore[arg-type]
