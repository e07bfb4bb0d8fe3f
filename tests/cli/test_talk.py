"""`lors generate`: models side by side, where prompts come from, what is said, written and refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lors_cli.cli.app import app
from lors_cli.cli.labels import named_models
from lors_cli.errors import UsageError

Lors = Callable[..., Result]
FEW = ("--max-new-tokens", "6")


@pytest.fixture
def stories(shared_dir: Path) -> str:
    return str(shared_dir / "data" / "models" / "stories260k")


def test_one_model_s_text_alone_is_on_stdout(lors: Lors, stories: str) -> None:
    result = lors("generate", stories, "--prompt", "Once upon a time", "--max-new-tokens", "12")
    assert result.exit_code == 0, result.output
    assert result.stdout == ", there was a little girl named Lily. She\n"
    assert "stories260k: prompt format plain (it has no chat template)" in result.stderr


def test_models_side_by_side_by_prompt(lors: Lors, stories: str) -> None:
    result = lors("generate", f"mine={stories}", stories, "--prompt", "Once", "--prompt", "One day,", *FEW)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [">", "mine", "stories260k"] * 2
    assert lines[1][1:] == lines[2][1:] != lines[4][1:] == lines[5][1:]


def test_one_document_with_every_model_s_texts(lors: Lors, stories: str) -> None:
    result = lors("generate", f"a={stories}", f"b={stories}", "--prompt", "Once", "--json", *FEW)
    document = json.loads(result.stdout)
    assert list(document) == ["a", "b"]
    (said,) = document["a"]
    assert said.keys() == {"prompt", "text", "tokens", "tokens_per_s", "finish_reason"}
    assert (said["prompt"], said["tokens"], said["finish_reason"]) == ("Once", 6, "length")
    assert document["b"][0]["text"] == said["text"]


def test_same_seed_same_text(lors: Lors, stories: str) -> None:
    def text(seed: int) -> str:
        return lors("generate", stories, "--prompt", "One", "--temperature", "1.5", "--seed", seed).stdout

    assert text(1) == text(1) != text(2)


def test_prompts_of_option_file_and_their_answers_in_a_file(lors: Lors, stories: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"instruction": "Tom had", "input": "", "output": "x"}\n{"text": "Lily"}\n')
    out = tmp_path / "new" / "texts.jsonl"
    arguments = ("generate", f"m={stories}", "--prompt", "Once", "--prompts", tmp_path / "p.jsonl", "--out", out, *FEW)
    result = lors(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["prompt"]) for row in rows] == [("m", "Once"), ("m", "Tom had"), ("m", "Lily")]
    assert all(row["text"] in result.stdout for row in rows)
    again = lors(*arguments)
    assert again.exit_code == 2
    assert "is not overwritten" in again.output


def test_lines_through_a_pipe_are_prompts(stories: str) -> None:
    result = CliRunner().invoke(app, ["generate", stories, "--json", *FEW], input="Once\n\n  Lily \n")
    assert [said["prompt"] for said in json.loads(result.stdout)["stories260k"]] == ["Once", "Lily"]


def test_a_piped_line_that_is_not_utf_8_is_named(stories: str) -> None:
    result = CliRunner().invoke(app, ["generate", stories, *FEW], input=b"Once\ncaf\xe9\n")
    assert result.exit_code == 2
    assert "stdin:2: not UTF-8" in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> None:
    """The lines that someone types at a terminal, and then Ctrl-D."""
    given = iter((*lines, EOFError()))

    def read(prompt: str) -> str:
        line = next(given)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("lors_cli.cli.talk.sys", type("System", (), {"stdin": Terminal(), "stdout": sys.stdout}))


def test_typed_lines_are_answered_each_on_its_own(
    lors: Lors, stories: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undecodable = UnicodeDecodeError("utf-8", b"\xe9\n", 0, 1, "invalid continuation byte")
    typed(monkeypatch, "Once", "", "the " * 600, undecodable, "caf\udce9", "Once")  # as the locale C.UTF-8 has it
    result = lors("generate", f"a={stories}", f"b={stories}", "--out", tmp_path / "t.jsonl", *FEW)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["a", "b", "a", "b"]
    assert len({row["text"] for row in rows}) == 1
    assert "warning: The prompt has 6" in result.stderr
    assert "warning: The line is not UTF-8 (invalid continuation byte)" in result.stderr
    assert r"warning: The line is not UTF-8: caf\udce9." in result.stderr


def test_ctrl_c_keeps_what_was_answered(
    lors: Lors, stories: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed(monkeypatch, "Once", KeyboardInterrupt())
    result = lors("generate", stories, "--out", tmp_path / "t.jsonl", *FEW)
    assert result.exit_code == 130
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 1


def test_each_model_of_a_run_in_its_own_prompt_format(lors: Lors, at_finished: Path) -> None:
    models = ("dense=dense", "pruned=runs/tiny/prune", "tuned=runs/tiny/tune", "adapter=runs/tiny/tune/adapter")
    result = lors("generate", *models, "--prompt", "say 3", "--json", *FEW)
    assert result.exit_code == 0, result.output
    said = {label: found[0] for label, found in json.loads(result.stdout).items()}
    assert "tuned: prompt format alpaca (which it was tuned with)" in result.stderr
    assert "adapter: prompt format alpaca (which it was tuned with)" in result.stderr
    assert "pruned: prompt format plain" in result.stderr
    assert said["adapter"]["text"] == said["tuned"]["text"]
    raw = json.loads(lors("generate", "tuned=runs/tiny/tune", "--prompt", "say 3", "--json", "--raw", *FEW).stdout)
    asked = json.loads(
        lors("generate", "runs/tiny/prune", "--prompt", "say 3", "--json", "--template", "alpaca", *FEW).stdout
    )
    assert raw["tuned"][0]["text"] != said["tuned"]["text"]
    assert asked["prune"][0]["text"] != said["pruned"]["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt", "a", "--template", "alpca"), 2, "Did you mean alpaca?"),
        (("--prompt", "a", "--template", "chat"), 2, "has no chat template"),
        (("--prompt", "a", "--template", "alpaca", "--raw"), 2, "Give one of the two"),
        (("--prompt", "a", "--top-p", "0.5"), 2, "give a temperature too"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "max_new_tokens 0 is not above 0"),
        (("--prompt", "caf\udce9"), 2, r"--prompt is not UTF-8: caf\udce9."),
        (("--prompts", "nowhere.txt"), 3, "There is no file nowhere.txt"),
        ((), 2, "there is no prompt"),
        (("--prompt", "a", "--device", "gpu"), 2, "--device: must be auto"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, message: str, lors: Lors, stories: str) -> None:
    result = lors("generate", stories, *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_missing_model_and_missing_base_of_an_adapter(lors: Lors, at_finished: Path) -> None:
    assert lors("generate", "./nothing", "--prompt", "a").exit_code == 3
    (at_finished / "runs" / "tiny" / "prune").rename(at_finished / "elsewhere")
    result = lors("generate", "runs/tiny/tune/adapter", "--prompt", "a")
    assert result.exit_code == 3
    assert "belongs on runs/tiny/prune, which is not there" in result.stderr


def test_json_takes_no_typed_lines(lors: Lors, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    result = lors("generate", stories, "--json")
    assert result.exit_code == 2
    assert "--json takes no typed lines" in json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["base=org/model", "runs/x/tune"], {"base": "org/model", "tune": "runs/x/tune"}),
        (["a/m", "b/m"], {"m": "a/m", "m-2": "b/m"}),
        (["a/m", "m=b/m"], {"m-2": "a/m", "m": "b/m"}),
        (["q=C:/x=y"], {"q": "C:/x=y"}),
        (["./odd=name"], {"odd_name": "./odd=name"}),
    ],
)
def test_names_of_models(arguments: list[str], labels: dict[str, str]) -> None:
    assert named_models(arguments) == labels


def test_folder_with_an_equals_sign_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    assert named_models(["lr=3"]) == {"lr_3": "lr=3"}


def test_name_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="a= names two models"):
        named_models(["a=x", "a=y"])
