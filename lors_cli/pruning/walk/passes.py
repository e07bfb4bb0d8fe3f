"""Start a walk through a model's blocks, and walk through them without changing anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError
from lors_cli.files import atomic
from lors_cli.machine import processes
from lors_cli.models.blocks import block_weights
from lors_cli.models.skip import is_skipped
from lors_cli.output import console, progress
from lors_cli.pruning.methods.owl import allocate, outlier_ratio
from lors_cli.pruning.walk.calibration import BlockArguments, first_inputs
from lors_cli.pruning.walk.hidden_states import HiddenStates, choose_place
from lors_cli.pruning.walk.recorder import InputRecorder

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.recipe.schema import CalibrationConfig

ANEW = "anew"
"""A file in a folder of hidden states that says that more than these would be needed to resume from them."""


@dataclass
class Walk:
    """The inputs of the first block that is to do, what all blocks get besides, and that block's index.

    `dense` is the same of a walk beside it, through the blocks as they were before they were pruned.
    """

    states: HiddenStates
    arguments: list[BlockArguments]
    first: int
    dense: Walk | None = None

    def output(self, block: nn.Module, index: int, number: int) -> torch.Tensor:
        """What block `index` makes of a batch of its inputs."""
        return self.arguments[index].run(block, self.states.get(number), number)

    def run(self, block: nn.Module, index: int) -> Iterator[int]:
        """Put what block `index` makes of its inputs where the next one's inputs are: yields a batch that is done."""
        for number in self.states.numbers:
            self.states.put(number, self.output(block, index, number))
            yield number

    def close(self) -> None:
        """Stop saving; what is not whole is removed."""
        self.states.close()
        if self.dense is not None:
            self.dense.close()


def start_walk(
    model: BlockwiseModel, batches: list[torch.Tensor], config: CalibrationConfig, folder: Path, *,
    with_dense: bool = False,
) -> Walk:  # fmt: skip
    """A walk from the first block that is to do.

    Args:
        model: its blocks are not read.
        batches: (samples, tokens) int64 each, of all processes together; this one takes its share.
        config: says where hidden states are kept.
        folder: of hidden states, perhaps with those of an earlier run.
        with_dense: there is to be a walk through the dense blocks, too.

    Raises:
        UsageError: there are fewer batches than processes, or the model does more than hand on hidden states.
    """
    if len(batches) < processes.num_processes():
        raise UsageError(
            f"{len(batches)} calibration batches cannot be shared by {processes.num_processes()} processes.",
            "Lower calibration.batch_size, or start fewer processes.",
        )
    mine = {number: batches[number]
            for number in range(processes.process_index(), len(batches), processes.num_processes())}  # fmt: skip
    arguments = [BlockArguments() for _ in model.blocks]
    text = model.network.config.get_text_config()
    numbers = text.hidden_size * getattr(text, "altup_num_inputs", 1)  # a token; Gemma 3n has several streams
    num_bytes = sum(batch.numel() for batch in mine.values()) * numbers * model.network.dtype.itemsize
    place = choose_place(config.offload, (2 if with_dense else 1) * num_bytes, model.device)
    walk = Walk(HiddenStates(folder, place, model.device), arguments, 0)
    walks, among = [walk], None
    if with_dense:
        walk.dense = Walk(HiddenStates(folder / "dense", place, model.device, ahead=True), [], 0)
        walks = [walk.dense, walk]  # in this order to the next block, too
        among = walk.dense.states.there(len(batches))
    resumed = None if (folder / ANEW).exists() else walk.states.resume(list(mine), len(batches), among)
    if walk.dense is not None and resumed is not None:
        walk.dense.states.resume(list(mine), len(batches), {resumed})
    if resumed is None:  # what lies there may be of batches cut for other processes, which would fit again one day
        processes.wait_for_all()
        for each in walks if processes.is_main() else ():
            each.states.clear()
        processes.wait_for_all()
    aside = None if place == "device" else torch.device("cpu")
    with model.embeddings():
        inputs = first_inputs(model.network, list(model.blocks), mine, model.device, arguments, aside)
        for number, hidden in zip(mine, inputs, strict=True):
            if resumed is not None:
                continue
            before, last = hidden.shape[:-3], hidden.shape[-1]  # Gemma 3n has several streams, stacked first
            shapes = {key: (*before, *batch.shape, last) for key, batch in mine.items()}
            for each in walks:
                if not each.states.numbers:
                    each.states.expect(shapes, hidden.dtype)
                each.states.put(number, hidden)
    if walk.dense is not None:
        twins: dict[int, MutableMapping[Any, Any]] = {}
        walk.dense.arguments = [each.apart(twins) for each in arguments]
    if resumed is not None:
        walk.first = resumed
        return walk
    for each in walks:
        each.states.advance()
    return walk


