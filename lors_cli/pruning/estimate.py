"""What pruning will need, by arithmetic: one decoder block at a time, never the model.

Bytes throughout. The parts are those of the driver: a block and its neighbour (one is being saved while the next is
pruned), what a forward pass holds, the sums XᵀX of the block's inputs, what a solver adds to them, and the hidden
states of all samples between blocks.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from lors_cli.data.tokenising import DEFAULT_LENGTH, DEFAULT_SAMPLES
from lors_cli.grid import bits_a_weight
from lors_cli.machine import processes
from lors_cli.machine.devices import free_memory, resolve_device
from lors_cli.machine.memory import available_memory
from lors_cli.models.needs import RECORDS, RUNTIME, Estimate
from lors_cli.models.size import ModelSize, forward
from lors_cli.output.console import gib
from lors_cli.pruning.facts import (
    ADMM_ITERATIONS,
    CAST_BYTES,
    DESCENT_PASSES,
    REFIT_ITERATIONS,
    grid_spec,
    statistics_kind,
)
from lors_cli.recipe.schema import ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern

FLOAT = 4
MATRICES = {"sparsegpt": 2, "admm": 4}
"""Matrices of the size of H that a solver holds beside H."""
STACKS = {"sparsegpt": 3, "admm": 6}
"""Copies of the stacked weights of a group that a solver holds, in float32."""


def memory_parts(config: PruneConfig, size: ModelSize, num_processes: int = 1) -> dict[str, int]:
    """Peak memory of one of `num_processes` that share the calibration samples, by part; libraries are not counted.

    Returns:
        Bytes of: weights, activations, statistics, solver, hidden_states.
    """
    block = sum(rows * columns for rows, columns, _ in size.block) * size.bytes_a_weight
    weights = 2 * block if size.streamed else size.num_bytes
    if statistics_kind(config) == "none":
        largest = max(rows * columns for rows, columns in size.without(config.skip).linears)
        return {"weights": weights, "activations": 0, "statistics": 0, "solver": 3 * FLOAT * largest,
                "hidden_states": 0}  # fmt: skip
    tokens, in_flight = calibration_tokens(config, size)
    mine = -(-tokens // num_processes)
    if config.reconstruct_epochs:  # each has a part of every step's
        in_flight = -(-in_flight // num_processes)
    width = 3 * size.hidden_size + 3 * size.intermediate_size
    activations = in_flight * width * size.bytes_a_weight + CAST_BYTES
    if config.sequential and not any(expert for *_, expert in size.block):
        activations += mine * (2 * size.hidden_size + size.intermediate_size) * size.bytes_a_weight
    statistics, solver = _statistics(config, size), _solver(config, size.without(config.skip))
    if config.reconstruct_epochs:
        kept = in_flight * (10 * size.hidden_size + 6 * size.intermediate_size) * FLOAT
        solver = max(statistics + solver, 5 * FLOAT * block // size.bytes_a_weight + kept) - statistics
    outside = (size.num_parameters - size.num_prunable) * size.bytes_a_weight  # read before the blocks, then given up
    weights = max(weights, outside - activations - statistics - solver)
    states = size.hidden_size * size.num_streams * size.bytes_a_weight  # of a token
    hidden = 0 if config.calibration.offload == "disk" else mine * states
    hidden *= 2 if config.reconstruct_epochs else 1  # the dense blocks' beside the pruned ones'
    return {"weights": weights, "activations": activations, "statistics": statistics, "solver": solver,
            "hidden_states": hidden}  # fmt: skip


def needs(config: PruneConfig, size: ModelSize, num_processes: int = 1) -> Estimate:
    """Each process's memory by `memory_parts`; on disk the checkpoint, its blocks, the hidden states to resume from."""
    tokens = 0 if statistics_kind(config) == "none" else calibration_tokens(config, size)[0]
    several = num_processes > 1
    copies = (4 if several else 2) + ((4 if several else 3) if config.reconstruct_epochs else 0)  # of hidden states
    hidden = copies * tokens * size.hidden_size * size.num_streams * size.bytes_a_weight
    disk = 2 * (size.num_bytes + _grids(config, size)) + hidden + RECORDS
    return Estimate(RUNTIME + sum(memory_parts(config, size, num_processes).values()), disk)


