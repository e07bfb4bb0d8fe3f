"""A run again from its manifest: the same bits, and a word about all that is not as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.pipeline.manifest import results
from lors_cli.pipeline.repeat import differences

Lors = Callable[..., Result]
RUN = Path("runs/tiny")
MANIFEST = RUN / "manifest.json"


def bits(run: Path) -> dict[str, str]:
    """The hash of every weight file, and of every score file without its model's path."""
    found = {}
    for path in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((run / "eval").glob("*d.json")) + sorted((run / "eval").glob("dense.json")):
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "model"}
        found[path.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_deterministic_run_repeated_elsewhere_from_its_manifest_alone_has_the_same_bits(
    at_workshop: Path, lors: Lors
) -> None:
    assert lors("run", "tiny.yaml", "deterministic=true").exit_code == 0
    shutil.copy(MANIFEST, "kept.json")
    first = bits(RUN)
    assert len(first) == 3 + 3  # two models and the adapter; three models' scores
    RUN.rename("elsewhere")
    settings = {**os.environ, "PYTHONHASHSEED": "7", "LORS_DATA_DIR": ""}
    command = [sys.executable, "-m", "lors_cli", "run", "--from-manifest", "kept.json", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert bits(Path("runs/tiny-repeat")) == first
    document = json.loads(done.stdout)
    assert [stage["status"] for stage in document["stages"]] == ["done"] * 3
    assert document["repeat"]["different_files"] == {"prune": [], "tune": [], "eval": []}
    content = json.loads((Path("runs/tiny-repeat") / "manifest.json").read_text())
    assert content["recipe"]["deterministic"] is True
    assert all(stage["environment"]["deterministic"] for stage in content["stages"])


STAGES = ("prune", "tune", "eval")


def test_other_results_are_named(at_finished: Path) -> None:
    from lors_cli.pipeline.repeat import open_repeat

    shutil.copytree(RUN, "again")
    repeat = open_repeat(RUN, [])
    assert repeat.compare(Path("again"), STAGES) == {"prune": [], "tune": [], "eval": []}
    edit(Path("again/tune/stage.json"), lambda record: record["files"].update({"model.safetensors": "0"}))
    edit(Path("again/eval/tuned.json"), lambda scores: scores.update(model="moved"))
    edit(Path("again/eval/pruned.json"), lambda scores: scores["tasks"]["pydoc_choice"].update(acc=2))
    found = repeat.compare(Path("again"), STAGES)
    assert found == {"prune": [], "tune": ["model.safetensors"], "eval": ["pruned.json"]}
    (Path("again") / "prune" / "stage.json").unlink()
    assert repeat.compare(Path("again"), STAGES)["prune"] == ["model.safetensors"]
    assert repeat.compare(Path("again"), ["tune"]) == {"tune": ["model.safetensors"]}  # as after --until
    assert set(results(RUN, "tune")) == {"model.safetensors", "adapter/adapter_model.safetensors"}


def test_the_manifest_says_what_went_in(at_finished: Path) -> None:
    content = json.loads(MANIFEST.read_text())
    read = {(entry["used_by"], entry["name"]): entry["fingerprint"] for entry in content["inputs"]}
    for name, users in (("text.jsonl", ("prune", "eval")), ("rows.jsonl", ("tune",))):
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        assert all(read[user, name].endswith(digest) for user in users)
    assert read["model", "dense"].startswith("folder:")
    assert ("eval", "pydoc_choice") in read
    assert content["seeds"] == {"recipe": 0, "calibration": 0, "tune": 0}
    assert content["recipe"]["tune"]["save_steps"] == 2
    environment = content["environment"]
    assert environment["threads"] >= 1
    assert environment["processor"]
    assert environment["packages"]["torch"] in sys.modules["torch"].__version__


def test_changed_inputs_are_refused_unless_allowed(at_finished: Path, lors: Lors) -> None:
    with open("rows.jsonl", "a") as file:
        file.write('{"instruction": "one", "input": "", "output": "more"}\n')
    result = lors("run", "--from-manifest", RUN, "--dry-run")
    assert result.exit_code == 2
    assert "tune: rows.jsonl was jsonl#2:" in result.stderr
    assert "--allow-changed-inputs" in result.stderr
    result = lors("run", "--from-manifest", RUN, "--dry-run", "--allow-changed-inputs")
    assert result.exit_code == 0
    assert "warning: tune: rows.jsonl was jsonl#2:" in result.stderr


def test_what_differs_of_the_machine_is_a_warning(at_finished: Path, lors: Lors) -> None:
    def change(content: dict[str, Any]) -> None:
        for stage in content["stages"][:2]:
            stage["environment"]["packages"]["torch"] = "0.1"
            stage["environment"]["processor"] = "Abacus"
            stage["environment"]["code"] = {"commit": "c0ffee", "dirty": True}

    edit(MANIFEST, change)
    result = lors("run", "--from-manifest", MANIFEST, "--dry-run")
    assert result.exit_code == 0
    assert "warning: prune, tune: packages torch was 0.1, is " in result.stderr
    assert "warning: prune, tune: processor was Abacus, is " in result.stderr
    unchanged = lors("run", "--from-manifest", MANIFEST, "--dry-run").stderr
    assert "python was" not in unchanged


def test_differences_name_what_both_know() -> None:
    then = {"python": "3.10", "threads": 2, "old": 1, "code": {"commit": "a", "dirty": False}, "packages": {"x": "1"}}
    now = {"python": "3.11", "threads": 2, "new": 1, "code": {"commit": "b", "dirty": True}, "packages": {"x": "1"}}
    assert differences(then, now) == [
        "code commit was a, is b", "python was 3.10, is 3.11", "the code's files differed from its commit now",
    ]  # fmt: skip
    assert differences(then, then) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--from-manifest", "runs/tiny", "--out", "runs/tiny"], 2, "is the run that is to be repeated"),
        (["--from-manifest", "runs/tiny", "tune.rank=2"], 2, "tune.rank: a repeat keeps its manifest's settings"),
        (["--from-manifest", "runs/tiny", "tiny.yaml"], 2, "tiny.yaml: a repeat keeps"),
        (["--from-manifest", "runs/none"], 3, "No manifest at runs/none"),
        (["--from-manifest", "rows.jsonl"], 2, "does not say enough"),
        (["--from-manifest", "runs/tiny", "model.path=gone/away/x"], 3, "KEY=VALUE: name, data_dir, model.path"),
        (["tiny.yaml", "--allow-changed-inputs"], 2, "is for --from-manifest"),
        ([], 2, "no recipe is named"),
    ],
)
def test_what_cannot_be_repeated(
    at_finished: Path, lors: Lors, arguments: list[str], exit_code: int, said: str
) -> None:
    result = lors("run", *arguments, "--dry-run")
    assert result.exit_code == exit_code, result.stderr
    assert said in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("recipe"), lambda content: content.update(recipe=[1]),
        lambda content: content.update(stages=[]), lambda content: content["stages"][0].pop("results"),
        lambda content: content["inputs"][0].update(fingerprint=7), lambda content: content["inputs"].append("x"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_whole(at_finished: Path, lors: Lors, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(MANIFEST, change)
    result = lors("run", "--from-manifest", RUN, "--dry-run")
    assert result.exit_code == 2
    assert "does not say enough to repeat the run" in result.stderr


def test_a_list_of_inputs_of_another_length_is_a_change(at_finished: Path, lors: Lors) -> None:
    edit(MANIFEST, lambda content: content["inputs"].pop())
    result = lors("run", "--from-manifest", RUN, "--dry-run")
    assert result.exit_code == 2
    assert "the run read 4 models and texts, and this version would read 5" in result.stderr


def test_moved_files_are_given_anew(at_finished: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    elsewhere = here / "other"
    elsewhere.mkdir()
    Path("dense").rename(elsewhere / "model")
    monkeypatch.chdir(elsewhere)
    result = lors("run", "--from-manifest", here / RUN, "model.path=model", "--dry-run")
    assert result.exit_code == 3
    started = json.loads((here / MANIFEST).read_text())["working_directory"]
    assert f"The run was started in {started}, and paths are relative to that" in result.stderr
    shutil.copy(here / "text.jsonl", "text.jsonl")
    result = lors(
        "run", "--from-manifest", here / RUN, "model.path=model", f"tune.data.dataset={here}/rows.jsonl", "--dry-run"
    )
    assert result.exit_code == 0, result.stderr
