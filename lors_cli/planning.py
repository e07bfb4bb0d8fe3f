"""What a stage will need: parameters, peak memory and disk, estimated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lors_cli.console import gib
from lors_cli.errors import LorsError, UsageError
from lors_cli.recipe import EvalConfig, ModelConfig, PruneConfig, TuneConfig

DEFAULT_LENGTH = 2048
RUNTIME = 512 << 20
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
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_blocks: decoder blocks.
        vocab_size: tokens.
        max_length: longest sequence.
        bytes_a_weight: of the number format.
    """

    num_parameters: int
    num_prunable: int
    largest_input: int
    linears: tuple[tuple[int, int], ...]
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    vocab_size: int
    max_length: int
    bytes_a_weight: int

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

    from lors_cli.models import model_max_length, prunable_linears, quiet_libraries

    try:
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except (ValueError, KeyError) as error:
        kind = getattr(settings, "model_type", "unknown")
        raise UsageError(f"{config.path} is a {kind} model, not a decoder-only causal language model.") from error
    linears = tuple((linear.out_features, linear.in_features) for linear in prunable_linears(model).values())
    if not linears:
        raise UsageError(f"{config.path}: its decoder blocks hold no linear that could be pruned.")
    text = settings.get_text_config()
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_prunable=sum(rows * columns for rows, columns in linears),
        largest_input=max(columns for _, columns in linears),
        linears=linears,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_blocks=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        max_length=model_max_length(settings),
        bytes_a_weight=_bytes_a_weight(config, getattr(settings, "dtype", None)),
    )


def _bytes_a_weight(config: ModelConfig, stored: Any) -> int:
    """Of the number format that `models.resolve_dtype` will choose."""
    import torch

    from lors_cli.models import cpu_has_bfloat16

    if config.dtype != "auto":
        return getattr(torch, config.dtype).itemsize
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    return 4 if stored == torch.float32 or (on_cpu and not cpu_has_bfloat16()) else 2


def _local_settings(config: ModelConfig) -> Any | None:
    from transformers import AutoConfig

    from lors_cli.models import load_config
    from lors_cli.shapes import shape_of_hub_id
    from lors_cli.sources import locate

    repo = locate(config.path).repo
    if repo is None:
        return load_config(config)
    try:
        return AutoConfig.from_pretrained(repo, revision=config.revision, local_files_only=True)
    except OSError:
        shape = shape_of_hub_id(repo)
        return shape.config() if shape else None


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
        return _with_runtime(_estimate_prune(config, size))
    if isinstance(config, TuneConfig):
        return _with_runtime(_estimate_tune(config, size))
    tokens = config.batch_size * min(TASK_LENGTH, size.max_length)
    logits = tokens * size.vocab_size * (4 + size.bytes_a_weight)
    return _with_runtime(Estimate(size.num_bytes + logits, 64 << 20))


def _with_runtime(needs: Estimate) -> Estimate:
    return Estimate(needs.memory + RUNTIME, needs.disk)


def _estimate_prune(config: PruneConfig, size: ModelSize) -> Estimate:
    if config.method == "magnitude" and not config.refit:
        return Estimate(int(1.2 * size.num_bytes), size.num_bytes + (16 << 20))
    calibration = config.calibration
    length = calibration.sequence_length or min(DEFAULT_LENGTH, size.max_length)
    tokens = (calibration.num_samples or 128) * length
    hidden = tokens * size.hidden_size * size.bytes_a_weight
    in_flight = calibration.batch_size * length
    block = in_flight * (6 * size.hidden_size + 4 * size.intermediate_size) * (size.bytes_a_weight + 4)
    solver = 0
    if config.refit or config.method in ("sparsegpt", "admm"):
        widest = max(rows for rows, columns in size.linears if columns == size.largest_input)
        solver = 4 * (5 * size.largest_input**2 + 3 * widest * size.largest_input)
    memory = size.num_bytes + hidden + block + solver
    return Estimate(memory, 2 * size.num_bytes + 2 * hidden + (16 << 20))


def _estimate_tune(config: TuneConfig, size: ModelSize) -> Estimate:
    adapters = sum(config.rank * (rows + columns) for rows, columns in size.linears)
    tokens = config.micro_batch_size * config.data.max_length
    block = tokens * (12 * size.hidden_size + 4 * size.intermediate_size) * size.bytes_a_weight
    kept = size.num_blocks * tokens * size.hidden_size * size.bytes_a_weight + block
    activations = kept if config.gradient_checkpointing else size.num_blocks * block
    logits = tokens * size.vocab_size * (size.bytes_a_weight + 8)
    gradient = size.num_prunable // 8 * 4 if config.init == "gradient" else 0
    memory = size.num_bytes + 16 * adapters + max(activations + logits, gradient + activations + logits)
    return Estimate(memory, size.num_bytes + 3 * 12 * adapters + (16 << 20))


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
