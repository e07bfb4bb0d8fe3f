"""What tuning will need: memory, disk and operations, by arithmetic."""

from __future__ import annotations

from pathlib import Path

from lors_cli.data.samples import rounded_up
from lors_cli.models.needs import RECORDS, RUNTIME, Estimate
from lors_cli.models.size import ModelSize, forward, try_size
from lors_cli.output.console import gib
from lors_cli.recipe.schema import DistillConfig, ModelConfig, TeacherCacheConfig, TuneConfig, TuneDataConfig

HEAD_CHUNKS = 512 << 20
"""The head's logits and their gradient, a chunk of tokens at a time, at most."""
ALPACA_ROWS, ALPACA_TOKENS = 52_002, 105
PRODUCTS = {"lors": 4, "lora": 4, "sqft": 6, "sqft-gc": 6, "hira": 6, "hira-gc": 6, "spp": 10, "spp-gc": 10}
"""Operations a token and weight of a training step: 2 forward, 2 for the inputs' gradient, and what a method adds.

Checkpointing within a layer adds none: torch stops computing again where all that backward needs is there."""
MERGES = {"lors": 2, "sqft": 2, "sqft-gc": 3, "hira": 2, "hira-gc": 4}
"""Products lora_B·lora_A a micro-batch."""
EXACT = {"approximate": 0.0, "exact": 1.0, "rotating": 0.25}
"""Share of the layers whose gradients have lors's mask in them: two operations more, and the tiles' two products."""


def needs(config: TuneConfig, size: ModelSize, num_processes: int = 1) -> Estimate:
    """Of each process: libraries, weights, activations, the head's logits, adapters with their optimiser state."""
    adapted = size.without(config.skip).plain
    adapters = sum(config.rank * (rows + columns) for rows, columns in adapted.linears)
    state = 2 if config.optim == "adamw_8bit" else 8
    tokens = config.micro_batch_size * config.data.max_length
    block = tokens * (12 * size.hidden_size + 4 * size.intermediate_size) * size.bytes_a_weight
    kept = size.num_blocks * tokens * size.hidden_size * size.bytes_a_weight + block
    activations = kept if config.gradient_checkpointing else size.num_blocks * block
    logits = min(tokens * size.vocab_size * (size.bytes_a_weight + 8), HEAD_CHUNKS)
    width = {"sqft": size.bytes_a_weight + 1, "spp": 2 * size.bytes_a_weight, "hira": size.bytes_a_weight}
    merged = adapted.num_prunable * width.get(config.method, 0)  # what a method keeps of every weight for backward
    if config.gradient_checkpointing:
        merged //= size.num_blocks
    if config.method == "lors" and config.merged_cache == "on":
        merged = adapted.num_prunable * size.bytes_a_weight
    gradient = {"gradient": 12 * adapters, "gradient-exact": adapted.num_prunable // 8 * 4}.get(config.start, 0)
    training = (8 + state) * adapters + merged
    if config.base == "packed":  # once the start is computed, on the plain weights
        training -= adapted.num_prunable * size.bytes_a_weight // 2 - adapted.num_prunable // 8
    needed = activations + logits + max(training, gradient)
    if config.distill:  # with a cache it is there before the training, and one sample is looked at a time
        teacher = _teacher(config.distill, size).num_parameters * size.bytes_a_weight
        needed = max(needed, teacher + logits) if config.distill.cache else needed + teacher
    weights = size.num_bytes
    if config.parallelism == "fsdp":  # a shard of all blocks, and two of them while they are used
        blocks = size.num_prunable * size.bytes_a_weight
        weights += min(0, blocks // num_processes + 2 * blocks // size.num_blocks - blocks)
    memory = RUNTIME + weights + needed
    checkpoints = config.keep_checkpoints + 1 + config.loads_best
    return Estimate(memory, size.num_bytes + checkpoints * (4 + state) * adapters + RECORDS)


def operations(config: TuneConfig, size: ModelSize, data_dir: Path | None) -> float | None:
    """Floating-point operations, None where the number of samples is not known."""
    length = round(sum(share * _length(data) for share, data in config.data.parts))
    if config.max_tokens:
        samples: float | None = config.max_tokens / length
    else:
        samples = config.max_steps * config.batch_size if config.max_steps else _samples(config, data_dir)
    if samples is None:
        return None
    tokens = float(samples * length)
    passes = 3 + (1 if config.gradient_checkpointing else 0)
    rest = forward(size, tokens, length) - 2 * tokens * size.num_active  # attention and head
    adapted = size.without(config.skip).plain.num_active
    again = 2 if config.gradient_checkpointing else 0
    exact = 2 * EXACT[config.gradient]
    own = PRODUCTS[config.method] + exact
    products = own * adapted + 4 * (size.num_active - adapted) + again * size.num_active
    merges = 2 * config.rank * adapted * (MERGES.get(config.method, 0) + exact) * samples / config.micro_batch_size
    start = 0.0 if config.start == "kaiming" else 3 * forward(size, config.init_samples * length, length)
    teacher = forward(_teacher(config.distill, size), tokens, length) if config.distill else 0.0
    return products * tokens + passes * rest + merges + start + teacher


def id_bytes(vocab_size: int) -> int:
    """Bytes of a token on disk."""
    return 2 if vocab_size <= 1 << 16 else 4


def bytes_a_label(config: TeacherCacheConfig, vocab_size: int) -> int:
    """What a label takes in a teacher's cache: a token and a number for each that is kept, and one for the rest."""
    return config.top_k * (id_bytes(vocab_size) + {"float16": 2, "float32": 4}[config.dtype]) + 4


def teacher_cache(config: TuneConfig, vocab_size: int) -> str:
    """What the teacher's predictions will take on disk, in words."""
    from lors_cli.data.stream.cache import cache_dir

    if config.distill is None or config.distill.cache is None:
        return ""
    each = bytes_a_label(config.distill.cache, vocab_size)
    words = f"teacher's cache: {each:,} bytes a label"
    tokens = config.max_tokens or (config.max_steps or 0) * config.batch_size * config.data.max_length
    return f"{words}, at most {gib(tokens * each)} in {cache_dir()}" if tokens else f"{words}, in {cache_dir()}"


def _teacher(config: DistillConfig, size: ModelSize) -> ModelSize:
    """A teacher's sizes; where they are not known the model's own, which by default was pruned from it."""
    known = try_size(ModelConfig(path=config.teacher, revision=config.revision)) if config.teacher else None
    return known or size


def _length(data: TuneDataConfig) -> int:
    """Tokens of a sample."""
    return min(data.max_length, ALPACA_TOKENS) if data.dataset == "alpaca" else data.max_length


def _samples(config: TuneConfig, data_dir: Path | None) -> int | None:
    """Samples of all epochs, None where counting them would need the hub."""
    from lors_cli.data.sources import tuning_source

    rows = config.data.num_samples
    if rows is None:
        source = tuning_source(config.data, data_dir)
        if source.fingerprint.startswith("hub:"):
            rows = ALPACA_ROWS if config.data.dataset == "alpaca" else None
        elif source.kind == "instructions":
            rows = sum(1 for _ in source.rows())
    return None if rows is None else rounded_up(config.epochs, rows)
