"""What comes before the first step of tuning: the adapters' start, how merged weights are kept, the loss."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lors_cli.data.samples import PadCollator, Sample, TuneData
from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.machine.devices import set_seed
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.output import console
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig
from lors_cli.tuning.attach import adapter_layers, put_adapters
from lors_cli.tuning.head import Loss, causal_lm_loss, model_loss, why_not_chunked
from lors_cli.tuning.initialization import gradient_directions
from lors_cli.tuning.kernels.cache import cache_policy
from lors_cli.tuning.kernels.masked_merge import codes_on_cuda, how_merged
from lors_cli.tuning.lors import keep_merged
from lors_cli.tuning.teacher import cached_teacher, load_teacher
from lors_cli.tuning.training import fixed_batch
from lors_cli.tuning.training.checkpoints import latest_checkpoint
from lors_cli.tuning.training.isolation import refuse_mixing
from lors_cli.tuning.training.sampling import step_samples
from lors_cli.tuning.training.sharding import shard
from lors_cli.tuning.training.trainer import AdapterTrainer, num_steps


def prepare_trainer(
    config: TuneConfig, network: PreTrainedModel, layers: list[str], data: TuneData, tokenizer: Any, checkpoints: Path,
    fingerprint: str, *, device: torch.device, grids: Mapping[str, Grid], source: BlockwiseModel | None = None,
) -> AdapterTrainer:  # fmt: skip
    """Adapters on the model, changed in place and started as the config says, and a trainer around it.

    Args:
        layers: full names of the linears to adapt.
        checkpoints: folder for training checkpoints; where there is one to resume from, the start is not computed.
        fingerprint: of the stage.
        device: of this process; a model that is to be sharded is not on it yet.
        grids: of the sparse weights, where they lie on such.
        source: what a model that is to be sharded is read from.

    Raises:
        UsageError: the model would mix texts that are to be isolated, leaves what it has to lie on, or cannot
            checkpoint its blocks.
    """
    if config.gradient_checkpointing and not network.supports_gradient_checkpointing:
        raise UsageError(f"gradient_checkpointing: {type(network).__name__} has none in transformers.",
                         "Leave it out; a smaller per_device_batch_size needs less memory too.")  # fmt: skip
    _say_idle(config, network.dtype, data)
    collator = PadCollator(tokenizer.pad_token_id)
    adapted = None
    if source is not None:  # the start is computed past the adapters
        adapted = put_adapters(config, network, layers, grids)
        shard(network, source, device, grids if config.quantization_aware else {})
        if config.data.is_isolated:
            refuse_mixing(network)
    loss = _loss(config, network, data, collator(data.samples[:1]))
    if config.gradient_checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    resumes = processes.from_main(lambda: latest_checkpoint(checkpoints, fingerprint) is not None)
    start = {} if resumes or config.start == "kaiming" else _start(config, network, layers, data, collator, loss)
    adapted = adapted or put_adapters(config, network, layers, grids)
    gc.collect()
    torch.cuda.empty_cache()  # what the start took, and what is free is asked for next
    if config.method == "lors":
        _keep_merged(network, config, sharded=source is not None)
    with torch.no_grad():
        for name, directions in start.items():
            adapted[name].lora_A.copy_(directions)
    network.zero_grad()
    set_seed(config.seed)  # dropout is the same after any start
    return AdapterTrainer(config, network, data.samples, collator, loss, checkpoints, fingerprint, data.held_out)


def _start(
    config: TuneConfig, network: PreTrainedModel, layers: list[str], data: TuneData, collator: PadCollator, loss: Loss
) -> dict[str, torch.Tensor]:
    """The rows of lora_A by layer; each process computes them for itself."""
    linears: Any = {name: network.get_submodule(name) for name in layers}
    chosen = data.first_drawn(config.init_samples, config.seed)
    size = config.micro_batch_size
    batches = [collator([data.samples[index] for index in chosen[first : first + size]])
               for first in range(0, len(chosen), size)]  # fmt: skip
    return gradient_directions(network, linears, batches, config.rank, seed=config.seed,
                               exact=config.start == "gradient-exact", loss=loss)  # fmt: skip


def _loss(config: TuneConfig, network: PreTrainedModel, data: TuneData, batch: dict[str, torch.Tensor]) -> Loss:
    """The loss with its head in chunks, or the model's own where that cannot be."""
    obstacle = why_not_chunked(network, batch)
    if config.distill is not None and config.distill.cache is not None:
        samples = _samples_seen(config, data)
        return partial(causal_lm_loss, teacher=cached_teacher(config.distill, network, batch, obstacle, samples))
    if config.distill is not None:
        return partial(causal_lm_loss, teacher=load_teacher(config.distill, network, batch, obstacle))
    if obstacle:
        console.info(f"  all logits are kept at once, the head cannot be chunked: {obstacle}")
        return model_loss
    return causal_lm_loss


def _samples_seen(config: TuneConfig, data: TuneData) -> Iterator[Sample]:
    """Every sample whose loss is taken in a run, some more than once."""
    steps, number = num_steps(config, len(data.samples)), len(data.samples)
    for step in range(min(steps, math.ceil(number / config.batch_size))):  # an epoch has all
        for index in step_samples(data.samples, step, batch_size=config.batch_size, seed=config.seed):
            yield data.samples[index]
    yield from (data.samples[index] for index in data.first_drawn(config.init_samples, config.seed))
    yield from fixed_batch.chosen(config, steps, data).samples


def _keep_merged(network: PreTrainedModel, config: TuneConfig, *, sharded: bool) -> None:
    """Say how long the merged weights are kept, and why."""
    if sharded:
        console.info("  merged weights: built anew for every use (parallelism: fsdp)")
        return
    adapted = adapter_layers(network)
    num_weights = sum(layer.in_features * layer.out_features for layer in adapted.values())
    device, dtype = network.device, network.dtype
    keep, reason = cache_policy(num_weights * dtype.itemsize, device, config.merged_cache,
                                checkpointing=config.gradient_checkpointing)  # fmt: skip
    keep_merged(network, keep)
    console.info(f"  merged weights: {reason}")
    first: Any = next(iter(adapted.values()))
    how = how_merged(device, dtype, config.weight_rounding, config.rank, first.grid, first.held)
    console.detail(f"  merged by {how}")
    if codes_on_cuda(first.held):
        console.warn("base: packed holds codes here, which no CUDA kernel reads: torch's operations unpack each weight "
                     "before it is merged. base: plain needs none of it, and more memory.")  # fmt: skip


def _say_idle(config: TuneConfig, dtype: torch.dtype, data: TuneData) -> None:
    """Mention settings that are asked for, as a recipe does for several methods, and do nothing in this run."""
    is_streamed = data.num_steps is not None and any(part.stream != "off" for _, part in config.data.parts)
    if config.data.shuffle_buffer != TuneDataConfig.shuffle_buffer and not is_streamed:
        console.info("  data.shuffle_buffer has nothing to do, the text is not streamed: all of it is shuffled")
    if config.start == "kaiming" and config.init_samples != TuneConfig.init_samples:
        console.info("  init_samples has nothing to do, lora_A starts from a random draw")
    steps = num_steps(config, len(data.samples))
    if config.warmup_steps >= steps:
        console.warn(f"warmup_steps: {config.warmup_steps}, and the run has {console.counted(steps, 'step')}: "
                     "the learning rate never reaches its peak.")  # fmt: skip
    if config.rounding == "stochastic" and dtype != torch.bfloat16 and not config.quantization_aware:
        name = str(dtype).removeprefix("torch.")
        console.info(f"  rounding: stochastic has nothing to do, merged weights are {name}")
