"""The walk through a model's decoder blocks: each is read, pruned and written before the next one is looked at.

A block that is done is kept in the work folder, where an interrupted run resumes: `block_0003.safetensors` with its
tensors, `block_0003.json` with what was noted of it, and the next block's inputs.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lors_cli.files import atomic, hashes
from lors_cli.grid import Grid
from lors_cli.machine import processes
from lors_cli.models.grids import load_grids, save_grids
from lors_cli.models.tensor_files import write_tensors
from lors_cli.output import console, progress
from lors_cli.pruning.walk.block import Block, Orders, movable_inputs, open_block, prune_block, without_data
from lors_cli.pruning.walk.passes import note_shared, owl_shares, start_walk
from lors_cli.pruning.walk.phases import Phases
from lors_cli.sparsity import LayerSparsity, Pattern, measure

if TYPE_CHECKING:
    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.recipe.schema import PruneConfig


@dataclass
class Outcome:
    """What there is to say of a model's pruned weights."""

    phases: Phases
    layers: list[LayerSparsity] = field(default_factory=list)
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Of all blocks, as `Block.few_tokens`."""
    off_grid: dict[str, int] = field(default_factory=dict)
    """How many values of each quantised weight do not lie on its grid: none."""
    earlier_s: float = 0.0
    """What the blocks took that an earlier run has done."""
    since: float = field(default_factory=time.monotonic)
    """When the last block was done, by `time.monotonic`."""


@torch.no_grad()
def prune_blocks(
    config: PruneConfig, model: BlockwiseModel, pattern: Pattern, work: Path, batches: list[torch.Tensor]
) -> Outcome:
    """Prune every block of a model; `block_file` is where its tensors then lie.

    Args:
        config: method, calibration.
        model: its blocks are read one at a time.
        pattern: of the whole model.
        work: folder of finished blocks and of the next one's inputs.
        batches: (samples, tokens) int64 each, of all processes together; none for a method that looks at weights alone.
    """
    outcome = Outcome(Phases(model.device))
    if config.channel_permutation and not any(
        movable_inputs(config, module, f"{model.prefix}.{index}") for index, module in enumerate(model.blocks)
    ):
        console.warn("channel_permutation: no inputs of the pruned weights can be permuted; nothing is.")
    if batches:
        _with_calibration(config, model, pattern, work, batches, outcome)
    else:
        _without_data(config, model, pattern, work, outcome)
    processes.wait_for_all()
    return outcome


def block_file(work: Path, index: int) -> Path:
    """Where a finished block's tensors are."""
    return work / f"block_{index:04d}.safetensors"


def grid_folder(work: Path, index: int) -> Path:
    """Where a finished block's grids are, by `models.grids`."""
    return block_file(work, index).with_suffix("")


def block_grids(work: Path, num_blocks: int) -> dict[str, Grid]:
    """The grids of all finished blocks."""
    return {name: grid for index in range(num_blocks) for name, grid in load_grids(grid_folder(work, index)).items()}


def _without_data(config: PruneConfig, model: BlockwiseModel, pattern: Pattern, work: Path, outcome: Outcome) -> None:
    with progress.progress("prune", len(model.blocks), "blocks") as task:
        for index in range(len(model.blocks)):
            if not _take_up(work, index, outcome):
                with model.block(index) as module:
                    block = open_block(config, model, index, module, pattern, outcome.phases)
                    without_data(block)
                    _note(work, block, outcome)
                    if processes.is_main():
                        write_tensors(block_file(work, index), model.checkpoint_tensors(index))
            task.advance()


def _with_calibration(
    config: PruneConfig, model: BlockwiseModel, pattern: Pattern, work: Path, batches: list[torch.Tensor],
    outcome: Outcome,
) -> None:  # fmt: skip
    steps_of = min(config.reconstruct_batch_size, sum(map(len, batches)))  # reconstruction's, larger with more samples
    config = replace(config, reconstruct_batch_size=steps_of)
    phases, num_blocks, orders = outcome.phases, len(model.blocks), Orders()
    patterns = _patterns(config, model, pattern, work, batches, phases)
    with phases("forward"):
        walk = start_walk(model, batches, config.calibration, work, with_dense=config.reconstruct_epochs > 0)
    if walk.first:
        console.info(f"  resuming after {walk.first} of {num_blocks} blocks done by an earlier run")
    with progress.progress("prune", num_blocks, "blocks") as task, closing(walk):
        task.skip(sum(_take_up(work, index, outcome) for index in range(walk.first)))
        for index in range(walk.first, num_blocks):
            with ExitStack() as stack:
                with phases("io"):
                    module = stack.enter_context(model.block(index))
                block = open_block(config, model, index, module, patterns[index], phases)
                prune_block(block, walk, orders)
                _note(work, block, outcome)
                note_shared(work, walk.arguments[index])
                with phases("io"):
                    tensors = model.checkpoint_tensors(index) if processes.is_main() else {}
                    if walk.dense is not None:
                        walk.dense.states.settle()  # without which the pruned ones' are worth nothing
                    walk.states.advance(block_file(work, index) if processes.is_main() else None, tensors)
            task.advance(note=str(phases))
        with phases("io"):
            walk.states.settle()


def _patterns(
    config: PruneConfig, model: BlockwiseModel, pattern: Pattern, work: Path, batches: list[torch.Tensor],
    phases: Phases,
) -> list[Pattern]:  # fmt: skip
    """What each block has to reach."""
    if config.layer_sparsity == "uniform":
        return [pattern] * len(model.blocks)
    with phases("outliers"):
        shares = owl_shares(model, batches, config.calibration, work, pattern.sparsity, config.skip)
    console.info(f"  OWL: blocks get {min(shares):.3f} to {max(shares):.3f} zeros")
    return [Pattern(None, None, share) for share in shares]


def _note(work: Path, block: Block, outcome: Outcome) -> None:
    """Measure what came out of a block, and keep it for a run that resumes from here."""
    layers = [measure(name, weight.matrix, block.pattern) for name, weight in block.weights.items()]
    outcome.layers += layers
    outcome.few_tokens |= block.few_tokens
    off_grid = {name: _num_off_grid(block.weights[name].matrix, grid) for name, grid in block.grids.items()}
    outcome.off_grid |= off_grid
    since, outcome.since = outcome.since, time.monotonic()
    taken = {"elapsed_s": outcome.since - since, "phases_s": outcome.phases.lap()}
    if processes.is_main():
        if block.grids:
            grid_folder(work, block.index).mkdir(exist_ok=True)
            save_grids(grid_folder(work, block.index), block.grids)
        content = hashes.plain({"layers": layers, "few_tokens": block.few_tokens, "off_grid": off_grid, **taken})
        atomic.write_json(block_file(work, block.index).with_suffix(".json"), content)


def _num_off_grid(weight: torch.Tensor, grid: Grid) -> int:
    return int((grid.rounded(weight) != weight).sum())


def _take_up(work: Path, index: int, outcome: Outcome) -> bool:
    """What an earlier run noted of a finished block; whether there is one."""
    file = block_file(work, index)
    known = atomic.read_json(file.with_suffix(".json"))
    if known is None or not file.is_file():
        return False
    outcome.layers += [LayerSparsity(**{**layer, "shape": tuple(layer["shape"])}) for layer in known["layers"]]
    outcome.few_tokens |= known["few_tokens"]
    outcome.off_grid |= known.get("off_grid", {})  # work of an earlier version has none
    outcome.earlier_s += known.get("elapsed_s", 0.0)
    outcome.phases.add(known.get("phases_s", {}))
    return True
