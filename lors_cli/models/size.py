"""A model's sizes, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lors_cli.errors import LorsError, MissingError, UsageError
from lors_cli.files import atomic
from lors_cli.files.hashes import user_cache
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig

MEMORY_VERSION = 1
"""Raised when the same configuration gives other sizes."""


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes.

    Args:
        num_parameters: in all.
        num_prunable: weights of the linears in decoder blocks.
        largest_input: widest input of these linears.
        linears: (out_features, in_features) of each.
        block: the largest block's: (out_features, in_features, whether it is one of several experts).
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_blocks: decoder blocks.
        vocab_size: tokens.
        max_length: longest sequence.
        bytes_a_weight: of the number format.
        streamed: whether blocks can be read one at a time.
    """

    num_parameters: int
    num_prunable: int
    largest_input: int
    linears: tuple[tuple[int, int], ...]
    block: tuple[tuple[int, int, bool], ...]
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    vocab_size: int
    max_length: int
    bytes_a_weight: int
    streamed: bool = True

    @property
    def num_bytes(self) -> int:
        """The weights' bytes."""
        return self.num_parameters * self.bytes_a_weight


def model_size(config: ModelConfig) -> ModelSize | None:
    """The model's sizes, without its weights and without a network; None when its shape is not known here.

    Args:
        config: a local model, or a hub id that is cached or in the table of shapes.
    """
    from lors_cli.models.sources import model_fingerprint

    fingerprint = model_fingerprint(config)
    if fingerprint not in _known_sizes:  # a .gguf takes seconds to read
        size = _remembered(fingerprint, config) or _measured(config, fingerprint)
        if size is None:
            return None
        _known_sizes[fingerprint] = size
    return _known_sizes[fingerprint]


_known_sizes: dict[str, ModelSize] = {}


def _memory(fingerprint: str) -> tuple[Path, str]:
    """The user's file of sizes, and a model's key in it; making a model only to measure it takes most of a dry run."""
    from importlib.metadata import version

    return user_cache("sizes.json"), f"{MEMORY_VERSION}|{version('transformers')}|{fingerprint}"


def _remembered(fingerprint: str, config: ModelConfig) -> ModelSize | None:
    path, key = _memory(fingerprint)
    known = _read(path).get(key)
    if not isinstance(known, dict):
        return None
    linears = tuple((rows, columns) for rows, columns in known["linears"])
    block = tuple((rows, columns, expert) for rows, columns, expert in known["block"])
    stored = known.pop("stored")
    return ModelSize(**{**known, "linears": linears, "block": block, "bytes_a_weight": _bytes_a_weight(config, stored)})


def _remember(fingerprint: str, size: ModelSize, stored: str) -> None:
    path, key = _memory(fingerprint)
    try:
        atomic.write_json(path, {**dict(list(_read(path).items())[-100:]), key: {**asdict(size), "stored": stored}})
    except OSError as error:
        console.detail(f"sizes of models are not remembered: {error}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: Any = atomic.read_json(path)
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _measured(config: ModelConfig, fingerprint: str) -> ModelSize | None:
    settings = _local_settings(config)
    if settings is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    from lors_cli.models.blocks import block_weights, decoder_blocks, model_max_length
    from lors_cli.models.checks import load_error
    from lors_cli.models.quiet import quiet_libraries
    from lors_cli.models.sources import locate

    try:
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except ValueError as error:
        kind = getattr(settings, "model_type", "unknown")
        if "Unrecognized configuration class" not in str(error):
            raise load_error(config.path, "its configuration", error) from error
        raise UsageError(f"{config.path} is a {kind} model, not a decoder-only causal language model.") from error
    except Exception as error:  # sizes that no model can have
        raise load_error(config.path, "its configuration", error) from error
    prefix, modules = decoder_blocks(model)
    blocks = [[(*weight.shape, weight.expert is not None) for weight in block_weights(block, prefix).values()]
              for block in modules]  # fmt: skip
    linears = tuple((rows, columns) for block in blocks for rows, columns, _ in block)
    if not linears:
        raise UsageError(f"{config.path}: its decoder blocks hold no linear that could be pruned.")
    text = settings.get_text_config()
    stored = str(getattr(settings, "dtype", None)).removeprefix("torch.")
    size = ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_prunable=sum(rows * columns for rows, columns in linears),
        largest_input=max(columns for _, columns in linears),
        linears=linears,
        block=tuple(max(blocks, key=lambda block: sum(rows * columns for rows, columns, _ in block))),
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_blocks=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        max_length=model_max_length(settings),
        bytes_a_weight=_bytes_a_weight(config, stored),
        streamed=locate(config.path).gguf_file is None,
    )
    _remember(fingerprint, size, stored)
    return size


def _bytes_a_weight(config: ModelConfig, stored: str) -> int:
    """Of the number format that `models.resolve_dtype` will choose; `stored`: float32 and the like."""
    import torch

    from lors_cli.machine.devices import cpu_has_bfloat16

    if config.dtype != "auto":
        return getattr(torch, config.dtype).itemsize
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    return 4 if stored == "float32" or (on_cpu and not cpu_has_bfloat16()) else 2


def _local_settings(config: ModelConfig) -> Any | None:
    from transformers import AutoConfig

    from lors_cli.models.checks import loading
    from lors_cli.models.loading import load_config
    from lors_cli.models.revisions import pinned_revision
    from lors_cli.models.shapes import shape_of_hub_id
    from lors_cli.models.sources import locate

    repo = locate(config.path).repo
    if repo is None:
        return load_config(config)
    try:
        with loading(config.path, "its configuration"):
            revision = pinned_revision(repo, config.revision)
            return AutoConfig.from_pretrained(repo, revision=revision, local_files_only=True, trust_remote_code=False)
    except MissingError:
        shape = shape_of_hub_id(repo)
        return shape.config() if shape else None


def try_size(model: ModelConfig) -> ModelSize | None:
    """The model's sizes where they are known."""
    try:
        return model_size(model)
    except LorsError:
        return None


def forward(size: ModelSize, tokens: float, length: float, *, head: bool = True) -> float:
    """Operations of a forward pass over `tokens` in all, of which `length` see each other; `head`: with logits."""
    linears = size.num_prunable + (size.hidden_size * size.vocab_size if head else 0)
    attention = 2 * size.num_blocks * size.hidden_size * length  # scores and values, half of them masked
    return tokens * (2.0 * linears + attention)
