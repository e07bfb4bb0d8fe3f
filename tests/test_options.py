"""The help of every command, and what the shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import Result

from lors_cli import completion
from lors_cli.cli import app
from lors_cli.recipe.schema import STAGE_CONFIGS, STAGES

Lors = Callable[..., Result]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below `lors`."""
    for name, command in (group or get_command(app)).commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_complete(path: tuple[str, ...], lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    shown = lors(*path, "--help").stdout
    command = COMMANDS[path]
    for parameter in command.params:
        assert parameter.help, (path, parameter.name)
        for option in parameter.opts:
            assert option in shown or parameter.metavar in shown
    if not hasattr(command, "commands"):
        assert f"lors {' '.join(path)} " in shown.partition("Examples")[2].replace("\n", " ") + " "
    assert "<bool>" not in shown


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_examples_name_options_that_there_are(path: tuple[str, ...]) -> None:
    for line in (COMMANDS[path].epilog or "").splitlines()[1:]:
        words = line.split()
        assert words[0] == "lors"
        command = get_command(app)
        for word in words[1:]:
            command = getattr(command, "commands", {}).get(word, command)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, line
        assert len(line) <= 78


def test_every_command_is_listed_under_a_heading(lors: Lors) -> None:
    shown = lors("--help").stdout
    assert "Commands" not in re.findall(r"╭─ ([\w ]+) ─", shown)
    for (name, *rest), command in COMMANDS.items():
        if not rest:
            assert re.search(rf"│ {name} +{re.escape(str(command.help)[:20])}", shown), name


SETTINGS = {
    "method": "method", "pattern": "pattern", "calibration": "calibration.dataset", "rank": "rank", "alpha": "alpha",
    "dataset": "data.dataset", "max_length": "data.max_length", "learning_rate": "learning_rate", "epochs": "epochs",
    "batch_size": "batch_size",
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_in_the_help_are_the_schemas(stage: str) -> None:
    schema = STAGE_CONFIGS[stage]()
    for parameter in COMMANDS[(stage,)].params:
        said = re.search(r"([\w.:-]+) \(default\)|default ([\d.e-]+\d)", parameter.help)
        if said and parameter.name in SETTINGS:
            value: Any = schema
            for part in SETTINGS[parameter.name].split("."):
                value = getattr(value, part)
            word = said[1] or said[2]
            assert word == value if said[1] else float(word) == value, parameter.name


def test_methods_in_the_help_are_the_schemas() -> None:
    for stage in ("prune", "tune"):
        (method,) = [parameter for parameter in COMMANDS[(stage,)].params if parameter.name == "method"]
        offered = completion.setting(stage, "method")("")
        assert set(re.findall(r"[a-z]+(?:-gc)?", method.help)) - {"default", "or"} == set(offered)


# Completion -----------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash would be offered for the last of `words`."""
    environment = {**os.environ, "_LORS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("lors", *words)),
                   "COMP_CWORD": str(len(words))}  # fmt: skip
    code = "import sys; sys.argv[0] = 'lors'; from lors_cli.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.split()


def test_the_shell_is_offered_commands_options_and_values() -> None:
    assert completed("pr") == ["prune"]
    assert completed("prune", "dense", "--patt") == ["--pattern"]
    assert completed("prune", "dense", "--method", "s") == ["sparsegpt"]


def test_recipes_configs_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").touch()
    Path("quick.txt").touch()
    Path("deep").mkdir()
    Path("deep/q.yml").touch()
    assert completion.recipes("qui") == ["quickstart", "quick.yaml"]
    assert completion.recipes("deep/") == ["deep/q.yml"]
    assert completion.recipes("nowhere/") == []
    assert completion.shipped("quick") == ["quickstart"]
    assert "prune/wanda-2of4" in completion.configs("prune")("")
    assert completion.configs("tune")("prune") == []
    assert completion.texts("w") == ["wikitext2"]
    assert completion.texts("quick") == ["quick.txt"]


def test_lists_are_completed_at_their_end() -> None:
    assert completion.tasks("boolq,arc_e") == ["boolq,arc_easy"]
    assert completion.tasks("boolq,b") == []
    assert completion.texts_list("c4,w") == ["c4,wikitext2"]
    assert completion.shapes("llama3") == ["llama3-8b"]


def test_settings_and_their_words() -> None:
    assert completion.settings(None)("tune.data.") == [
        "tune.data.dataset=", "tune.data.max_length=", "tune.data.num_samples=", "tune.data.template=",
        "tune.data.train_on_prompt=", "tune.data.packing=", "tune.data.stream=", "tune.data.shuffle_buffer=",
    ]  # fmt: skip
    assert completion.settings("tune")("rank") == ["rank="]
    assert completion.settings("tune")("rank=") == []
    assert completion.setting("tune", "init")("g") == ["gradient", "gradient-exact"]


def test_the_benchmarks_methods_are_its_own() -> None:
    from lors_cli.bench.model import ARMS

    assert sorted(completion.BENCH_METHODS) == sorted(ARMS)
