"""The packing stage: `pack_model` writes a smaller copy of a sparse checkpoint, a tensor at a time."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment
from lors_cli.models.needs import RECORDS, RUNTIME, Estimate
from lors_cli.models.packed.measured import unpackable
from lors_cli.models.quantised import PACKED
from lors_cli.output import console, progress
from lors_cli.output.console import counted, gib
from lors_cli.sparsity import LayerSparsity, summarise

if TYPE_CHECKING:
    from lors_cli.models.packed.checkpoint import Checkpoint
    from lors_cli.models.packed.plan import PackPlan
    from lors_cli.models.size import ModelSize
    from lors_cli.recipe.packing import PackConfig
    from lors_cli.recipe.schema import ModelConfig

STAGE_VERSION = 1
PLAN_NAME = "plan.json"


def stage_fingerprint(config: PackConfig, model_fingerprint: str, data_dir: Path | None) -> str:
    """The fingerprint of `pack`'s result; cheap, no model is loaded."""
    return hashes.fingerprint("pack", STAGE_VERSION, config, {"model": model_fingerprint})


def stage_inputs(config: PackConfig, model_fingerprint: str, data_dir: Path | None) -> dict[str, Any]:
    """What a result is made from beside its settings: the model, and the version of the code."""
    return {"model": model_fingerprint, "version": STAGE_VERSION}


def pack_model(
    config: PackConfig, model: ModelConfig, out: Path, *, data_dir: Path | None = None
) -> records.StageRecord:
    """Write a packed copy of a sparse causal LM; an interrupted call resumes at the last file that it wrote.

    Args:
        model: any sparse checkpoint in safetensors, N:M or unstructured; its `dtype: auto` is as it is stored.
        out: stage folder.

    Returns:
        The stage's record; its metrics hold the pattern, sizes in bytes before and after, and what stays dense.

    Raises:
        UsageError: the model is dense, packed already, or not in safetensors.
    """
    from lors_cli.models.packed.card import packed_card
    from lors_cli.models.packed.checkpoint import Checkpoint, packed_tensors, step_by_step
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.models.tensor_files import write_checkpoint

    started = time.monotonic()
    base = model_fingerprint(model)
    fingerprint = stage_fingerprint(config, base, data_dir)
    console.info(f"  model: {model.path}")
    source = Checkpoint(model)
    inputs = {**stage_inputs(config, base, data_dir), "path": model.path}
    work = records.work_dir(out, fingerprint, {"config": config, "inputs": inputs})
    plan = _planned(source, work)
    _say_dense(plan, source)
    tensors = list(packed_tensors(source, plan))
    with progress.progress("pack", len(tensors), "tensors") as task:
        names = write_checkpoint(work, step_by_step(tensors, task), max_shard_size=source.shard_size, goes_on=True,
                                 metadata={"quant_method": PACKED})  # fmt: skip
    staging = records.staging_dir(out)
    source.copy_settings(staging, _quantization(plan, source))
    for name in names:
        os.replace(work / name, staging / name)
    metrics = _metrics(plan, source, sum(entry.num_bytes for entry, _ in tensors))
    found = environment.environment()
    atomic.write_text(staging / records.CARD_NAME, packed_card(model, source.folder, metrics, found))
    console.info(f"  {plan.pattern}{_grid_in_words(metrics)}: {gib(metrics['bytes_before'])} → {gib(metrics['bytes'])}")
    record = records.StageRecord(
        "pack", fingerprint, hashes.plain(config), inputs, metrics,
        found, round(time.monotonic() - started, 2), {},
    )  # fmt: skip
    return records.publish(out, record)


def foreseen_size(model: ModelConfig) -> str:
    """What packing will make of a model's size, by its record or else by the zeros of its files.

    Raises:
        UsageError: it is dense, packed already, not in safetensors, or a weight does not lie on its grid.
    """
    from lors_cli.models.packed.checkpoint import Checkpoint
    from lors_cli.models.packed.format import packed_bytes
    from lors_cli.models.packed.plan import recorded_kept

    source = Checkpoint(model)
    record = None if source.specs else records.read_record(source.folder)  # which may have left their grids
    kept = recorded_kept(record, source.shapes) or _plan(source).modules
    before = after = source.num_bytes
    for name, values in kept.items():
        (rows, columns), itemsize = source.shapes[name], source.entry(source.keys[name]).dtype.itemsize
        after += packed_bytes(values, rows, columns, itemsize, source.specs.get(name)) - rows * columns * itemsize
    left = f"; {unpackable(source.plain)}" if source.plain else ""
    return f"{gib(before)} → {gib(after)}, {after / before:.1%}; {counted(len(kept), 'linear')} packed{left}"


