"""The block-by-block pruning driver.

For every decoder block: bring it into memory, run it on the calibration inputs and sum statistics, prune its weights
group by group, and hand what the pruned block puts out to the next one. There are two ways: run the dense block, prune
all of its groups, run it again, as the papers' codes do; or, with `true_sequential`, stop every pass before each
group, prune it there, and go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError
from lors_cli.files import atomic, hashes
from lors_cli.machine import processes
from lors_cli.models.blocks import PrunableWeight, block_weights
from lors_cli.models.tensor_files import write_tensors
from lors_cli.output import console, progress
from lors_cli.pruning import methods
from lors_cli.pruning.methods.permutation import FreeInput, apply_permutation, find_for, free_inputs
from lors_cli.pruning.methods.reconstruct import Reconstruction
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.walk.calibration import BlockArguments
from lors_cli.pruning.walk.hidden_states import HiddenStates
from lors_cli.pruning.walk.passes import owl_shares, start_walk
from lors_cli.pruning.walk.phases import Phases
from lors_cli.pruning.walk.recorder import BlockDone, InputGroup, InputRecorder
from lors_cli.pruning.walk.staged import run_staged, shared_inputs
from lors_cli.sparsity import LayerSparsity, Pattern, measure

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.recipe.schema import PruneConfig


@dataclass
class Block:
    """A decoder block that is being pruned.

    Args:
        index: its number.
        module: with its weights.
        weights: those that can be pruned, by full name.
        pattern: to be reached.
        free: its inputs that may be permuted, by full name of the weight that reads them.
    """

    index: int
    module: nn.Module
    weights: dict[str, PrunableWeight]
    pattern: Pattern
    free: dict[str, FreeInput]


@dataclass
class BlockPruner:
    """One pruning run over a model, with its resumable state in `work`.

    Args:
        config: method, pattern, calibration.
        model: its blocks are read one at a time.
        pattern: of the whole model.
        work: folder of finished blocks and of the next one's inputs.
    """

    config: PruneConfig
    model: BlockwiseModel
    pattern: Pattern
    work: Path
    layers: list[LayerSparsity] = field(default_factory=list)
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Weights that saw fewer tokens than they have inputs (experts that few are routed to), and how many these were."""

    def __post_init__(self) -> None:
        self.phases = Phases(self.model.device)
        self._order: dict[tuple[Any, ...], list[list[str]] | None] = {}

    def without_data(self) -> None:
        """Prune by a method that looks at weights alone."""
        with progress.progress("prune", len(self.model.blocks), "blocks") as task:
            for index in range(len(self.model.blocks)):
                if not self._take_up(index):
                    with self.model.block(index) as module:
                        block = self._open(index, module, self.pattern)
                        for number, name in enumerate(block.weights):
                            self._solve(block, InputGroup([name], InputStatistics("none")), number)
                        self._note(block)
                        if processes.is_main():
                            write_tensors(self._path(index), self.model.checkpoint_tensors(index))
                task.advance()
        processes.wait_for_all()

    @torch.no_grad()
    def with_calibration(self, batches: list[torch.Tensor]) -> None:
        """Prune by a method that looks at the inputs of each weight.

        Args:
            batches: (samples, tokens) int64 each, of all processes together.
        """
        patterns = self._patterns(batches)
        with self.phases("forward"):
            part_size = methods.RECONSTRUCTION_SAMPLES if self.config.reconstruct_epochs else 0
            states, arguments, first = start_walk(self.model, batches, self.config.calibration, self.work, part_size)
        if first:
            console.info(f"  going on after {first} of {len(self.model.blocks)} blocks done by an earlier run")
        with progress.progress("prune", len(self.model.blocks), "blocks") as task, closing(states):
            task.skip(sum(self._take_up(index) for index in range(first)))
            for index in range(first, len(self.model.blocks)):
                self._next_block(index, patterns[index], states, arguments[index])
                task.advance(note=str(self.phases))
            with self.phases("io"):
                states.settle()
        processes.wait_for_all()

    def _next_block(self, index: int, pattern: Pattern, states: HiddenStates, arguments: BlockArguments) -> None:
        with self.phases("io"):
            context = self.model.block(index)
            module = context.__enter__()
        try:
            self._prune_block(self._open(index, module, pattern), states, arguments)
            with self.phases("io"):
                tensors = self.model.checkpoint_tensors(index) if processes.is_main() else {}
                states.advance(self._path(index) if processes.is_main() else None, tensors)
        finally:
            context.__exit__(None, None, None)

    def _patterns(self, batches: list[torch.Tensor]) -> list[Pattern]:
        """What each block has to reach."""
        if self.config.layer_sparsity == "uniform":
            return [self.pattern] * len(self.model.blocks)
        with self.phases("outliers"):
            shares = owl_shares(self.model, batches, self.config.calibration, self.work, self.pattern.sparsity)
        console.info(f"  OWL: blocks get {min(shares):.3f} to {max(shares):.3f} zeros")
        return [Pattern(None, None, share) for share in shares]

    def _open(self, index: int, module: nn.Module, pattern: Pattern) -> Block:
        prefix = f"{self.model.prefix}.{index}"
        free = free_inputs(module) if self.config.channel_permutation else []
        if self.config.channel_permutation and not free and index == 0:
            console.warn("channel_permutation: no inputs of this architecture's blocks can be permuted; nothing is.")
        weights = block_weights(module, prefix)
        for name, weight in weights.items():
            if not bool(weight.matrix.isfinite().all()):
                raise UsageError(f"{name} holds NaN or Inf: the checkpoint is broken, or its dtype too narrow.")
        return Block(index, module, weights, pattern, {f"{prefix}.{item.name}": item for item in free})

    def _prune_block(self, block: Block, states: HiddenStates, arguments: BlockArguments) -> None:
        epochs = self.config.reconstruct_epochs
        groups = self._stages(block, states, arguments) if self.config.sequential else None
        reconstruction = Reconstruction(block.module, [*block.weights.values()], arguments.run) if epochs else None
        outputs: Iterator[torch.Tensor]
        if groups is None:
            for number, group in enumerate(self._collect(block, states, arguments)):
                self._solve(block, group, number)
                group.statistics = InputStatistics("none")  # its sums are not needed any more
            outputs = self._outputs(block, states, arguments)
        else:
            outputs = self._prune_staged(block, groups, states, arguments)
        if reconstruction is not None:
            if groups is not None:
                with self.phases("forward"), closing(outputs):  # type: ignore[type-var]
                    next(outputs)  # by then every group is pruned; the other passes need not be run to their ends
            with self.phases("reconstruct"):
                parts = [partial(_part, states, number, first) for number in states.numbers
                         for first in range(0, states.num_samples(number), methods.RECONSTRUCTION_SAMPLES)]  # fmt: skip
                reconstruction.tune(parts, epochs, seed=block.index)
            outputs = self._outputs(block, states, arguments)
        with self.phases("forward"):
            for number, output in zip(states.numbers, outputs, strict=True):
                with self.phases("io"):
                    states.put(number, output)
        self._note(block)

    @staticmethod
    def _outputs(block: Block, states: HiddenStates, arguments: BlockArguments) -> Iterator[torch.Tensor]:
        return (arguments.run(block.module, states.get(number)) for number in states.numbers)

    def _collect(self, block: Block, states: HiddenStates, arguments: BlockArguments) -> list[InputGroup]:
        recorder = InputRecorder(
            block.weights, methods.statistics_kind(self.config), stop_after_last=True, clock=self.phases
        )
        with closing(recorder), self.phases("forward"):
            for number in states.numbers:
                with suppress(BlockDone):
                    arguments.run(block.module, states.get(number))
                recorder.end_batch()
        return recorder.groups

    def _stages(self, block: Block, states: HiddenStates, arguments: BlockArguments) -> list[list[str]] | None:
        """The groups of weights to stop at, None for a block where passes cannot be stopped; found once a kind."""
        prefix = f"{self.model.prefix}.{block.index}."
        local = {name.removeprefix(prefix): weight for name, weight in block.weights.items()}
        kind = (type(block.module), tuple((name, weight.shape) for name, weight in local.items()))
        if kind not in self._order:
            with self.phases("forward"):
                hidden = states.get(states.numbers[-1])
                self._order[kind] = shared_inputs(local, lambda: arguments.run(block.module, hidden))
            if self._order[kind] is None:
                console.info(f"  {prefix[:-1]}: has experts or calls a weight twice: all of it is pruned at once")
        groups = self._order[kind]
        return None if groups is None else [[prefix + name for name in names] for names in groups]

    def _prune_staged(
        self, block: Block, names: list[list[str]], states: HiddenStates, arguments: BlockArguments
    ) -> Iterator[torch.Tensor]:
        """Every group is pruned on what the pruned groups before it put out; the block's outputs, in the same pass."""
        kind = methods.statistics_kind(self.config)
        groups = [InputGroup(group, InputStatistics(kind)) for group in names]

        def observe(stage: int, x: torch.Tensor) -> None:
            with self.phases("statistics"):
                groups[stage].statistics.update(x)

        def solve(stage: int) -> torch.Tensor | None:
            permutation = self._solve(block, groups[stage], stage)
            groups[stage].statistics = InputStatistics("none")
            return permutation

        leaders = [block.weights[group.names[0]].module for group in groups]
        forwards = [partial(_pass, block, states, arguments, number) for number in states.numbers]
        return run_staged(leaders, forwards, observe, solve)

    def _solve(self, block: Block, group: InputGroup, number: int) -> torch.Tensor | None:
        """Prune the weights of one group; one process does it, and all get the result.

        Returns:
            The permutation of its input channels, if one was applied.
        """
        weights = [block.weights[name] for name in group.names]
        with self.phases("solve"):
            matrix = weights[0].matrix
            group.statistics.add_up(matrix.shape[1], matrix.device)
            if group.statistics.kind != "none" and group.statistics.num_tokens < matrix.shape[1]:
                self.few_tokens.update(dict.fromkeys(group.names, group.statistics.num_tokens))
            permutation = self._permute(block, group)
            solver = number % processes.num_processes()
            if solver == processes.process_index():
                new = self._pruned(block, group, [weight.matrix for weight in weights])
            else:
                new = [torch.empty_like(weight.matrix) for weight in weights]
            for weight, values in zip(weights, new, strict=True):
                weight.matrix.copy_(processes.send_to_all(values.contiguous(), solver))
        return permutation

    def _pruned(self, block: Block, group: InputGroup, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        method, statistics = self.config.method, group.statistics
        if statistics.kind != "none" and statistics.num_tokens == 0:
            return methods.prune_group("magnitude", matrices, InputStatistics("none"), block.pattern)
        pruned = methods.prune_group(method, matrices, statistics, block.pattern)
        return methods.refit_group(matrices, pruned, statistics) if self.config.refit else pruned

    def _permute(self, block: Block, group: InputGroup) -> torch.Tensor | None:
        """Reorder the group's inputs so that N:M costs least, where the block's function allows it."""
        free = block.free.get(group.names[0])
        if free is None or len(group.names) > 1:
            return None
        scores = methods.scores(self.config.method, block.weights[group.names[0]].matrix, group.statistics)
        permutation = processes.send_to_all(find_for(free, scores, block.pattern), 0)
        apply_permutation(free, permutation)
        group.statistics.permute(permutation)
        return permutation

    def _note(self, block: Block) -> None:
        """Measure what came out of a block, and keep it for a run that goes on from here."""
        layers = [measure(name, weight.matrix, block.pattern) for name, weight in block.weights.items()]
        self.layers += layers
        if processes.is_main():
            few = {name: self.few_tokens[name] for name in block.weights if name in self.few_tokens}
            content = {"layers": [asdict(layer) for layer in layers], "few_tokens": few}
            atomic.write_json(self._path(block.index).with_suffix(".json"), hashes.plain(content))

    def _take_up(self, index: int) -> bool:
        """What an earlier run noted of a finished block; whether there is one."""
        known = atomic.read_json(self._path(index).with_suffix(".json"))
        if known is None or not self._path(index).is_file():
            return False
        self.layers += [LayerSparsity(**{**layer, "shape": tuple(layer["shape"])}) for layer in known["layers"]]
        self.few_tokens.update(known["few_tokens"])
        return True

    def _path(self, index: int) -> Path:
        return self.work / f"block_{index:04d}.safetensors"

    def block_files(self) -> Iterator[Path]:
        """The finished blocks' tensors, in order."""
        return (self._path(index) for index in range(len(self.model.blocks)))


def _pass(block: Block, states: HiddenStates, arguments: BlockArguments, number: int) -> torch.Tensor:
    return arguments.run(block.module, states.get(number))


def _part(states: HiddenStates, number: int, first: int) -> torch.Tensor:
    return states.get(number)[first : first + methods.RECONSTRUCTION_SAMPLES]
