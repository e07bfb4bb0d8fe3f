"""No token is shown or written, however it came in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lors_cli.errors import UsageError
from lors_cli.output import console
from lors_cli.output.redaction import MASK, redact
from lors_cli.recipe.loading import load_model_config, load_recipe

TOKEN = "hf_" + "FAKEfake0123456789FAKEfake012345"
OTHER = "not-of-that-form-9f8e7d6c"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)


@pytest.mark.parametrize(("text", "shown"), [
    (f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {MASK}"),
    (f"x{OTHER}y", f"x{MASK}y"),
    (f"https://user:{TOKEN}@huggingface.co/org/name", f"https://{MASK}@huggingface.co/org/name"),
    ("https://user:geheim@proxy:80/x and a@b.c", f"https://{MASK}@proxy:80/x and a@b.c"),
    ("hf_hub_download of org/hf_model at https://huggingface.co/x", "hf_hub_download of org/hf_model at https://huggingface.co/x"),
])  # fmt: skip
def test_what_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_an_empty_token_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert redact("plain text") == "plain text"


def test_a_token_in_a_recipe_is_refused_unseen(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: x\nmodel: {{path: dense}}\ndata_dir: https://user:{TOKEN}@host/x\nprune: {{}}\n")
    with pytest.raises(UsageError, match=r"r\.yaml:3: data_dir: holds a token"):
        load_recipe(recipe)
    with pytest.raises(UsageError, match="holds a token"):
        load_model_config(f"org/{TOKEN}")


def test_messages_and_documents(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json_mode=True)
    console.error(f"GET https://host/x?token={TOKEN} failed", f"with {OTHER}")
    console.document({"message": f"{TOKEN} and {OTHER}"})
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert OTHER not in out + err
    assert (out + err).count(MASK) == 4


def test_a_traceback_of_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from lors_cli.cli.framework import fail

    console.configure()
    with pytest.raises(typer.Exit):
        fail(ZeroDivisionError(f"with {TOKEN}"))
    err = capsys.readouterr().err
    assert TOKEN not in err
    assert err.count(MASK) == 2


def test_nothing_of_the_environment_is_in_what_a_run_writes(at_workshop: Path, lors: Callable[..., Result]) -> None:
    ran = lors("run", "tiny.yaml", "--until", "prune", "prune.method=magnitude", "-vv")
    assert ran.exit_code == 0, ran.output
    reported = lors("report", "runs/tiny", "--json")
    failed = lors("prune", f"https://user:{TOKEN}@host/model", "--out", "p")
    assert failed.exit_code == 2
    written = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    assert len(written) > 10
    printed = [result.output.encode() for result in (ran, reported, failed)]
    for secret in (TOKEN.encode(), OTHER.encode()):
        assert not any(secret in content for content in (*written, *printed))
