"""What is shipped: one version, and a wheel and an sdist with all that the commands need and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import lors_cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    return folder


def test_the_wheel_has_the_package_recipes_and_configs_and_no_tests(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"lors_cli-{lors_cli.__version__}-")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "lors_cli"], cwd=ROOT,
                             check=True, capture_output=True, text=True).stdout.split()  # fmt: skip
    shipped = {f"lors_cli/_shipped/{path.relative_to(ROOT).as_posix()}"
               for folder in ("recipes", "configs") for path in (ROOT / folder).rglob("*.yaml")}  # fmt: skip
    assert names == set(tracked) | shipped
    assert {"lors_cli/py.typed", "lors_cli/report/style.css", "lors_cli/_shipped/recipes/quickstart.yaml"} <= names


def test_the_sdist_has_what_a_build_and_the_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "lors_cli/__init__.py", "recipes/quickstart.yaml",
            "tests/test_package.py", "docs/recipe.md"} <= names  # fmt: skip
    assert not {name for name in names if name.endswith((".pyc", ".safetensors"))}
    of_benchmarks = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
                     if re.search(r"^sys\.path\.insert", path.read_text(encoding="utf-8"), re.MULTILINE)}  # fmt: skip
    assert len(of_benchmarks) == 4
    assert not of_benchmarks & names  # what they import is not shipped


def test_the_version_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert not re.search(r"^version *=", text, re.MULTILINE)
    assert f"## {lors_cli.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_is_yaml_of_the_fields_that_it_must_have() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["license"] == "Apache-2.0"
