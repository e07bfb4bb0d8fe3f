"""A model for use: a checkpoint, or an adapter on its base; and text from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.data.asked import PLAIN, PromptFormat, Row, prompt_format, question
from lors_cli.errors import MissingError, UsageError
from lors_cli.models import loading
from lors_cli.models.generation import Generated, Sampling, generate_text
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.adapter import CONFIG_NAME, base_of, load_adapter, read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | Path, *, dtype: str = "auto", device: str = "auto", revision: str = "main"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, ready for use; of a folder with an adapter, its base with the adapter on it.

    Args:
        model: folder, hub id, .gguf file, package://module/file.gguf, or the `adapter` folder of a tuned model.
        dtype: auto, bfloat16, float16 or float32; auto of an adapter: as it was trained.
        device: auto, cpu, mps, cuda or cuda:N.
        revision: branch, tag or commit on the hub; main of an adapter: the commit it was trained on.

    Returns:
        transformers' own objects; the model is in evaluation mode, without gradients.

    Raises:
        MissingError: not there or not reachable.
        UsageError: no checkpoint that can be read, or an adapter of another base.
    """
    return open_model(ModelConfig(path=model, dtype=dtype, device=device, revision=revision))  # type: ignore[arg-type]


def open_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, of a model's settings."""
    if not is_adapter(config.path):
        return loading.load_model(config, keep_packed=True), loading.load_tokenizer(config)
    folder = Path(config.path)
    adapter = read_adapter_config(folder)
    named = adapter.base
    try:
        base, _ = base_of(adapter, replace(config, path=named))
        found = loading.load_model(base), loading.load_tokenizer(base)
    except MissingError as error:
        raise MissingError(
            f"The adapter in {folder} belongs on {named}, which is not there: {error.message}",
            "Run from the folder in which it was tuned, or take the merged model beside it.",
        ) from error
    load_adapter(found[0], folder).requires_grad_(False)
    return found[0].eval(), found[1]


def is_adapter(path: str) -> bool:
    """Whether a path is a folder with an adapter and no model."""
    folder = Path(path)
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def prompt_of(config: ModelConfig, tokenizer: Any, wanted: str | None = None) -> PromptFormat:
    """The prompt format of a model; an adapter says its own, or the tuned model that it lies in."""
    folder = Path(config.path)
    if is_adapter(config.path):
        trained = read_adapter_config(folder).prompt
        if trained is not None and wanted is None:
            return PromptFormat(trained, "which it was tuned with")
        folder = folder.resolve().parent
    return prompt_format(folder if folder.is_dir() else None, tokenizer, wanted)


def generate(
    model: str | Path, prompts: str | Sequence[str], *, template: str | None = None, raw: bool = False,
    max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, dtype: str = "auto",
    device: str = "auto", revision: str = "main", on_text: Callable[[str], None] | None = None,
) -> list[Generated]:  # fmt: skip
    """What a model answers to some prompts, each written into the prompt format that the model was tuned with.

    Args:
        model: as `load` takes it.
        prompts: one or several texts.
        template: alpaca, alpaca_short, vicuna or chat instead of the model's own.
        raw: continue the text as it is.
        temperature: 0 takes the likeliest token each time.
        on_text: is called with each piece of text as it comes.

    Raises:
        MissingError: the model is not there or not reachable.
        UsageError: a prompt that does not fit, or an impossible setting.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    config = ModelConfig(path=model, dtype=dtype, device=device, revision=revision)  # type: ignore[arg-type]
    network, tokenizer = open_model(config)
    form = prompt_of(config, tokenizer, wanted_format(template, raw))
    rows: list[Row] = [question(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
    return [generate_text(network, tokenizer, form, row, sampling, on_text) for row in rows]


def wanted_format(template: str | None, raw: bool) -> str | None:
    """The prompt format that is asked for; None for the model's own."""
    if raw and template is not None:
        raise UsageError(f"raw means no template, and {template} is one.", "Give one of the two.")
    return PLAIN if raw else template
