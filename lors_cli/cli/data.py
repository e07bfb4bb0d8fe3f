"""`lors data show`: samples as the model will see them."""

from __future__ import annotations

import itertools
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from lors_cli.cli import options as o
from lors_cli.cli.framework import Group, command
from lors_cli.data.samples import IGNORED, Sample, TuneData
from lors_cli.errors import UsageError
from lors_cli.files.hashes import plain
from lors_cli.output import console
from lors_cli.recipe.shipped import find, shipped_files

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig, TuneConfig

MASKED_STYLE = "dim"
SPECIAL_STYLE = "bold cyan"
MASKED_MARKS = ("⟦", "⟧")
"""Around what has no label, where there are no styles."""

data_app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)


@data_app.callback()
def data() -> None:
    """Look at the data that a model is tuned on."""


@command(data_app, "Commands", "lors data show quickstart", "lors data show mine.yaml tune.data.template=chat --num 5")
def show(
    recipe: o.Tuned,
    overrides: o.RunSettings = None,
    num: o.NumShown = 3,
    model: o.Tokenizer = None,
    data_dir: o.DataDir = None,
) -> None:
    """Show samples as the model will see them: what has no label is dimmed, special tokens are coloured."""
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.data.tokens import tuning_data
    from lors_cli.models.blocks import model_max_length
    from lors_cli.models.loading import load_config, load_tokenizer
    from lors_cli.recipe.tuning import data_name

    config, source, folder = load_settings(recipe, overrides or [], model)
    tokenizer = load_tokenizer(source)
    found = tuning_data(
        config, tokenizer, model_max_length=model_max_length(load_config(source)),
        data_dir=resolve_data_dir(str(data_dir) if data_dir else folder),
    )  # fmt: skip
    shown = [found.samples[index] for index in range(min(num, len(found.samples)))]
    found.close()
    document = {"dataset": data_name(plain(config.data)), **figures(found, shown)}
    for index, sample in enumerate(shown):
        _show_sample(index, sample, tokenizer)
    _show_figures(document)
    console.document(
        {**document, "samples": [{**sample, "text": decoded(sample["input_ids"], tokenizer)} for sample in shown]}
    )


def load_settings(name: str, overrides: list[str], model: str | None) -> tuple[TuneConfig, ModelConfig, str | None]:
    """The tuning settings of a recipe or a tune config, the model whose tokenizer they are for, its data's folder."""
    from lors_cli.recipe.loading import load_model_config, load_recipe, load_stage

    if _is_config(name):
        if model is None:
            raise UsageError(f"{name} is a tune config and names no model.", "Say whose tokenizer: --model MODEL.")
        config: Any = load_stage("tune", find("config", name), overrides)
        return config, load_model_config(model), None
    try:
        recipe = load_recipe(find("recipe", name), overrides)
    except UsageError as error:
        if "There is no recipe" in error.message:
            tunes = [config for config in shipped_files("config") if config.startswith("tune/")]
            raise UsageError(error.message, f"{error.hint} Tune configs: {', '.join(tunes)}.") from None
        raise
    if recipe.tune is None:
        raise UsageError(f"{name} has no tune stage, so there is no data to tune on.")
    return recipe.tune, load_model_config(model) if model else recipe.model, recipe.data_dir


def _is_config(name: str) -> bool:
    """Whether `name` means the config of a single stage: a shipped one, or a file without the keys of a recipe."""
    from lors_cli.recipe.loading import read_settings

    path = Path(os.path.expanduser(name))
    if not path.is_file():
        stem = name.removeprefix("configs/").removesuffix(".yaml")
        return stem in shipped_files("config") and stem not in shipped_files("recipe")
    try:
        keys = read_settings(path).data
    except UsageError:
        return False  # reading it as a recipe says what is wrong
    return bool(keys) and not {"name", "model", "tune", "prune", "eval"} & set(keys)


def figures(found: TuneData, shown: list[Sample]) -> dict[str, Any]:
    """How many samples and labels there are, and how long samples are; of a stream, in those that are shown."""
    counted = shown if found.num_steps is not None else found.samples
    lengths = [len(sample["input_ids"]) for sample in counted]
    num_labels = sum(label != IGNORED for sample in counted for label in sample["labels"][1:])
    return {
        "num_samples": len(found.samples), "num_rows": found.num_rows, "skipped": dict(found.skipped),
        "num_tokens": found.num_tokens, "num_steps": found.num_steps, "counted_samples": len(counted),
        "num_labels": num_labels, "label_share": round(num_labels / sum(lengths), 4),
        "lengths": {"min": min(lengths), "median": statistics.median_low(lengths), "max": max(lengths)},
    }  # fmt: skip


def texts_of(sample: Sample) -> list[Sample]:
    """The texts that share a sample: of an isolated one those whose positions start anew, else it alone."""
    if "position_ids" not in sample:
        return [sample]
    starts = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
    bounds = zip(starts, [*starts[1:], len(sample["input_ids"])], strict=True)
    return [{key: sample[key][first:last] for key in ("input_ids", "labels")} for first, last in bounds]


def decoded(ids: list[int], tokenizer: Any) -> str:
    """Tokens as text, special ones too."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def styled_text(sample: Sample, tokenizer: Any, *, marks: bool) -> Text:
    """A text with special tokens coloured and what has no label dimmed, or with `marks` (without styles) in ⟦ ⟧."""
    special_ids = set(tokenizer.all_special_ids)
    kinds = [(label == IGNORED, token in special_ids)
             for token, label in zip(sample["input_ids"], sample["labels"], strict=True)]  # fmt: skip
    text, before, last, was_masked = Text(), "", 0, False
    for (masked, special), run in itertools.groupby(kinds):
        last += len(list(run))
        if marks and masked != was_masked:
            text.append(MASKED_MARKS[0] if masked else MASKED_MARKS[1])
        was_masked = masked
        whole = decoded(sample["input_ids"][:last], tokenizer)
        styles = ([MASKED_STYLE] if masked else []) + ([SPECIAL_STYLE] if special else [])
        text.append(whole[len(before) :], style=" ".join(styles))
        before = whole
    if marks and was_masked:
        text.append(MASKED_MARKS[1])
    return text


def _show_sample(index: int, sample: Sample, tokenizer: Any) -> None:
    length = len(sample["input_ids"])
    num_labels = sum(label != IGNORED for label in sample["labels"][1:])
    texts = texts_of(sample)
    several = f" · {len(texts)} texts" if len(texts) > 1 else ""
    title = f"sample {index} · {length} tokens{several} · {num_labels} labels ({100 * num_labels / length:.1f} %)"
    console.styled(Text(title, style="bold"))
    for text in texts:
        console.styled(styled_text(text, tokenizer, marks=not console.shows_styles()))
    console.result()


def _show_figures(document: dict[str, Any]) -> None:
    lengths, skipped = document["lengths"], document["skipped"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none"
    console.result(f"{document['dataset']}: {document['num_samples']} samples, {document['num_tokens']} tokens")
    if document["num_steps"] is not None:
        console.result(f"a stream for {document['num_steps']} steps; of the samples shown:")
    console.result(f"lengths {lengths['min']} to {lengths['max']} tokens, median {lengths['median']}")
    console.result(f"labels {100 * document['label_share']:.1f} % of the tokens; rows skipped: {left_out}")
    console.result("Dimmed: no label. Coloured: special tokens." if console.shows_styles() else "⟦…⟧: no label.")
