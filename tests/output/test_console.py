"""What a person and a program read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from lors_cli.output import console, progress

Capture = pytest.CaptureFixture[str]
ODD = "a [bold]word[/bold] [/x] [link=y] :warning: 100 % C:\\dir\\ [1/3]"


def test_text_is_printed_as_it_is(capsys: Capture) -> None:
    console.configure(verbosity=1)
    for show in (console.info, console.detail, console.heading, console.warn, console.error):
        show(ODD)
        assert ODD in capsys.readouterr().err
    console.error("x", ODD)
    assert ODD in capsys.readouterr().err
    console.result(ODD)
    assert capsys.readouterr().out == ODD + "\n"
    console.table([ODD], [[ODD]])
    assert capsys.readouterr().out.count(ODD) == 2


def test_long_lines_are_not_broken(capsys: Capture) -> None:
    path = "/" + "/".join(["folder"] * 60)
    console.result(path)
    console.info(path)
    captured = capsys.readouterr()
    assert captured.out == path + "\n"
    assert captured.err == path + "\n"


def test_json_mode_keeps_stdout_for_the_document(capsys: Capture) -> None:
    console.configure(json_mode=True)
    console.heading("stage")
    console.info("info")
    console.warn("warning")
    console.result("result")
    console.table(["a"], [["b"]])
    with progress.progress("prune", 2, "blocks") as task:
        task.advance()
    console.document({"ü": [1, None]})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ü": [1, None]}
    assert "warning" in captured.err


def test_documents_hold_no_nan() -> None:
    console.configure(json_mode=True)
    with pytest.raises(ValueError, match="JSON compliant"):
        console.document(float("nan"))


def test_dataclasses_are_objects_in_documents(capsys: Capture) -> None:
    @dataclass
    class Point:
        x: int

    console.configure(json_mode=True)
    console.document({"points": [Point(1)]})
    assert json.loads(capsys.readouterr().out) == {"points": [{"x": 1}]}


def test_without_json_mode_there_is_no_document(capsys: Capture) -> None:
    console.document({"a": 1})
    assert capsys.readouterr().out == ""


def test_levels(capsys: Capture) -> None:
    def words(verbosity: int) -> str:
        console.configure(verbosity=verbosity)
        for show in (console.heading, console.info, console.detail, console.warn):
            show(show.__name__)
        return " ".join(capsys.readouterr().err.replace("warning: ", "").split())

    assert words(-1) == "warn"
    assert words(0) == "heading info warn"
    assert words(1) == "heading info detail warn"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (16_060_522_496, "15.0 GiB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert console.gib(num_bytes) == text


def test_a_narrow_terminal_shows_all_names_and_wraps_the_prose(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    console.configure()
    console.table(["recipe", "what it does"], [["a-name-of-20-letters", "many words " * 10]], prose=True)
    lines = capsys.readouterr().out.splitlines()
    assert "a-name-of-20-letters" in lines[2]
    assert len(lines) > 4
    assert max(map(len, lines[1:])) <= 40


def test_a_wide_table_comes_in_parts_and_loses_no_letter(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console.configure()
    name, titles = "n" * 75, [f"column-of-{number}" for number in range(9)]
    for first in ("cell-a", name):
        rows = [[first, *(f"{place}0.25 ±1.5" for place in range(9))]]
        console.tables(["cell", *titles], rows, bold={(0, 9)})
        shown = capsys.readouterr().out
        plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
        assert max(map(len, plain.splitlines())) <= 80
        assert all(text in plain for text in [*titles, *rows[0][1:]])
        assert plain.count("n") >= len(first.replace("cell-a", ""))
        assert "…" not in plain
        assert re.search(r"\x1b\[1m80\.25", shown)
        assert not re.search(r"\x1b\[1m70\.25", shown)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams are a terminal of 40 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    console.configure()


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_lines_broken_between_words(capsys: Capture) -> None:
    path = "/" + "/".join(["folder"] * 10)
    console.info(f"  written to {path} with every word whole and nothing cut anywhere")
    lines = capsys.readouterr().err.splitlines()
    assert path in [line.strip() for line in lines]
    assert [line for line in lines if path not in line] == [
        "  written to", "    with every word whole and nothing", "    cut anywhere",
    ]  # fmt: skip


@pytest.mark.usefixtures("terminal")
def test_results_are_links_on_a_terminal(capsys: Capture, tmp_path: Path) -> None:
    console.path("report", tmp_path / "a b.md", " (new)")
    shown = capsys.readouterr().out
    assert f";file://{tmp_path}/a%20b.md\x1b\\" in shown
    plain = re.sub(r"\x1b\]8;[^\x1b]*\x1b\\|\x1b\[[\d;]*m", "", shown)
    assert plain == f"report {tmp_path}/a b.md (new)\n"


def test_results_are_plain_paths_elsewhere(capsys: Capture, tmp_path: Path) -> None:
    console.path("report", tmp_path / "a b.md", " (new)")
    assert capsys.readouterr().out == f"report {tmp_path}/a b.md (new)\n"
    console.configure(json_mode=True)
    console.path("report", tmp_path)
    assert capsys.readouterr().out == ""


def test_facts_are_in_line(capsys: Capture) -> None:
    console.facts([("loss", "1.0"), ("pattern", "2:4")])
    assert capsys.readouterr().out == "loss     1.0\npattern  2:4\n"


def test_what_a_terminal_would_obey_is_not_printed(capsys: Capture) -> None:
    console.configure(json_mode=True)
    console.info("a\x1b[2Jb\x07c\udcffd")
    console.document({"name": "a\x7fb\udcffc\x9bd"})
    out, err = capsys.readouterr()
    assert err == "a�[2Jb�c�d\n"
    assert json.loads(out) == {"name": "a\x7fb\udcffc\x9bd"}
    out.encode()
