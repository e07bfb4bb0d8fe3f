"""`lors generate`: what one or several models answer, to prompts that are given or typed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lors_cli.cli import options as o
from lors_cli.cli.flags import given
from lors_cli.cli.framework import AROUND, command
from lors_cli.cli.labels import named_models
from lors_cli.errors import SURROGATE, UsageError, shorten
from lors_cli.output import console, progress

if TYPE_CHECKING:
    from lors_cli.data.asked import Row
    from lors_cli.models.generation import Generated
    from lors_cli.recipe.schema import ModelConfig

talk_app = typer.Typer()
Answer = Callable[["Row", Callable[[str], None] | None], "Generated"]
"""A model that is loaded: from a row, and what takes pieces of text as they come, to what it says."""


@command(
    talk_app, AROUND, "lors generate tuned --prompt 'Name three primary colours.'",
    "lors generate dense=MODEL tuned --prompts questions.txt --seed 1",
    "lors generate tuned --temperature 0.7 --top-p 0.9 --seed 1", sections=("model",),
)  # fmt: skip
def generate(
    models: o.Models, prompt: o.Prompt = None, prompts: o.Prompts = None, *, template: o.Template = None,
    raw: o.Raw = False, max_new_tokens: o.MaxNewTokens = 256, temperature: o.Temperature = 0.0, top_p: o.TopP = 1.0,
    seed: o.Seed = 0, out: o.TextsOut = None, **flags: Any,
) -> None:  # fmt: skip
    """Answer prompts with one or several models side by side."""
    from lors_cli.models.generation import Sampling
    from lors_cli.recipe.loading import load_model_config
    from lors_cli.tuning.loading import wanted_format

    form, sampling = wanted_format(template, raw), Sampling(max_new_tokens, temperature, top_p, seed)
    configs = {label: load_model_config(path, **given("model", flags)) for label, path in named_models(models).items()}
    rows = _rows(prompt or [], prompts)
    found: dict[str, list[Generated]] = {label: [] for label in configs}

    with _kept(out) as keep:

        def note(label: str, said: Generated) -> None:
            found[label].append(said)
            keep(label, said)

        if rows is None:
            opened = {label: _open(label, config, form, sampling) for label, config in configs.items()}
            _converse(opened, note)
        else:
            _answer(configs, rows, lambda label, config: _open(label, config, form, sampling), note)
            if len(configs) > 1:
                _show_side_by_side(found)
    if out is not None:
        console.path("texts", out)
    console.document({label: [asdict(said) for said in answers] for label, answers in found.items()})


def _rows(prompt: list[str], prompts: Path | None) -> list[Row] | None:
    """What is to be answered; None where it is to be typed."""
    from lors_cli.data.asked import question, read_prompts
    from lors_cli.data.text_files import decode

    rows = [question(_utf8(text, "--prompt")) for text in prompt]
    rows += read_prompts(prompts) if prompts is not None else []
    if rows:
        return rows
    if sys.stdin.isatty():
        if console.is_json():
            raise UsageError("--json takes no typed lines.", "Give --prompt, --prompts, or lines through a pipe.")
        return None
    text = decode("stdin", 1, sys.stdin.buffer.read(), "Prompts are read as UTF-8.")
    rows = [question(line.strip()) for line in text.split("\n") if line.strip()]
    if not rows:
        raise UsageError("there is no prompt.", "Give --prompt TEXT, --prompts FILE, or lines through a pipe.")
    return rows


def _utf8(text: str, what: str) -> str:
    """A text from the command line or terminal, whose bytes that are not UTF-8 Python hides in half surrogates."""
    if SURROGATE.search(text):
        raise UsageError(f"{what} is not UTF-8: {shorten(text)}.")
    return text


@contextlib.contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[str, Generated], None]]:
    """Writes each answer to a file as a row of its own, as soon as it is there."""
    if out is None:
        yield lambda label, said: None
        return
    if out.exists():
        raise UsageError(f"{out} is there already; it is not overwritten.", "Name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", encoding="utf-8") as file:

        def keep(label: str, said: Generated) -> None:
            file.write(json.dumps({"model": label, **asdict(said)}, ensure_ascii=False) + "\n")
            file.flush()

        yield keep


def _open(label: str, config: ModelConfig, form: str | None, sampling: Any) -> Answer:
    """Load a model and say once in which prompt it is asked."""
    from lors_cli.models.generation import generate_text
    from lors_cli.tuning.loading import open_model, prompt_of

    model, tokenizer = open_model(config)
    found = prompt_of(config, tokenizer, form)
    console.info(f"  {label}: prompt format {found.name} ({found.why})")
    return lambda row, on_text: generate_text(model, tokenizer, found, row, sampling, on_text)


def _answer(
    configs: dict[str, ModelConfig], rows: list[Row], load: Callable[[str, ModelConfig], Answer],
    note: Callable[[str, Generated], None],
) -> None:  # fmt: skip
    """Ask the models one after the other, so that one is in memory at a time; a single one is heard as it speaks."""
    from lors_cli.data.asked import shown
    from lors_cli.machine.memory import collect_garbage

    alone = len(configs) == 1
    for label, config in configs.items():
        answer = load(label, config)
        if alone:
            for row in rows:
                if len(rows) > 1:
                    console.quote(shown(row))
                note(label, _aloud(answer, row))
        else:
            with progress.progress(f"generate {label}", len(rows), "prompts") as task:
                for row in rows:
                    note(label, answer(row, None))
                    task.advance()
        del answer
        collect_garbage()


def _aloud(answer: Answer, row: Row) -> Generated:
    """An answer, shown as it comes."""
    said = answer(row, console.piece)
    console.piece("\n")
    return said


def _converse(opened: dict[str, Answer], note: Callable[[str, Generated], None]) -> None:
    """Answer each line that is typed, on its own, until the end of the input."""
    from lors_cli.data.asked import question

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and come back
    console.info("  Type a prompt a line; Ctrl-D ends.")
    while True:
        try:
            line = _utf8(input("> "), "The line").strip()
        except EOFError:
            console.result()
            return
        except UnicodeDecodeError as error:
            console.warn(f"The line is not UTF-8 ({error.reason}).")
            continue
        except UsageError as error:
            console.warn(str(error))
            continue
        if not line:
            continue
        for label, answer in opened.items():
            if len(opened) > 1:
                console.heading(label)
            try:
                note(label, _aloud(answer, question(line)))
            except UsageError as error:  # this line does not fit; the next one may
                console.warn(str(error))


def _show_side_by_side(found: dict[str, list[Generated]]) -> None:
    """Every prompt with the models' answers below it."""
    for answers in zip(*found.values(), strict=True):
        console.quote(answers[0].prompt)
        console.passages([(label, said.text.strip()) for label, said in zip(found, answers, strict=True)])
