"""One decoder block: its weights are pruned group by group, and what it then puts out are the next one's inputs.

There are two ways, each a function that yields the pruned block's outputs, a batch after the other. `at_once` runs the
dense block, prunes all of its groups and runs it again, as the papers' codes do; `in_stages` (`true_sequential`) stops
every pass before each group, prunes it there, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec
from lors_cli.machine import processes
from lors_cli.models.blocks import PrunableWeight, block_weights
from lors_cli.models.skip import is_skipped
from lors_cli.output import console
from lors_cli.pruning import methods
from lors_cli.pruning.methods.reconstruct import reconstruct
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.walk.free_inputs import FreeInput, apply_permutation, find_for, free_inputs, row_orders
from lors_cli.pruning.walk.passes import Walk
from lors_cli.pruning.walk.phases import Phases
from lors_cli.pruning.walk.recorder import BlockDone, InputGroup, InputRecorder
from lors_cli.pruning.walk.staged import Forward, run_staged, shared_inputs
from lors_cli.sparsity import Pattern

if TYPE_CHECKING:
    from torch import nn

    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.recipe.schema import PruneConfig

Orders = dict[tuple[Any, ...], list[list[str]] | None]
"""By kind of block: the groups of weights to stop at, None where passes cannot be stopped."""


@dataclass
class Block:
    """A decoder block that is being pruned.

    `weights`, without those to skip, and `free` (inputs that may be permuted) are by full name.
    """

    config: PruneConfig
    phases: Phases
    index: int
    prefix: str
    module: nn.Module
    weights: dict[str, PrunableWeight]
    pattern: Pattern
    free: dict[str, FreeInput]
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Weights that saw fewer tokens than they have inputs (experts that few are routed to), and how many these were."""
    grids: dict[str, Grid] = field(default_factory=dict)
    """By weight, where they are quantised."""


def open_block(
    config: PruneConfig, model: BlockwiseModel, index: int, module: nn.Module, pattern: Pattern, phases: Phases
) -> Block:
    """Block `index` of a model, whose weights are present in `module`, to be pruned to `pattern`.

    Raises:
        UsageError: a weight is not finite.
    """
    prefix = f"{model.prefix}.{index}"
    found = block_weights(module, prefix)
    for name, weight in found.items():
        if not bool(weight.matrix.isfinite().all()):
            raise UsageError(f"{name} holds NaN or Inf: the checkpoint is broken, or its dtype too narrow.")
    weights = {name: weight for name, weight in found.items() if not is_skipped(name, config.skip)}
    free = movable_inputs(config, module, prefix) if config.channel_permutation else {}
    return Block(config, phases, index, prefix, module, weights, pattern, free)


def movable_inputs(config: PruneConfig, module: nn.Module, prefix: str) -> dict[str, FreeInput]:
    """The inputs of a decoder block that may be permuted, by full name: who reads and who makes them is pruned."""
    pruned = {weight.module for name, weight in block_weights(module, prefix).items()
              if not is_skipped(name, config.skip)}  # fmt: skip
    return {f"{prefix}.{item.name}": item for item in free_inputs(module)
            if pruned >= {item.consumer, *(producer.module for producer in item.producers)}}  # fmt: skip


def without_data(block: Block) -> None:
    """Prune a block by a method that looks at weights alone."""
    for number, name in enumerate(block.weights):
        solve(block, InputGroup([name], InputStatistics("none")), number)


def prune_block(block: Block, walk: Walk, orders: Orders) -> None:
    """Prune a block on its inputs in a walk, and put the pruned block's outputs there."""
    states = walk.states
    if walk.dense is not None:
        with block.phases("forward"):
            list(walk.dense.run(block.module, block.index))
        with block.phases("io"):
            states.settle()
            walk.dense.states.advance()
    forwards = [partial(walk.output, block.module, block.index, number) for number in states.numbers]
    with block.phases("forward"):
        stages = _stages(block, forwards[-1], orders) if block.config.sequential and block.weights else None
        outputs: Iterator[torch.Tensor] = (forward() for forward in forwards)
        if block.weights:
            outputs = at_once(block, forwards) if stages is None else in_stages(block, stages, forwards)
        if block.config.reconstruct_epochs and block.weights:
            _reconstruct(block, outputs, walk)
            outputs = (forward() for forward in forwards)
        for number, output in zip(states.numbers, outputs, strict=True):
            with block.phases("io"):
                states.put(number, output)


def at_once(block: Block, forwards: Sequence[Forward]) -> Iterator[torch.Tensor]:
    """Every group is pruned on what the dense block puts out; `forwards` are run twice."""
    recorder = InputRecorder(
        block.weights, methods.statistics_kind(block.config), stop_after_last=True, clock=block.phases
    )
    with closing(recorder):
        for forward in forwards:
            with suppress(BlockDone):
                forward()
            recorder.end_batch()
    for number, group in enumerate(recorder.groups):
        solve(block, group, number)
        group.statistics = InputStatistics("none")  # its sums are not needed any more
    yield from (forward() for forward in forwards)


def in_stages(block: Block, stages: list[list[str]], forwards: Sequence[Forward]) -> Iterator[torch.Tensor]:
    """Every group is pruned on what the pruned groups before it put out; `forwards` are run once."""
    kind = methods.statistics_kind(block.config)
    groups = [InputGroup(names, InputStatistics(kind)) for names in stages]

    def observe(stage: int, x: torch.Tensor) -> None:
        with block.phases("statistics"):
            groups[stage].statistics.update(x)

    def prune(stage: int) -> torch.Tensor | None:
        permutation = solve(block, groups[stage], stage)
        groups[stage].statistics = InputStatistics("none")
        return permutation

    return run_staged([block.weights[group.names[0]].module for group in groups], forwards, observe, prune)


