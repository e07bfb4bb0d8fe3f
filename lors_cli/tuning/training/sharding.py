"""Frozen weights in shards: each process holds a part of every decoder block and gathers the rest when it is used.

torch's FSDP2 shards the frozen weights alone, in their own number format. The adapters, and the norms that are trained,
stay whole in every process, in float32: they are small, and their gradients are added up at the end of a step
(`processes.add_up_gradients`), as they are with whole models. Embeddings and head stay whole too.

No process reads, or ever holds, the whole model: of each matrix of a block it reads its own rows, block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.models.blocks import decoder_blocks
from lors_cli.models.loading import load_model
from lors_cli.models.streaming import BlockwiseModel, open_blockwise, read_whole
from lors_cli.output import progress
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.grids import check_on_grids


def is_sharded(config: TuneConfig) -> bool:
    """Whether weights are held in shards: the settings say so, and there are several processes."""
    return config.parallelism == "fsdp" and processes.num_processes() > 1


def load_trainable(config: TuneConfig, model: ModelConfig) -> tuple[PreTrainedModel, BlockwiseModel | None]:
    """The sparse model, where it is to be trained; if it is to be sharded, what its blocks are read from beside it.

    Their matrices are then stand-ins without memory: one zero, seen as all of them.

    Raises:
        UsageError: it is to be sharded, and can only be read whole.
    """
    if not is_sharded(config):
        return load_model(model), None
    kind = read_whole(model)
    if kind:
        raise UsageError(
            f"parallelism: fsdp: {model.path} is {kind}, which can only be read whole, and no process is to hold that.",
            "Tune an ordinary checkpoint (lors pack --unpack makes one of a packed model), or parallelism: ddp.",
        )
    source = open_blockwise(model)
    network = copy.deepcopy(source.network)
    with progress.busy("reading what lies outside the blocks' matrices"):
        for name, tensor in network.state_dict(keep_vars=True).items():
            if name not in network.all_tied_weights_keys:
                is_matrix = tensor.dim() > 1 and name.startswith(f"{source.prefix}.")
                _fill(tensor, tensor.new_zeros((), device="cpu").expand_as(tensor) if is_matrix else source.read(name))
    network.tie_weights(recompute_mapping=False)
    return network, source


def _fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Put values into a tensor without memory, wherever it is referred to from."""
    is_parameter = isinstance(tensor, nn.Parameter)
    values = nn.Parameter(values, requires_grad=False) if is_parameter else values.clone()
    torch.utils.swap_tensors(tensor, values)


def shard(network: PreTrainedModel, source: BlockwiseModel, device: torch.device, grids: Mapping[str, Grid]) -> None:
    """Bring a model with adapters to `device`, of each block's frozen weights only this process's shard.

    Args:
        source: what the blocks are read from.
        grids: that their weights have to lie on.

    Raises:
        UsageError: some do not.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.num_processes(),))
    prefix, blocks = decoder_blocks(network)
    sharded = {parameter for parameter in blocks.parameters() if not parameter.requires_grad}
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor not in sharded:
            tensor.data = tensor.data.to(device)
    whole = set(network.parameters()) - sharded
    del sharded  # it would keep every block that was read
    with progress.progress("loading", len(blocks), "blocks") as task:
        for index, block in enumerate(blocks):
            for name, parameter in block.named_parameters(prefix=f"{prefix}.{index}"):
                if not any(parameter.stride()) and parameter.dim() > 1:
                    _fill(parameter, _own_rows(source, name, parameter, device, grids))
            fully_shard(block, mesh=mesh, ignored_params=whole)
            task.advance()
    fully_shard(network.base_model, mesh=mesh, ignored_params=whole)  # leads the blocks, shards nothing itself


def _own_rows(
    source: BlockwiseModel, name: str, like: torch.Tensor, device: torch.device, grids: Mapping[str, Grid]
) -> torch.Tensor:
    """A parameter of which this process's rows alone are filled: no other will be kept of it."""
    lengths = [len(part) for part in torch.empty(len(like), device="meta").chunk(processes.num_processes())]
    first, end = (sum(lengths[: processes.process_index() + more]) for more in (0, 1))
    rows = slice(first, end)
    read = source.read_rows(name, rows)
    grid = grids.get(name.removesuffix(".weight"))
    if grid is not None:
        check_on_grids({name: read}, {name: grid.of_rows(rows)})
    values = torch.empty(like.shape, dtype=read.dtype, device=device)
    values[rows] = read
    return values
