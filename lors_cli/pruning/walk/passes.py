"""Start a walk through a model's blocks, and walk through them without changing anything."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.machine import processes
from lors_cli.models.blocks import block_weights
from lors_cli.output import progress
from lors_cli.pruning.methods.owl import allocate, outlier_ratio
from lors_cli.pruning.walk.calibration import BlockArguments, first_inputs
from lors_cli.pruning.walk.hidden_states import HiddenStates, choose_place
from lors_cli.pruning.walk.recorder import InputRecorder

if TYPE_CHECKING:
    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.recipe.schema import CalibrationConfig


def start_walk(
    model: BlockwiseModel, batches: list[torch.Tensor], config: CalibrationConfig, folder: Path, part_size: int = 0
) -> tuple[HiddenStates, list[BlockArguments], int]:
    """The inputs of the first block that is to do, what all blocks get besides, and that block's index.

    Args:
        model: its blocks are not read.
        batches: (samples, tokens) int64 each, of all processes together; this one takes its share.
        config: says where hidden states are kept.
        folder: of hidden states, perhaps with those of an earlier run.
        part_size: arguments are also found for batches cut into parts of so many samples; 0 for whole ones only.

    Raises:
        UsageError: there are fewer batches than processes.
    """
    mine = range(processes.process_index(), len(batches), processes.num_processes())
    if len(batches) < processes.num_processes():
        raise UsageError(
            f"{len(batches)} calibration batches cannot be shared by {processes.num_processes()} processes.",
            "Lower calibration.batch_size, or start fewer processes.",
        )
    arguments = [BlockArguments() for _ in model.blocks]
    hidden_size = model.network.config.get_text_config().hidden_size
    num_bytes = sum(batches[number].numel() for number in mine) * hidden_size * model.network.dtype.itemsize
    states = HiddenStates(folder, choose_place(config.offload, num_bytes, model.device), model.device)
    resumed = states.resume(list(mine), len(batches))
    parts = [part for number in mine for part in batches[number].split(part_size or len(batches[number]))]
    if resumed is not None or part_size:
        sizes = {len(part): part for part in (*parts, *(batches[number] for number in mine))}
        _first(model, list(sizes.values()), arguments)
    if resumed is not None:
        return states, arguments, resumed
    with model.embeddings():
        inputs = first_inputs(
            model.network, list(model.blocks), [batches[key] for key in mine], model.device, arguments
        )
        for number, hidden in zip(mine, inputs, strict=True):
            if not states.numbers:
                states.expect({key: (*batches[key].shape, hidden.shape[-1]) for key in mine}, hidden.dtype)
            states.put(number, hidden)
    states.advance()
    return states, arguments, 0


def _first(model: BlockwiseModel, batches: list[torch.Tensor], arguments: list[BlockArguments]) -> None:
    with model.embeddings():
        for _ in first_inputs(model.network, list(model.blocks), batches, model.device, arguments):
            pass


@torch.no_grad()
def owl_shares(
    model: BlockwiseModel, batches: list[torch.Tensor], config: CalibrationConfig, work: Path, sparsity: float
) -> list[float]:
    """OWL's share of zeros for every block, from one pass of all processes' batches through the dense model.

    `work` keeps what an interrupted run goes on from; `sparsity` is the model's.
    """
    found = atomic.read_json(work / "owl.json") or {"ratios": [], "sizes": []}
    if len(found["ratios"]) < len(model.blocks):
        folder = work / "owl"
        folder.mkdir(exist_ok=True)
        states, arguments, first = start_walk(model, batches, config, folder)
        found = {name: values[:first] for name, values in found.items()}
        with progress.progress("outliers", len(model.blocks), "blocks") as task, closing(states):
            task.skip(first)
            for index in range(first, len(model.blocks)):
                ratio, size = _outliers(model, index, states, arguments[index])
                found["ratios"].append(ratio)
                found["sizes"].append(size)
                if processes.is_main():
                    atomic.write_json(work / "owl.json", found)
                states.advance()
                task.advance()
            states.settle()
        processes.wait_for_all()
        if processes.is_main():
            shutil.rmtree(folder)
    return allocate(found["ratios"], found["sizes"], sparsity)


def _outliers(model: BlockwiseModel, index: int, states: HiddenStates, arguments: BlockArguments) -> tuple[float, int]:
    """A dense block's outlier ratio and number of weights; its outputs are the next block's inputs."""
    with model.block(index) as block:
        weights = block_weights(block, f"{model.prefix}.{index}")
        recorder = InputRecorder(weights, "norm")
        with closing(recorder):
            for number in states.numbers:
                states.put(number, arguments.run(block, states.get(number)))
                recorder.end_batch()
        norms = {}
        for group in recorder.groups:
            matrix = weights[group.names[0]].matrix
            group.statistics.add_up(matrix.shape[1], matrix.device)
            seen = group.statistics.num_tokens > 0
            norm = group.statistics.input_norms() if seen else torch.zeros(matrix.shape[1], device=matrix.device)
            norms.update(dict.fromkeys(group.names, norm))
        matrices = [weight.matrix for weight in weights.values()]
        ratio = outlier_ratio(matrices, [norms[name] for name in weights])
        return ratio, sum(matrix.numel() for matrix in matrices)
