"""A model's sizes, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lors_cli.errors import LorsError, MissingError, UsageError
from lors_cli.files.remembered import Remembered
from lors_cli.models.skip import skipped
from lors_cli.recipe.schema import ModelConfig

_sizes = Remembered("sizes", "sizes of models")  # making a model only to measure it takes most of a dry run
_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")
"""The start of a layer's name that names its block."""
MEMORY_VERSION = 4
"""Raised when the same configuration gives other sizes."""
EXPERTS_TAKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
"""What configurations call the number of experts that a token goes through."""
_known_sizes: dict[str, ModelSize | None] = {}
"""By fingerprint."""


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes."""

    num_parameters: int
    layers: tuple[tuple[str, int, int, bool], ...]
    """Full name, out_features and in_features of each linear in the decoder blocks, and whether it is one of several
    experts in one tensor."""
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    vocab_size: int
    max_length: int
    bytes_a_weight: int
    streamed: bool = True
    """Whether blocks can be read one at a time."""
    has_linears: bool = True
    """Whether there are plain linears in the blocks, which alone can be tuned and packed."""
    num_streams: int = 1
    """Hidden states of a token between blocks."""
    expert_share: float = 1.0
    """Share of a block's experts that a token goes through."""

    @cached_property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of each linear in the decoder blocks."""
        return tuple((rows, columns) for _, rows, columns, _ in self.layers)

    @cached_property
    def block(self) -> tuple[tuple[int, int, bool], ...]:
        """Those of the largest block, and whether each is one of several experts."""
        blocks: dict[str, list[tuple[int, int, bool]]] = {}
        for name, rows, columns, expert in self.layers:
            blocks.setdefault(_BLOCK.match(name)[0], []).append((rows, columns, expert))  # type: ignore[index]
        return tuple(max(blocks.values(), key=lambda block: sum(rows * columns for rows, columns, _ in block)))

    def without(self, globs: Sequence[str]) -> ModelSize:
        """The same with the layers that a stage works on alone.

        Raises:
            UsageError: a glob matches none, or all are matched.
        """
        out = set(skipped(globs, [layer[0] for layer in self.layers])) if globs else ()
        return replace(self, layers=tuple(layer for layer in self.layers if layer[0] not in out)) if out else self

    @property
    def plain(self) -> ModelSize:
        """The same without experts in one tensor, which get no adapter and are not packed."""
        return replace(self, layers=tuple(layer for layer in self.layers if not layer[3]))

    @property
    def num_prunable(self) -> int:
        """Weights of the linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def num_active(self) -> float:
        """Of these, as many as a token goes through."""
        return sum(rows * columns * (self.expert_share if expert else 1) for _, rows, columns, expert in self.layers)

    @property
    def num_bytes(self) -> int:
        """The weights' bytes."""
        return self.num_parameters * self.bytes_a_weight


def model_size(config: ModelConfig) -> ModelSize | None:
    """The model's sizes, without its weights and without a network; None when its shape is not known here.

    It is known of a local model, and of a hub id that is cached or in the table of shapes.
    """
    from lors_cli.models.sources import model_fingerprint

    fingerprint = model_fingerprint(config)
    if _known_sizes.get(fingerprint) is None:  # a .gguf takes seconds to read
        _known_sizes[fingerprint] = _remembered(fingerprint, config) or _measured(config, fingerprint)
    return _known_sizes[fingerprint]


def _key(fingerprint: str) -> str:
    """A model's among the sizes that are remembered."""
    from importlib.metadata import version

    return f"{MEMORY_VERSION}|{version('transformers')}|{fingerprint}"


def _remembered(fingerprint: str, config: ModelConfig) -> ModelSize | None:
    try:
        known = dict(_sizes.get(_key(fingerprint)))
        layers = tuple((name, rows, columns, expert) for name, rows, columns, expert in known["layers"])
        bytes_a_weight = _bytes_a_weight(config, known.pop("stored"))
        return ModelSize(**{**known, "layers": layers, "bytes_a_weight": bytes_a_weight})
    except (KeyError, TypeError, ValueError):  # not there, or of another version
        return None


def _remember(fingerprint: str, size: ModelSize, stored: str) -> None:
    if fingerprint.startswith("hub:"):  # whose configuration may not be the one that is in the cache tomorrow
        return
    _sizes.keep(_key(fingerprint), {**asdict(size), "stored": stored})


def _measured(config: ModelConfig, fingerprint: str) -> ModelSize | None:
    settings = _local_settings(config)
    if settings is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    from lors_cli.models.blocks import model_max_length, prunable_weights
    from lors_cli.models.checks import load_error
    from lors_cli.models.quantised import Quantised
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
    weights = prunable_weights(model)
    layers = tuple((name, *weight.shape, weight.expert is not None) for name, weight in weights.items())
    if not layers:
        raise UsageError(f"{config.path}: its decoder blocks hold no linear that could be pruned.")
    text = settings.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = 1 + max(weight.expert or 0 for weight in weights.values())
    taken = next((number for key in EXPERTS_TAKEN if (number := getattr(text, key, None))), experts)
    stored = str(getattr(settings, "dtype", None)).removeprefix("torch.")
    size = ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
        hidden_size=text.hidden_size,
        intermediate_size=max(inner) if isinstance(inner, list) else inner,  # Gemma 3n has one for each block
        num_blocks=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        max_length=model_max_length(settings),
        bytes_a_weight=_bytes_a_weight(config, stored),
        has_linears=any(weight.is_linear for weight in weights.values()),
        num_streams=getattr(text, "altup_num_inputs", 1),  # Gemma 3n
        expert_share=taken / experts if experts > 1 else 1.0,
        streamed=locate(config.path).gguf_file is None and Quantised.of(settings) is None,
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
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    from lors_cli.files.revisions import pinned_revision
    from lors_cli.models.checks import loading
    from lors_cli.models.loading import add_dtype, load_config
    from lors_cli.models.shapes import SHAPES
    from lors_cli.models.sources import locate

    repo = locate(config.path).repo
    if repo is None:
        return load_config(config)
    try:
        with loading(config.path, "its configuration"):
            revision = pinned_revision(repo, config.revision)
            settings = AutoConfig.from_pretrained(repo, revision=revision, local_files_only=True,
                                                  trust_remote_code=False)  # fmt: skip
            cached = try_to_load_from_cache(repo, "config.json", revision=revision)
            if isinstance(cached, str):
                add_dtype(settings, Path(cached).parent)
            return settings
    except MissingError:
        return next((shape.config() for shape in SHAPES.values() if repo in shape.hub_ids), None)


def try_size(model: ModelConfig) -> ModelSize | None:
    """The model's sizes where they are known."""
    try:
        return model_size(model)
    except LorsError:
        return None


def forward(size: ModelSize, tokens: float, length: float, *, head: bool = True) -> float:
    """Operations of a forward pass over `tokens` in all, of which `length` see each other; `head`: with logits."""
    linears = size.num_active + (size.hidden_size * size.vocab_size if head else 0)
    attention = 2 * size.num_blocks * size.hidden_size * length  # scores and values, half of them masked
    return tokens * (2.0 * linears + attention)