def bits(config: PruneConfig, size: ModelSize) -> float | None:
    """Bits of a pruned linear's weight once it is packed; None where weights stay floats."""
    spec, kept = grid_spec(config), 1 - Pattern.of(config).sparsity
    if spec is None:
        return None
    layers = [(rows, columns, kept) for rows, columns in size.without(config.skip).plain.linears]
    return bits_a_weight(spec, layers, 8 * size.bytes_a_weight) if layers else None


def _grids(config: PruneConfig, size: ModelSize) -> int:
    """Bytes of the scales and zero points that lie beside a quantised checkpoint."""
    spec = grid_spec(config)
    if spec is None:
        return 0
    width = size.bytes_a_weight + (0 if spec.symmetric else 1)
    return sum(rows * spec.num_groups(columns) * width for rows, columns in size.without(config.skip).linears)


def shortage(
    config: PruneConfig, model: ModelConfig, size: ModelSize, num_processes: int = 1
) -> tuple[str, str] | None:
    """Why pruning cannot run in the memory that is free here, and what would fit; None if it can."""
    free = free_memory(model.device)
    on_gpu = resolve_device(model.device).type == "cuda"
    # processes here, which share the CPU's memory and have a GPU each; those of a dry run are to be here
    sharing = processes.num_local_processes() if processes.num_processes() > 1 else num_processes
    if not on_gpu:
        free //= sharing
    elif not size.streamed:  # it lies in the CPU's memory whole, and its blocks come to the GPU one at a time
        needed, free_beside = RUNTIME + size.num_bytes, available_memory() // sharing
        if needed > free_beside:
            return (f"prune reads {model.path} whole, about {gib(needed)} of the CPU's memory; {gib(free_beside)} are "
                    "free.", "Give it as unquantised safetensors, which are read block by block.")  # fmt: skip
        size = replace(size, streamed=True)
    parts = memory_parts(config, size, num_processes)
    offload, hidden = config.calibration.offload, parts["hidden_states"]
    if (offload == "cpu" and on_gpu) or (offload == "auto" and hidden > free / 2):
        parts["hidden_states"] = 0  # they will be kept elsewhere
    needed = RUNTIME + sum(parts.values())
    if needed <= free:
        return None
    largest = ", ".join(
        f"{name.replace('_', ' ')} {gib(parts[name])}"
        for name in sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    )
    fits = [
        words for words, other in _smaller(config, num_processes) if needs(other, size, num_processes).memory <= free
    ]
    hint = f"This would fit: {fits[0]}" if fits else "Nothing that keeps the result would fit: use a larger machine."
    return f"prune needs about {gib(needed)} of memory, {gib(free)} are free ({largest}).", hint


def _smaller(config: PruneConfig, num_processes: int) -> list[tuple[str, PruneConfig]]:
    """Settings of the same result, or nearly so, that need less memory: what to write, and the config with it."""
    calibration = config.calibration
    on_disk = replace(config, calibration=replace(calibration, offload="disk"))
    one, word = replace(on_disk, calibration=replace(on_disk.calibration, batch_size=1)), "calibration.batch_size=1"
    if config.reconstruct_epochs:
        one, word = replace(on_disk, reconstruct_batch_size=num_processes), f"reconstruct_batch_size={num_processes}"
    found = [("calibration.offload=disk", on_disk), (f"calibration.offload=disk {word}", one)]
    if config.sequential:
        words = f"calibration.offload=disk {word} true_sequential=false"
        found.append((words, replace(one, true_sequential=False)))
    return found


