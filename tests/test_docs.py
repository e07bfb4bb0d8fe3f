"""The documentation: links lead somewhere, and the blocks marked `run` do what they say on the small real model."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import Result

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of every block to be run."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ +(.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name} links to {target}, and there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_are_closed(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text(encoding="utf-8")))
    for paragraph in re.split(r"\n\s*\n|\n(?=\||-|#)", text):
        assert paragraph.count("$") % 2 == 0, paragraph
        for formula in re.findall(r"\$([^$]+)\$", paragraph):
            assert formula.count("{") == formula.count("}"), formula


def command_lines(code: str) -> list[list[str]]:
    """The words of every command of a bash block."""
    return [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run_one_after_the_other(
    page: Path, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lors: Callable[..., Result]
) -> None:
    from lors_cli.pruning import methods
    from lors_cli.tuning.baselines import LAYERS

    shutil.copytree(shared_dir / "data" / "models" / "stories260k", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lors_cli.recipe.section.OWN_METHODS", set())
    with patch.dict(methods.STATISTICS), patch.dict(methods.SOLVERS), patch.dict(LAYERS):  # the page adds some
        for language, code in blocks(page):
            if language == "python":
                exec(compile(code, f"{page.name}: {code[:60]!r}", "exec"), {"__name__": "__main__"})
                continue
            for words in command_lines(code):
                assert words[0] == "lors", f"{page.name}: a block to be run may hold lors commands only, not {words}"
                result = lors(*words[1:])
                assert result.exit_code == 0, f"{page.name}: {words}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_options_that_there_are(page: Path) -> None:
    """Every `lors COMMAND --option` in a bash block exists."""
    from typer.main import get_command

    from lors_cli.cli.app import app

    for code in re.findall(r"^```bash[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for words in command_lines(code):
            if "-m" in words and "lors_cli" in words:
                words = ["lors", *words[words.index("lors_cli") + 1 :]]
            if not words or words[0] != "lors":
                continue
            command = get_command(app)
            for word in words[1:]:
                inner = getattr(command, "commands", {})
                if not inner:
                    break
                assert word in inner or word.startswith("-"), f"{page.name}: {words}"
                command = inner.get(word, command)
            command = command.make_context(command.name, [], resilient_parsing=True).command  # with all of its flags
            known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, f"{page.name}: {words}"