def note_shared(folder: Path, arguments: BlockArguments) -> None:
    """Where blocks leave keys and values for later ones, which are kept in memory only, no run resumes from halfway."""
    if arguments.shared and not (folder / ANEW).exists():
        console.detail("  blocks share keys and values: an interrupted run starts at the first block again")
        (folder / ANEW).touch()


@torch.no_grad()
def owl_shares(
    model: BlockwiseModel, batches: list[torch.Tensor], config: CalibrationConfig, work: Path, sparsity: float,
    skip: Sequence[str] = (),
) -> list[float]:  # fmt: skip
    """OWL's share of zeros for every block, from one pass of all processes' batches through the dense model.

    `work` keeps what an interrupted run resumes from; `sparsity` is that of all weights that no glob of `skip` names.
    """
    found = atomic.read_json(work / "owl.json") or {"ratios": [], "sizes": []}
    if len(found["ratios"]) < len(model.blocks):
        folder = work / "owl"
        walk = start_walk(model, batches, config, folder)
        found = {name: values[: walk.first] for name, values in found.items()}
        with progress.progress("outliers", len(model.blocks), "blocks") as task, closing(walk):
            task.skip(walk.first)
            for index in range(walk.first, len(model.blocks)):
                ratio, size = _outliers(model, index, walk, skip)
                found["ratios"].append(ratio)
                found["sizes"].append(size)
                if processes.is_main():
                    atomic.write_json(work / "owl.json", found)
                note_shared(folder, walk.arguments[index])
                walk.states.advance()
                task.advance()
            walk.states.settle()
        processes.wait_for_all()
        if processes.is_main():
            shutil.rmtree(folder)
    places = [place for place, size in enumerate(found["sizes"]) if size]
    ratios, sizes = ([values[place] for place in places] for values in (found["ratios"], found["sizes"]))
    shares = dict(zip(places, allocate(ratios, sizes, sparsity), strict=True))
    return [shares.get(place, sparsity) for place in range(len(model.blocks))]


def _outliers(model: BlockwiseModel, index: int, walk: Walk, skip: Sequence[str]) -> tuple[float, int]:
    """A dense block's outlier ratio and number of weights, without those to skip; its outputs are the next's inputs."""
    with model.block(index) as block:
        weights = {name: weight for name, weight in block_weights(block, f"{model.prefix}.{index}").items()
                   if not is_skipped(name, skip)}  # fmt: skip
        recorder = InputRecorder(weights, "norm")
        with closing(recorder):
            for _ in walk.run(block, index):
                recorder.end_batch()
        norms = {}
        for group in recorder.groups:
            matrix = weights[group.names[0]].matrix
            group.statistics.add_up(matrix.shape[1], matrix.device)
            seen = group.statistics.num_tokens > 0
            norm = group.statistics.input_norms() if seen else torch.zeros(matrix.shape[1], device=matrix.device)
            norms.update(dict.fromkeys(group.names, norm))
        matrices = [weight.matrix for weight in weights.values()]
        if not matrices:
            return 0.0, 0
        ratio = outlier_ratio(matrices, [norms[name] for name in weights])
        return ratio, sum(matrix.numel() for matrix in matrices)
