"""Small things that a new user met: names of other tools, a file of the other kind, tables and words."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lors_cli.cli import share
from lors_cli.cli.app import app
from lors_cli.cli.views.runs import show_results
from lors_cli.evaluation.summary import average
from lors_cli.output.console import counted
from lors_cli.pipeline import pushing

Lors = Callable[..., Result]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "tune.learning_rate"), ("tune.lr", "tune.learning_rate"), ("tune.lora_r", "tune.rank"),
        ("lora_r", "tune.rank"), ("tune.num_epochs", "tune.epochs"), ("tune.cutoff_len", "tune.data.max_length"),
        ("tune.data.cutoff_len", "tune.data.max_length"), ("tune.bs", "tune.batch_size"),
        ("eval.bs", "eval.batch_size"),
    ],
)  # fmt: skip
def test_other_tools_names_point_to_ours(at_workshop: Path, lors: Lors, theirs: str, ours: str) -> None:
    result = lors("run", "tiny.yaml", f"{theirs}=1")
    assert result.exit_code == 2
    assert f"unknown key; did you mean {ours}?" in result.stderr


def test_target_modules_has_no_counterpart(at_workshop: Path, lors: Lors) -> None:
    assert "every pruned linear gets an adapter" in lors("run", "tiny.yaml", "tune.target_modules=[q_proj]").stderr


def test_an_unknown_key_of_a_large_section_shows_the_nearest_three(at_workshop: Path, lors: Lors) -> None:
    said = " ".join(lors("run", "tiny.yaml", "tune.zzzz=1").stderr.split())
    names = said.partition("the nearest here are ")[2].partition(" (")[0].split(", ")
    assert len(names) == 3
    assert "lors recipes reference" in said


def test_a_recipe_and_a_sweep_are_told_apart(at_workshop: Path, lors: Lors) -> None:
    result = lors("sweep", "tiny.yaml")
    assert result.exit_code == 2
    assert "tiny.yaml is a recipe, not a sweep." in result.stderr
    assert "lors run tiny.yaml" in result.stderr
    Path("s.yaml").write_text("name: s\nrecipe: tiny.yaml\ngrid: {tune.rank: [1, 2]}\n")
    result = lors("run", "s.yaml")
    assert result.exit_code == 2
    assert "lors sweep s.yaml" in result.stderr


def test_home_is_expanded_in_a_models_path(at_finished: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_cli.recipe.loading import load_model_config, load_recipe

    monkeypatch.setenv("HOME", str(Path.cwd()))
    recipe = load_recipe(Path("tiny.yaml"), ["model.path=~/dense", "tune.distill.teacher=~/dense"])
    assert recipe.model.path == f"{Path.cwd()}/dense"
    assert recipe.tune is not None
    assert recipe.tune.distill is not None
    assert recipe.tune.distill.teacher == f"{Path.cwd()}/dense"
    assert load_model_config("~/dense").path == f"{Path.cwd()}/dense"
    shown = lors("inspect", "~/runs/tiny/prune", "--json")
    assert '"pattern": "2:4"' in shown.stdout


def test_words_for_numbers(at_workshop: Path, lors: Lors) -> None:
    assert [counted(*given) for given in ((1, "step"), (2, "step"), (1.0, "epoch"), (0.5, "epoch"), (0, "step"))] == [
        "1 step", "2 steps", "1 epoch", "0.5 epochs", "0 steps",
    ]  # fmt: skip
    Path("one.yaml").write_text(Path("tiny.yaml").read_text().replace("  max_steps: 6\n", "  epochs: 1\n"))
    assert "rows.jsonl, 1 epoch (" in lors("run", "one.yaml", "--dry-run").stdout


def test_four_models_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {name: {"acc": 0.385, "acc_stderr": 0.0487, "num_samples": 100} for name in ("arc_challenge", "winogrande")}
    text = {"wikitext2": {"value": math.e**6, "tokens": 9, "sequence_length": 9}}
    content = {"model": "m", "tasks": tasks, "average": average(tasks), "perplexity": text}
    labels = ["SmolLM2-135M-Instruct", "sparse", "tuned-with-lors-at-rank-16", "tuned-with-spp"]
    show_results(dict.fromkeys(labels, content))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("winogrande" in line for line in lines) == 2  # tables
    assert all(any(label in line for line in lines) for label in labels)
    assert sum(line.split().count("Δ") for line in lines) == 3


def test_a_quiet_doctor_names_only_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from lors_cli.doctor.checkups import Finding
    from lors_cli.doctor.examine import show
    from lors_cli.output import console

    console.configure(verbosity=-1)
    show({"packages": [Finding("torch", "ok", "2.8")], "disk": [Finding("room", "warn", "1 GiB", "Free some.")]})
    shown = capsys.readouterr().out
    assert "torch" not in shown
    assert "Free some." in shown


def test_a_bar_fits_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from lors_cli.output import console, progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console.configure()
    with progress.progress("tuned perplexity a-text-with-a-long-name.jsonl", 1000, "windows") as task:
        task.update(1000, "loss 2.000 · 12345 tokens/s, and more that there is no room for")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert "1000/1000 windows" in lines[-1]


@pytest.mark.parametrize(("typed", "exit_code", "said"), [("n\n", 0, "Nothing was uploaded"), ("", 130, "interrupted")])
def test_who_is_asked_whether_to_upload_may_decline(
    monkeypatch: pytest.MonkeyPatch, typed: str, exit_code: int, said: str
) -> None:
    """An answer of no, and Ctrl-D or Ctrl-C at the question; each was once a bug of lors, with its traceback."""
    monkeypatch.setattr(pushing, "chosen_checkpoint", lambda folder: folder)
    monkeypatch.setattr(pushing, "prepare", lambda *args, **options: None)
    monkeypatch.setattr(pushing, "push", None)  # is not called
    monkeypatch.setattr(share, "show_push", lambda plan: {})
    terminal = type("Terminal", (), {"isatty": lambda self: True})()
    monkeypatch.setattr(share, "sys", type("System", (), {"stdin": terminal}))
    result = CliRunner().invoke(app, ["push", "folder", "me/model"], input=typed)
    assert result.exit_code == exit_code, result.output
    assert said in result.output
    assert "bug" not in result.output