def _reconstruct(block: Block, outputs: Iterator[torch.Tensor], walk: Walk) -> None:
    """Prune a block in the way that yields `outputs`, and tune the weights that are kept."""
    with closing(outputs):  # type: ignore[type-var]
        next(outputs)  # by then every group is pruned; the other passes need not be run to their ends
    with block.phases("reconstruct"):
        reconstruct(block.module, [*block.weights.values()], walk.arguments[block.index].run,
                    [partial(_step, walk, number) for number in walk.states.numbers],
                    epochs=block.config.reconstruct_epochs, samples=block.config.reconstruct_batch_size,
                    seed=block.index, grids=block.grids)  # fmt: skip


def _step(walk: Walk, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A step's inputs, and what the dense block put out in the dense model."""
    assert walk.dense is not None
    return walk.states.get(number), walk.dense.states.get(number), number


def _stages(block: Block, forward: Forward, orders: Orders) -> list[list[str]] | None:
    """The groups of weights to stop at, None for a block where passes cannot be stopped; found once a kind."""
    local = {name.removeprefix(f"{block.prefix}."): weight for name, weight in block.weights.items()}
    kind = (type(block.module), tuple((name, weight.shape) for name, weight in local.items()))
    if kind not in orders:
        orders[kind] = shared_inputs(local, forward)
        if orders[kind] is None:
            console.info(f"  {block.prefix}: has experts or calls a weight twice: all of it is pruned at once")
    groups = orders[kind]
    return None if groups is None else [[f"{block.prefix}.{name}" for name in names] for names in groups]


def solve(block: Block, group: InputGroup, number: int) -> torch.Tensor | None:
    """Prune the weights of the block's group `number`; one process does it, and all get the result.

    Returns:
        The permutation of its input channels, if one was applied.
    """
    weights = [block.weights[name] for name in group.names]
    with block.phases("solve"):
        matrix = weights[0].matrix
        group.statistics.add_up(matrix.shape[1], matrix.device)
        if group.statistics.kind != "none" and group.statistics.num_tokens < matrix.shape[1]:
            block.few_tokens.update(dict.fromkeys(group.names, group.statistics.num_tokens))
        permutation = _permute(block, group)
        solver = number % processes.num_processes()
        if solver == processes.process_index():
            new, grids = _pruned(block, group, [weight.matrix for weight in weights])
        else:
            new = [torch.empty_like(weight.matrix) for weight in weights]
            spec = methods.grid_spec(block.config)
            grids = [_empty_grid(spec, values) for values in new] if spec else []
        for weight, values in zip(weights, new, strict=True):
            weight.matrix.copy_(processes.send_to_all(values.contiguous(), solver))
        for name, grid in zip(group.names if grids else (), grids, strict=True):
            block.grids[name] = _sent_to_all(grid, solver)
    return permutation


def _pruned(block: Block, group: InputGroup, matrices: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Grid]]:
    """The pruned weights and, where they are quantised, their grids."""
    method, statistics, spec = block.config.method, group.statistics, methods.grid_spec(block.config)
    unseen = statistics.kind != "none" and statistics.num_tokens == 0
    if unseen:
        method, statistics = "magnitude", InputStatistics("none")
    if spec is not None:
        return methods.round_group(method, matrices, statistics, block.pattern, spec,
                                   refit=block.config.refit and not unseen)  # fmt: skip
    pruned = methods.prune_group(method, matrices, statistics, block.pattern)
    return methods.refit_group(matrices, pruned, statistics) if block.config.refit and not unseen else pruned, []


def _empty_grid(spec: GridSpec, weight: torch.Tensor) -> Grid:
    """Room for the grid of a weight (R, C)."""
    scales = weight.new_empty(len(weight), spec.num_groups(weight.shape[1]))
    return Grid(spec, scales, None if spec.symmetric else torch.empty_like(scales, dtype=torch.uint8))


def _sent_to_all(grid: Grid, source: int) -> Grid:
    """Process `source`'s grid, in place of everyone's."""
    zeros = None if grid.zeros is None else processes.send_to_all(grid.zeros.contiguous(), source)
    return Grid(grid.spec, processes.send_to_all(grid.scales.contiguous(), source), zeros)


def _permute(block: Block, group: InputGroup) -> torch.Tensor | None:
    """Reorder the group's inputs so that N:M costs least, where the block's function allows it."""
    free = block.free.get(group.names[0])
    if free is None or len(group.names) > 1:
        return None
    scores = methods.scores(block.config.method, block.weights[group.names[0]].matrix, group.statistics)
    permutation = processes.send_to_all(find_for(free, scores, block.pattern), 0)
    apply_permutation(free, permutation)
    _permute_grids(block, free, permutation)
    group.statistics.permute(permutation)
    return permutation


def _permute_grids(block: Block, free: FreeInput, permutation: torch.Tensor) -> None:
    """Reorder the rows of the grids of weights that make the inputs `free`, as their own rows were."""
    for module, rows in row_orders(free, permutation):
        for name, grid in block.grids.items():
            if block.weights[name].module is module:
                order = rows.to(grid.scales.device)
                zeros = None if grid.zeros is None else grid.zeros[order]
                block.grids[name] = Grid(grid.spec, grid.scales[order], zeros)