def calibration_tokens(config: PruneConfig, size: ModelSize) -> tuple[int, int]:
    """Tokens of all calibration samples, and of one batch."""
    calibration = config.calibration
    samples, length = _stored_tokens(calibration.dataset) or (DEFAULT_SAMPLES, min(DEFAULT_LENGTH, size.max_length))
    samples, length = calibration.num_samples or samples, calibration.sequence_length or length
    together = config.reconstruct_batch_size if config.reconstruct_epochs else calibration.batch_size
    return samples * length, min(samples, together) * length


def _stored_tokens(dataset: str) -> tuple[int, int] | None:
    """(samples, tokens) of a pre-tokenised file, from its header; None for other sources."""
    path = Path(os.path.expanduser(dataset))
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        samples, length = json.loads(header)["input_ids"]["shape"]
    except (ValueError, KeyError, TypeError):  # said when it is read
        return None
    return samples, length


def distinct_inputs(size: ModelSize) -> list[int]:
    """The widths of the inputs that the linears of the largest block read, each input once.

    Of those that are `hidden_size` wide there are three (attention's, its output's, the MLP's).
    """
    experts = [columns for _, columns, expert in size.block if expert]
    narrow = [columns for _, columns, expert in size.block if not expert and columns == size.hidden_size]
    others = [columns for _, columns, expert in size.block if not expert and columns != size.hidden_size]
    return [*experts, *narrow[:3], *others]


def _statistics(config: PruneConfig, size: ModelSize) -> int:
    """The sums of a block, one for each input: of all of them, or with `true_sequential` of the widest."""
    if statistics_kind(config) == "norm":
        return 0
    inputs = distinct_inputs(size.without(config.skip))
    alone = config.sequential and not any(expert for *_, expert in size.block)
    return FLOAT * (max(inputs) ** 2 if alone else sum(columns**2 for columns in inputs))


def _solver(config: PruneConfig, size: ModelSize) -> int:
    most = 0
    for columns in {columns for _, columns, _ in size.block}:
        rows = max(rows for rows, other, _ in size.block if other == columns)
        stacked = 2 * rows if columns == size.hidden_size else rows  # gate and up are solved together
        matrices = max(MATRICES.get(config.method, 0), 1 if config.refit else 0)
        stacks = max(STACKS.get(config.method, 3), 7 if config.refit else 0)
        if config.quantize:
            matrices, stacks = max(matrices, 2), stacks + (5 if config.method == "admm" else 1)
        most = max(most, FLOAT * (matrices * columns**2 + stacks * stacked * columns))
    return most


def operations(config: PruneConfig, size: ModelSize) -> float:
    """Floating-point operations: forwards, sums XᵀX, and what a solver sweeps over."""
    if statistics_kind(config) == "none":
        return 2.0 * size.num_parameters
    tokens, _ = calibration_tokens(config, size)
    length = config.calibration.sequence_length or min(DEFAULT_LENGTH, size.max_length)
    total = (1 if config.sequential else 2) * forward(size, tokens, length, head=False)
    if config.layer_sparsity == "owl":  # outliers are counted in the dense model
        total += forward(size, tokens, length, head=False)
    if config.reconstruct_epochs:  # and the dense blocks once
        total += (1 + 3 * config.reconstruct_epochs) * forward(size, tokens, length, head=False)
    if statistics_kind(config) == "hessian":
        size = size.without(config.skip)
        routed = sum(expert for *_, expert in size.block)  # inputs, which come first
        total += size.num_blocks * sum(
            2.0 * tokens * (size.expert_share if place < routed else 1) * columns**2 + 2.0 * columns**3
            for place, columns in enumerate(distinct_inputs(size))
        )
        sweeps = 2 * ADMM_ITERATIONS if config.method == "admm" else 1
        if config.refit or (config.quantize and config.method == "admm"):
            sweeps += 2 * REFIT_ITERATIONS + (2 * DESCENT_PASSES if config.quantize else 0)
        total += sweeps * sum(1.0 * rows * columns**2 for rows, columns in size.linears)
    return total