def _quantization(plan: PackPlan, source: Checkpoint) -> dict[str, Any]:
    """`quantization_config`: of version 1 where no weight lies on a grid."""
    from lors_cli.models.packed.format import GRID_VERSION, VERSION

    said = {"quant_method": PACKED, "version": VERSION, "pattern": plan.pattern, "modules": plan.modules}
    if not source.specs:
        return said
    floats = [name for name in plan.modules if name not in source.specs]
    more = {"floats": floats} if floats else {}
    return {**said, "version": GRID_VERSION, **asdict(next(iter(source.specs.values()))), **more}


def needs(config: PackConfig, size: ModelSize) -> Estimate:
    """Libraries and the largest weight a few times over; on disk at most the model again."""
    largest = max((rows * columns for rows, columns in size.linears), default=0)
    largest = max(largest, size.vocab_size * size.hidden_size)
    return Estimate(RUNTIME + 4 * largest * size.bytes_a_weight, size.num_bytes + RECORDS)


def _planned(source: Checkpoint, work: Path) -> PackPlan:
    """What is packed: as an interrupted call found it, or found now."""
    from lors_cli.models.packed.plan import PackPlan

    known = atomic.read_json(work / PLAN_NAME)
    if isinstance(known, dict):
        return PackPlan(**{**known, "shapes": {name: tuple(shape) for name, shape in known["shapes"].items()}})
    plan = _plan(source)
    atomic.write_json(work / PLAN_NAME, asdict(plan))
    return plan


def _plan(source: Checkpoint) -> PackPlan:
    from lors_cli.models.packed.plan import plan_packing

    record = records.read_record(source.folder)
    said = record.metrics.get("pattern") if record else None
    return plan_packing(source.path, source.keys, lambda name: source.read(source.keys[name]), said,
                        source.grids, source.plain)  # fmt: skip


def _say_dense(plan: PackPlan, source: Checkpoint) -> None:
    if plan.dense:
        console.info(f"  {counted(len(plan.dense), 'linear')} with too few zeros stay dense, first {plan.dense[0]}")
    if source.plain:
        console.info(f"  {unpackable(source.plain)}")


def _metrics(plan: PackPlan, source: Checkpoint, num_bytes: int) -> dict[str, Any]:
    layers = [LayerSparsity(name, shape, shape[0] * shape[1] - plan.nonzeros[name], 0)
              for name, shape in plan.shapes.items()]  # fmt: skip
    summary = {**summarise(layers, None), "pattern": plan.pattern}
    return {
        **summary, **_bits(plan, source), "bytes": num_bytes, "bytes_before": source.num_bytes,
        "left_dense": plan.dense, **({"left_plain": source.plain} if source.plain else {}),
    }  # fmt: skip


def _bits(plan: PackPlan, source: Checkpoint) -> dict[str, Any]:
    """Of codes: the grid, and what a weight of the packed linears takes."""
    from lors_cli.models.packed.format import packed_bytes

    if not source.specs:
        return {}
    packed = sum(packed_bytes(stored, *plan.shapes[name], source.entry(source.keys[name]).dtype.itemsize,
                              source.specs.get(name)) for name, stored in plan.modules.items())  # fmt: skip
    bits = 8 * packed / sum(rows * columns for rows, columns in plan.shapes.values())
    return {"quantize": asdict(next(iter(source.specs.values()))), "bits_a_weight": round(bits, 4)}


def _grid_in_words(metrics: dict[str, Any]) -> str:
    grid = metrics.get("quantize")
    if grid is None:
        return ""
    return f", {grid['bits']} bits in groups of {grid['group_size']}, {metrics['bits_a_weight']:.2f} bits a weight"
