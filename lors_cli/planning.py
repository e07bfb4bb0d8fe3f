"""What a stage will need: parameters, peak memory and disk, estimated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lors_cli.errors import LorsError, MissingError, UsageError
from lors_cli.machine import processes
from lors_cli.machine.devices import free_memory
from lors_cli.output.console import gib
from lors_cli.pruning import estimate as pruning_estimate
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PruneConfig, TuneConfig

GIB = 1 << 30
RUNTIME = GIB // 2
"""Bytes that Python and the libraries take whatever the model."""
TASK_LENGTH = 512
"""Tokens that few documents of a zero-shot task exceed."""


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
    from lors_cli.sources import model_fingerprint

    fingerprint = model_fingerprint(config)
    if fingerprint not in _known_sizes:  # a .gguf takes seconds to read
        size = _measured(config)
        if size is None:
            return None
        _known_sizes[fingerprint] = size
    return _known_sizes[fingerprint]


_known_sizes: dict[str, ModelSize] = {}


def _measured(config: ModelConfig) -> ModelSize | None:
    settings = _local_settings(config)
    if settings is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    from lors_cli.model_files import load_error
    from lors_cli.models import decoder_blocks, model_max_length, quiet_libraries
    from lors_cli.sources import locate
    from lors_cli.weights import block_weights

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
    return ModelSize(
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
        bytes_a_weight=_bytes_a_weight(config, getattr(settings, "dtype", None)),
        streamed=locate(config.path).gguf_file is None,
    )


def _bytes_a_weight(config: ModelConfig, stored: Any) -> int:
    """Of the number format that `models.resolve_dtype` will choose."""
    import torch

    from lors_cli.machine.devices import cpu_has_bfloat16

    if config.dtype != "auto":
        return getattr(torch, config.dtype).itemsize
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    return 4 if stored == torch.float32 or (on_cpu and not cpu_has_bfloat16()) else 2


def _local_settings(config: ModelConfig) -> Any | None:
    from transformers import AutoConfig

    from lors_cli.model_files import loading
    from lors_cli.models import load_config
    from lors_cli.revisions import pinned_revision
    from lors_cli.shapes import shape_of_hub_id
    from lors_cli.sources import locate

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


HEAD_CHUNKS = 512 << 20
"""The head's logits and their gradient, a chunk of tokens at a time, at most."""


@dataclass(frozen=True)
class Estimate:
    """Bytes a stage needs: peak memory while it runs, and disk (with its resumable state)."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {gib(self.memory)} of memory, {gib(self.disk)} of disk"


def estimate(config: PruneConfig | TuneConfig | EvalConfig, size: ModelSize) -> Estimate:
    """A stage's needs, good to about a fifth: libraries, weights, activations, statistics, optimiser state.

    Args:
        config: the stage's settings.
        size: of the model it loads.
    """
    if isinstance(config, PruneConfig):
        parts = pruning_estimate.memory_parts(config, size)
        return _with_runtime(Estimate(sum(parts.values()), pruning_estimate.disk(config, size)))
    if isinstance(config, TuneConfig):
        return _with_runtime(_estimate_tune(config, size))
    tokens = config.batch_size * min(TASK_LENGTH, size.max_length)
    logits = tokens * size.vocab_size * (4 + size.bytes_a_weight)
    return _with_runtime(Estimate(size.num_bytes + logits, 64 << 20))


def _with_runtime(needs: Estimate) -> Estimate:
    return Estimate(needs.memory + RUNTIME, needs.disk)


def _estimate_tune(config: TuneConfig, size: ModelSize) -> Estimate:
    adapters = sum(config.rank * (rows + columns) for rows, columns in size.linears)
    tokens = config.micro_batch_size * config.data.max_length
    block = tokens * (12 * size.hidden_size + 4 * size.intermediate_size) * size.bytes_a_weight
    kept = size.num_blocks * tokens * size.hidden_size * size.bytes_a_weight + block
    activations = kept if config.gradient_checkpointing else size.num_blocks * block
    logits = min(tokens * size.vocab_size * (size.bytes_a_weight + 8), HEAD_CHUNKS)
    width = {"sqft": size.bytes_a_weight + 1, "spp": 2 * size.bytes_a_weight, "hira": size.bytes_a_weight}
    merged = size.num_prunable * width.get(config.method, 0)  # what a method keeps of every weight for backward
    if config.gradient_checkpointing:
        merged //= size.num_blocks
    if config.method == "lors" and config.merged_cache == "on":
        merged = size.num_prunable * size.bytes_a_weight
    gradient = {"gradient": 12 * adapters, "gradient-exact": size.num_prunable // 8 * 4}.get(config.start, 0)
    training = 16 * adapters + merged
    if config.base == "compressed":  # once the start is computed, on the plain weights
        training -= size.num_prunable * size.bytes_a_weight // 2 - size.num_prunable // 8
    teacher = size.num_bytes if config.distill else 0
    memory = size.num_bytes + teacher + activations + logits + max(training, gradient)
    return Estimate(memory, size.num_bytes + (config.keep_checkpoints + 1) * 12 * adapters + (16 << 20))


def try_estimate(config: Any, model: ModelConfig) -> tuple[Estimate | None, str]:
    """An estimate where the model's shape is known, else why not.

    Args:
        config: the stage's settings.
        model: the model it loads.
    """
    try:
        size = model_size(model)
    except LorsError as error:
        return None, error.message
    if size is None:
        return None, "size unknown until the model's config.json is downloaded"
    return estimate(config, size), ""


def shortage(config: Any, model: ModelConfig) -> tuple[str, str] | None:
    """Why a stage cannot run in the memory that is free here, and what would fit; None if it can, or is not known.

    Args:
        config: the stage's settings; only pruning's needs are known well enough to refuse.
        model: the model it loads.
    """
    if not isinstance(config, PruneConfig):
        return None
    size = try_size(model)
    if size is None:
        return None
    free = free_memory(model.device)
    parts = pruning_estimate.memory_parts(config, size, processes.num_processes())
    offload, hidden = config.calibration.offload, parts["hidden_states"]
    if (offload == "cpu" and model.device.startswith("cuda")) or (offload == "auto" and hidden > free / 2):
        parts["hidden_states"] = 0  # they will be kept elsewhere
    needed = RUNTIME + sum(parts.values())
    if needed <= free:
        return None
    largest = ", ".join(
        f"{name.replace('_', ' ')} {gib(parts[name])}"
        for name in sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    )
    fits = [words for words, other in pruning_estimate.smaller(config) if estimate(other, size).memory <= free]
    hint = f"This would fit: {fits[0]}" if fits else "Nothing that keeps the result would fit: use a larger machine."
    return f"prune needs about {gib(needed)} of memory, {gib(free)} are free ({largest}).", hint


def try_size(model: ModelConfig) -> ModelSize | None:
    """The model's sizes where they are known."""
    try:
        return model_size(model)
    except LorsError:
        return None
