"""What is remembered per user: the latest entries, and nothing where the file cannot be read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lors_cli.files.remembered import Remembered, user_cache
from lors_cli.output import console


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Remembered("few", "few things", most=2)


def test_the_oldest_goes_first(few: Remembered) -> None:
    for key in "abcd":
        few.keep(key, {"is": key})
    assert few.get("a") == {"is": "a"}  # in this process
    another = Remembered("few", "few things", most=2)
    assert another.get("a") is None
    assert another.get("d") == {"is": "d"}
    assert list(json.loads((user_cache() / "few.json").read_text())) == ["b", "c", "d"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_broken_file_knows_nothing_and_is_replaced(few: Remembered, content: str) -> None:
    user_cache().mkdir()
    (user_cache() / "few.json").write_text(content)
    assert few.get("a") is None
    few.keep("a", 1)
    assert few.get("a") == 1


def test_what_cannot_be_kept_is_said(few: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "detail", said.append)
    user_cache().write_text("a file stands where the folder should be")
    few.keep("a", 1)
    assert few.get("a") == 1  # in this process
    assert Remembered("few", "few things").get("a") is None
    assert len(said) == 1
    assert said[0].startswith("few things are not remembered: ")
