"""The help of every command, and what the shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.main import get_command
from typer.testing import Result

from lors_cli.cli import completion
from lors_cli.cli.app import app
from lors_cli.cli.flags import FLAGS, parameters
from lors_cli.recipe.schema import STAGE_CONFIGS, ModelConfig
from lors_cli.recipe.settings import flag_name

Lors = Callable[..., Result]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below `lors` that is for people, with all of its flags."""
    for name, command in (group or get_command(app)).commands.items():
        if command.hidden:
            continue
        yield (*path, name), command.make_context(name, [], resilient_parsing=True).command
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
        command = command.make_context(command.name, [], resilient_parsing=True).command
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, line
        assert len(line) <= 78


def test_every_command_is_listed_under_a_heading(lors: Lors) -> None:
    shown = lors("--help").stdout
    assert "Commands" not in re.findall(r"╭─ ([\w ]+) ─", shown)
    for (name, *rest), command in COMMANDS.items():
        if not rest:
            assert re.search(rf"│ {name} +{re.escape(str(command.help)[:20])}", shown), name


SETTINGS = [
    (command, flag_name(key), section, key)
    for command, sections in {"prune": ("prune", "model"), "tune": ("tune", "model"), "eval": ("eval", "model"),
                              "merge": ("model",)}.items()
    for section in sections
    for keys in FLAGS[section].values()
    for key in keys
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag", "section", "key"), SETTINGS)
def test_defaults_in_the_help_are_the_schemas(command: str, flag: str, section: str, key: str) -> None:
    (parameter,) = [parameter for parameter in COMMANDS[(command,)].params if parameter.name == flag]
    value: Any = ModelConfig(path="x") if section == "model" else STAGE_CONFIGS[section]()
    for part in key.split("."):
        value = getattr(value, part)
    assert parameter.default is None, "a flag that was not given must not outrank the file"
    said = re.search(r"Default: (\S+)\.$", parameter.help)
    if value is None or value == () or value is False:
        assert said is None
    else:
        assert said is not None
        word = said[1]
        assert float(word) == value if isinstance(value, (int, float)) else word.split(",") == [*value] or word == value


def test_flags_take_what_the_schema_says() -> None:
    kinds = {
        "prune": {"method": str, "sparsity": float, "num_samples": int},
        "tune": {"learning_rate": float, "max_steps": int, "max_tokens": float, "init": str},
        "eval": {"tasks": str, "batch_size": int},
        "model": {"device": str},
    }
    for section, flags in kinds.items():
        found = {parameter.name: get_args(get_args(parameter.annotation)[0])[0] for parameter in parameters([section])}
        assert flags.items() <= found.items()


def test_help_is_the_settings_own_words() -> None:
    said = {parameter.opts[0]: parameter.help for parameter in COMMANDS[("tune",)].params}
    assert said["--epochs"] == "Passes over the data. Default: 3."
    assert said["--max-steps"] == "Optimiser steps; overrides epochs."
    assert said["--init"].startswith("Start lora_A from the loss gradient's right singular vectors, or from a Kaiming")
    assert said["--init"].endswith(" Default: gradient for lors, kaiming for the others, as their authors have it.")
    assert said["--dataset"] == (
        "alpaca, c4, pydoc, slimpajama, wikitext2, a file, or a dataset on the hub (org/name, "
        "org/name:configuration@revision). Default: alpaca."
    )
    (samples,) = [parameter.help for parameter in COMMANDS[("prune",)].params if parameter.name == "num_samples"]
    assert samples == "Sequences. Default 128; a pre-tokenised file is used whole."


def test_methods_in_the_help_are_the_schemas() -> None:
    for stage in ("prune", "tune"):
        (method,) = [parameter for parameter in COMMANDS[(stage,)].params if parameter.name == "method"]
        (listed,) = re.findall(r"One of (.*?)\.", method.help)
        assert listed.split(", ") == completion.values(f"{stage}.method")("")


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
    assert completion.texts("w") == ["wikitext2", "wikitext2-lines"]
    assert completion.texts("quick") == ["quick.txt"]


def test_lists_are_completed_at_their_end() -> None:
    assert completion.tasks("boolq,arc_e") == ["boolq,arc_easy"]
    assert completion.tasks("boolq,b") == []
    assert completion.texts_list("c4,w") == ["c4,wikitext2", "c4,wikitext2-lines"]
    assert completion.shapes("llama3") == ["llama3-8b", "llama3.2-1b"]


def offered(stage: str | None, incomplete: str) -> list[str]:
    """What KEY=VALUE would be offered where nothing was typed before it."""
    return completion.settings(stage)(typer.Context(get_command(app)), incomplete)


def test_settings_and_their_words() -> None:
    assert offered(None, "tune.data.") == [
        "tune.data.dataset=", "tune.data.split=", "tune.data.columns.text=", "tune.data.columns.messages=",
        *(f"tune.data.columns.{name}=" for name in ("instruction", "input", "output", "system", "history")),
        "tune.data.max_length=", "tune.data.num_samples=", "tune.data.template=",
        "tune.data.train_on_prompt=", "tune.data.packing=", "tune.data.stream=", "tune.data.shuffle_buffer=",
        "tune.data.mix=",
    ]  # fmt: skip
    assert offered("tune", "rank") == ["rank="]
    assert offered("tune", "rank=") == []
    assert offered("tune", "nothing=") == []
    assert completion.values("tune.init")("g") == ["gradient", "gradient-exact"]


def test_values_are_offered_after_the_equals_sign() -> None:
    assert offered("tune", "method=sq") == ["method=sqft", "method=sqft-gc"]
    assert offered(None, "tune.method=h") == ["tune.method=hira", "tune.method=hira-gc"]
    assert offered(None, "prune.refit=") == ["prune.refit=true", "prune.refit=false"]
    assert offered(None, "prune.calibration.dataset=w") == [
        f"prune.calibration.dataset={name}" for name in ("wikitext2", "wikitext2-lines")
    ]
    assert offered("eval", "tasks=[boolq,arc_e") == ["tasks=[boolq,arc_easy"]
    assert offered(None, "eval.models=[p") == ["eval.models=[pruned"]


@pytest.mark.parametrize("before", [["tune"], ["tune", "sparse"], ["tune", "sparse", "rank=8"], ["run", "a.yaml"]])
def test_values_of_settings_in_the_shell(before: list[str]) -> None:
    key = "tune.method" if before[0] == "run" else "method"
    assert completed(*before, f"{key}=lors") == [f"{key}=lors"]  # zsh, fish
    assert completed(*before, key, "=", "sq") == ["sqft", "sqft-gc"]  # bash
    assert completed(*before, key, "=") == ["lors", "sqft", "sqft-gc", "spp", "spp-gc", "hira", "hira-gc", "lora"]


def test_models_are_files_until_a_setting_is_typed() -> None:
    assert completed("eval", "t") == completed("tune", "r") == []
    assert completed("eval", "sparse", "tasks=[bo") == ["tasks=[boolq"]


def test_the_benchmarks_methods_are_its_own() -> None:
    from lors_cli.bench.model import ARMS

    assert sorted(completion.BENCH_METHODS) == sorted(ARMS)
