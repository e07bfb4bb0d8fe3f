"""What nothing that a user is handed may do: run code, read or write elsewhere."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import lors_cli
from lors_cli.errors import LorsError, UsageError
from lors_cli.evaluation.pieces import samples_path
from lors_cli.models.sources import locate
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.shipped import find_shipped_recipe

SOURCES = sorted(Path(lors_cli.__file__).parent.rglob("*.py"))


def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package, with the name that is called."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((ast.unparse(node.func), node))
    return found


def test_no_shell_and_no_evaluated_text() -> None:
    names = {name for name, _ in calls()}
    assert not {"eval", "exec", "compile", "__import__", "os.system", "os.popen"} & names
    assert not [name for name in names if name.startswith(("pickle.", "marshal.", "shelve.", "dill."))]
    for name, call in calls():
        if name.startswith("subprocess."):
            assert isinstance(call.args[0], ast.List), ast.unparse(call)
            assert "shell" not in [keyword.arg for keyword in call.keywords]


def test_no_process_looks_for_modules_in_the_working_directory() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and any(ast.unparse(item) == "sys.executable" for item in node.elts):
                assert path.name == "processes.py", f"{path}: own_command starts processes"


def test_everything_from_transformers_is_told_not_to_run_code() -> None:
    for name, call in calls():
        owner, _, method = name.rpartition(".")
        if method in ("from_pretrained", "from_config") and owner.startswith("Auto"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            own_shape = (
                method == "from_config" and "settings" in ast.unparse(call) and "dtype=dtype" in ast.unparse(call)
            )
            assert given.get("trust_remote_code") == "False" or None in given or own_shape, ast.unparse(call)


def test_nothing_loads_pickles_of_any_type() -> None:
    for name, call in calls():
        if name in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("weights_only") == "True" or name != "torch.load"
            assert given.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!own x",
                                 "!!binary aGk=", "!!timestamp 2026-01-01"])  # fmt: skip
def test_tags_are_refused_with_their_line(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"name: x\nmodel:\n  path: {tag}\nprune: {{}}\n")
    with pytest.raises(UsageError, match=r"r\.yaml:3: the tag .* is not allowed"):
        load_recipe(Path("r.yaml"))
    assert not Path("ran").exists()


@pytest.mark.parametrize("path", ["package://os/../x.gguf", "package://os//etc/x.gguf", "package://../x.gguf",
                                  "package://os.path/x.gguf", "package:///x.gguf", "package://os/x.bin"])  # fmt: skip
def test_package_paths_stay_in_the_package(path: str) -> None:
    with pytest.raises(UsageError, match="is not of the form package://"):
        locate(path)


@pytest.mark.parametrize("name", ["../README", "/etc/passwd", "..", "recipes/../../README", "a\0b"])
def test_only_shipped_recipes_are_copied(name: str) -> None:
    with pytest.raises(LorsError):
        find_shipped_recipe(name)


@pytest.mark.parametrize("task", ["../../x", "/etc/passwd", "..", ".", "a/b", "a\0b", "x" * 500])
def test_task_names_stay_in_their_folder(task: str, tmp_path: Path) -> None:
    path = samples_path(tmp_path, "dense", task)
    assert path.parent == tmp_path / "samples" / "dense"
    assert path.resolve().parent == path.parent.resolve()
    assert len(path.name) < 120


def test_run_names_stay_below_runs(at_workshop: Path, lors: Callable[..., Result]) -> None:
    for name in ("../x", "/tmp/x", "..", "a/b", ".hidden"):
        result = lors("run", "tiny.yaml", f"name={name}", "--dry-run")
        assert result.exit_code == 2
        assert "must start with a letter or digit" in result.stderr
