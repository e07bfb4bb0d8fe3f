"""What tuning is told of its data: the part of a fingerprint, the prompt that was learnt, samples and their numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.output import console, progress
from lors_cli.output.console import counted
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig
from lors_cli.recipe.tuning import data_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lors_cli.data.samples import TuneData
    from lors_cli.data.sources import TextSource


@dataclass(frozen=True)
class ReadData:
    """What is read: fingerprints, and whether instructions are among it."""

    inputs: dict[str, Any]
    has_instructions: bool


def data_identity(config: TuneConfig, data_dir: Path | None) -> tuple[dict[str, Any], ReadData]:
    """The settings of `data` that make a result what it is, and what is read."""
    from lors_cli.data.sources import tuning_source

    parts = [(weight, data, tuning_source(data, data_dir)) for weight, data in config.data.parts]
    found = [_identity(config, data, source) for _, data, source in parts]
    settings = found[0]
    inputs: dict[str, Any] = {"data": parts[0][2].fingerprint}
    if config.data.mix:
        settings["mix"] = [{"weight": weight, **each} for (weight, *_), each in zip(parts[1:], found[1:], strict=True)]
        inputs["mix"] = [source.fingerprint for _, _, source in parts[1:]]
    return settings, ReadData(inputs, any(source.kind == "instructions" for *_, source in parts))


def _identity(config: TuneConfig, data: TuneDataConfig, source: TextSource) -> dict[str, Any]:
    from lors_cli.data.stream.samples import is_streamed
    from lors_cli.data.tokens import usual_packing

    settings = asdict(data)
    for key in ("dataset", "split", "columns"):  # in the data's fingerprint
        del settings[key]
    del settings["mix"]
    if data.packing == usual_packing(source):
        settings["packing"] = None
    settings["stream"] = is_streamed(replace(config, data=data), source)
    if not settings["stream"]:
        del settings["shuffle_buffer"]
    return settings


def as_read(config: TuneConfig, data_dir: Path | None) -> tuple[TuneConfig, str | None]:
    """The config with how texts shared a sample said, and instructions' prompt: of several the one with most weight."""
    from lors_cli.data.sources import tuning_source
    from lors_cli.data.tokens import usual_packing

    sources = [tuning_source(data, data_dir) for _, data in config.data.parts]
    packing = [data.packing or usual_packing(source)
               for (_, data), source in zip(config.data.parts, sources, strict=True)]  # fmt: skip
    prompts = [(weight, data.template) for (weight, data), source in zip(config.data.parts, sources, strict=True)
               if source.kind == "instructions"]  # fmt: skip
    mix = tuple(replace(part, packing=each) for part, each in zip(config.data.mix, packing[1:], strict=True))
    template = max(prompts, key=lambda prompt: prompt[0])[1] if prompts else None
    return replace(config, data=replace(config.data, packing=packing[0], mix=mix)), template


def load_data(config: TuneConfig, network: PreTrainedModel, tokenizer: Any, data_dir: Path | None) -> TuneData:
    """The samples, and what a user is told of them."""
    from lors_cli.data.tokens import tuning_data
    from lors_cli.files.hashes import plain
    from lors_cli.models.blocks import model_max_length
    from lors_cli.tuning.training.isolation import refuse_mixing
    from lors_cli.tuning.training.sharding import is_sharded

    if config.data.is_isolated and not is_sharded(config):  # else once it has its weights
        refuse_mixing(network)
    name = data_name(plain(config.data))
    with progress.busy(f"tokenising {name}"):
        data = tuning_data(config, tokenizer, model_max_length=model_max_length(network), data_dir=data_dir)
    skipped = ", ".join(f"{count} {reason}" for reason, count in data.skipped.items() if count)
    steps = ""
    if data.num_steps is not None:
        in_last = len(data.samples) - (data.num_steps - 1) * config.batch_size
        steps = f" in {counted(data.num_steps, 'step')}"
        steps += f", {in_last} in the last" if in_last < config.batch_size else ""
    samples = counted(len(data.samples), "sample") + (f" and {len(data.held_out)} held out" if data.held_out else "")
    skips = f" (skipped: {skipped})" if skipped else ""
    console.info(f"  data: {name}, {samples}, {data.num_tokens} tokens{steps}{skips}")
    for part in data.origin.get("mix", ()):
        passes = f", {part['passes']:.3g} times over" if "passes" in part else ""
        console.info(f"    {part['dataset']}: {counted(part['num_samples'], 'sample')}{passes}")
    return data


def data_metrics(data: TuneData) -> dict[str, Any]:
    """The numbers of the data for the stage's record."""
    tokens = "tokens_an_epoch" if data.num_steps is None else "tokens"
    held_out = {"val_samples": len(data.held_out)} if data.held_out else {}
    return {"num_samples": len(data.samples), "skipped": dict(data.skipped), tokens: data.num_tokens, **held_out,
            "data": dict(data.origin)}  # fmt: skip
