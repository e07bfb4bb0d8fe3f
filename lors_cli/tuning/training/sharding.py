"""Frozen weights in shards: each process holds a part of every decoder block and gathers the rest when it is used.

torch's FSDP2 shards the frozen weights alone, in their own number format. The adapters, and the norms that are trained,
stay whole in every process, in float32: they are small, and their gradients are added up at the end of a step
(`distributed.add_up_step`), as they are with whole models. Embeddings and head stay whole too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from transformers import PreTrainedModel

from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.models.blocks import decoder_blocks
from lors_cli.models.loading import load_model
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.attach import adapter_parameters, put_adapters


def is_sharded(config: TuneConfig) -> bool:
    """Whether weights are held in shards: the settings say so, and there are several processes."""
    return config.parallelism == "fsdp" and processes.num_processes() > 1


def load_trainable(config: TuneConfig, model: ModelConfig) -> PreTrainedModel:
    """The sparse model, where it is to be trained; in CPU memory if it is to be sharded."""
    return load_model(model, device=torch.device("cpu") if is_sharded(config) else None)


def shard(network: PreTrainedModel, device: torch.device) -> None:
    """Move a model with adapters from the CPU to `device`, of each block's frozen weights only this process's shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.num_processes(),))
    _, blocks = decoder_blocks(network)
    sharded = {parameter for parameter in blocks.parameters() if not parameter.requires_grad}
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor not in sharded:
            tensor.data = tensor.data.to(device)
    whole = set(network.parameters()) - sharded
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(network.base_model, mesh=mesh, ignored_params=whole)  # leads the blocks, shards nothing itself


def whole_model(
    config: TuneConfig, model: ModelConfig, trained: PreTrainedModel, layers: list[str], grids: Mapping[str, Grid]
) -> PreTrainedModel:
    """The trained model whole: itself, or the sparse model read again with what was trained put on it."""
    if not is_sharded(config):
        return trained
    network = load_model(model, device=torch.device("cpu"))
    put_adapters(config, network, layers, grids)
    found = adapter_parameters(trained)
    with torch.no_grad():
        for name, parameter in adapter_parameters(network).items():
            parameter.copy_(found[name])
    return network
