"""The pruning stage: `prune` turns a dense checkpoint into a sparse one, block by block.

A file for each method (pure maths), `methods` for the dict of them, `driver` for the walk through the blocks, `block`
for what happens to one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import SparsityError, UsageError
from lors_cli.files import atomic, hashes, records
from lors_cli.grid import packed_metrics
from lors_cli.machine import environment, processes
from lors_cli.output import console, progress
from lors_cli.pruning.facts import grid_spec, statistics_kind
from lors_cli.recipe.resolved import resolved_prune
from lors_cli.sparsity import Pattern, summarise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lors_cli.models.blocks import PrunableWeight
    from lors_cli.models.streaming import BlockwiseModel
    from lors_cli.models.tensor_files import Entry
    from lors_cli.pruning.walk.driver import Outcome
    from lors_cli.recipe.schema import ModelConfig, PruneConfig

STAGE_VERSION = 3
RECONSTRUCTION_VERSION = 5
"""Of blocks that are reconstructed: at 4 towards what the dense block makes of the pruned ones' outputs."""


def stage_fingerprint(config: PruneConfig, model_fingerprint: str, data_dir: Path | None) -> str:
    """The fingerprint of `prune`'s result from that of the dense model; cheap, no model is loaded."""
    return hashes.fingerprint("prune", *_identity(config, model_fingerprint, data_dir))


def stage_inputs(config: PruneConfig, model_fingerprint: str, data_dir: Path | None) -> dict[str, Any]:
    """What a result is made from beside its settings: fingerprints of what is read, and the version of the code."""
    version, _, inputs = _identity(config, model_fingerprint, data_dir)
    return {**inputs, "version": version}


def _identity(
    config: PruneConfig, model_fingerprint: str, data_dir: Path | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The version of the code, the settings and the inputs that make a result what it is."""
    settings = {**asdict(config), "sparsity": Pattern.of(config).sparsity, "true_sequential": config.sequential}
    del settings["calibration"]["offload"]
    for key in ("skip", "quantize"):  # earlier versions had none
        if not settings[key]:
            del settings[key]
    if config.quantize and config.method == "admm":  # which ends in it
        settings["refit"] = False
    if config.reconstruct_epochs:
        del settings["calibration"]["batch_size"]
    else:
        del settings["reconstruct_batch_size"]
    inputs = {"model": model_fingerprint}
    if statistics_kind(config) == "none":
        del settings["calibration"]
    else:
        for key in ("dataset", "split", "columns"):  # in the text's fingerprint
            del settings["calibration"][key]
        inputs["calibration"] = _text_fingerprint(config, data_dir)
    return RECONSTRUCTION_VERSION if config.reconstruct_epochs else STAGE_VERSION, settings, inputs


def prune(
    config: PruneConfig, model: ModelConfig | str | Path, out: Path | str, *, data_dir: Path | str | None = None
) -> records.StageRecord:
    """Prune a causal LM and write the sparse checkpoint; an interrupted call resumes at its last block.

    Blocks are read, pruned and written one at a time; the model is never in memory whole (a .gguf is). Under
    torchrun the calibration samples are shared out, and process 0 writes.

    Args:
        config: method, pattern, calibration.
        model: dense; a folder or hub id, or its settings.
        out: stage folder, which all processes see.
        data_dir: local datasets; default `$LORS_DATA_DIR`, else the hub.

    Returns:
        The stage's record; its metrics hold sparsity and pattern of every pruned weight.

    Raises:
        SparsityError: a weight came out denser than promised; nothing is published.
        UsageError: the model or one of its weights cannot be pruned so, or `out` is the model itself.
    """
    from lors_cli.models.blocks import left_out, prunable_weights
    from lors_cli.models.loading import load_tokenizer
    from lors_cli.models.skip import say_skipped, skipped
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.models.streaming import open_blockwise
    from lors_cli.pruning.walk.driver import prune_blocks
    from lors_cli.recipe.schema import ModelConfig

    model, out, data_dir = ModelConfig.of(model), Path(out), Path(data_dir) if data_dir else None
    started, pattern = time.monotonic(), Pattern.of(config)
    _check(model, out)
    base_fingerprint = model_fingerprint(model)
    version, settings, read = _identity(config, base_fingerprint, data_dir)
    fingerprint = hashes.fingerprint("prune", version, settings, read)
    inputs = {**read, "version": version, "path": model.path}
    console.info(f"  model: {model.path}")
    with progress.busy("reading the tokenizer"):
        tokenizer = load_tokenizer(model)
    source = open_blockwise(model)
    check_shared(config, processes.num_processes())
    if config.reconstruct_epochs and str(source.network.dtype) == "torch.float16":
        raise UsageError("reconstruct_epochs: gradients do not fit into float16.", "Set dtype=bfloat16 for the model.")
    weights = prunable_weights(source.network)
    dense = skipped(config.skip, weights)
    for name, weight in weights.items():
        if name not in dense:
            pattern.check_shape(name, weight.shape)
    say_skipped(dense, "stay dense")
    parts = left_out(source.network)
    if parts:
        console.info(f"  left as they are: {', '.join(parts)}")
    batches = _calibration_batches(config, source, tokenizer, data_dir)
    with processes.joined():
        if processes.is_main():
            _work_dir(out, fingerprint, {"config": resolved_prune(config), "inputs": inputs}, str(source.network.dtype))
        processes.wait_for_all()
        outcome = prune_blocks(config, source, pattern, out / records.WORK_NAME, batches)
        metrics = _metrics(outcome, pattern, source, batches)
        metrics |= _bits(config, outcome, pattern, source, weights)
        metrics |= {key: names for key, names in (("left_out", parts), ("dense_layers", dense)) if names}
        if batches:
            metrics["calibration"]["source"] = inputs["calibration"]
        record = records.StageRecord(
            "prune", fingerprint, hashes.plain(resolved_prune(config)), inputs, metrics,
            environment.environment(), round(outcome.earlier_s + time.monotonic() - started, 2), {},
        )  # fmt: skip
        if processes.is_main():
            _write_checkpoint(out, source, tokenizer, config, model, base_fingerprint, metrics)
            record = records.publish(out, record)
        return record


def check_shared(config: PruneConfig, num_processes: int) -> None:
    """Refuse steps of reconstruction that have fewer samples than there are processes.

    Raises:
        UsageError: so it is.
    """
    if config.reconstruct_epochs and config.reconstruct_batch_size < num_processes:
        raise UsageError(
            f"reconstruct_batch_size: steps of {config.reconstruct_batch_size} cannot be shared by "
            f"{num_processes} processes.",
            f"Give a reconstruct_batch_size of {num_processes} or more.",
        )


def _work_dir(out: Path, fingerprint: str, made: dict[str, Any], dtype: str) -> None:
    """The work folder, emptied if what lies there is in another number format: `dtype: auto` is the machine's."""
    work = records.work_dir(out, fingerprint, made)
    begun = atomic.read_json(work / records.DTYPE_NAME)
    if begun not in (None, dtype):
        console.warn(f"the interrupted call computed in {begun}, this one in {dtype}: pruning begins anew.")
        shutil.rmtree(work)
        records.work_dir(out, fingerprint, made)
    atomic.write_json(work / records.DTYPE_NAME, dtype)


def _text_fingerprint(config: PruneConfig, data_dir: Path | None) -> str:
    from lors_cli.data.sources import fingerprint_source

    text = config.calibration
    return fingerprint_source(text.dataset, split="train", data_dir=data_dir, columns=text.columns, chosen=text.split)


def _check(model: ModelConfig, out: Path) -> None:
    """Refuse what cannot be, before anything is read."""
    if Path(model.path).resolve() == out.resolve():
        raise UsageError(f"{out} is the model itself and would be overwritten.", "Choose another --out.")


def _calibration_batches(
    config: PruneConfig, source: BlockwiseModel, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None
) -> list[torch.Tensor]:
    """The calibration sequences; none for a method that looks at weights alone.

    Of several processes that reconstruct blocks each has a part of every step's.
    """
    from lors_cli.data.tokens import calibration_tokens
    from lors_cli.models.blocks import model_max_length
    from lors_cli.recipe.schema import CalibrationConfig

    if statistics_kind(config) == "none":
        if config.calibration != CalibrationConfig():
            console.info(f"  {config.method} looks at weights alone: calibration is not read")
        return []
    calibration, max_length = config.calibration, model_max_length(source.network)
    with progress.busy(f"tokenising {calibration.dataset}"):
        tokens = calibration_tokens(calibration, tokenizer, model_max_length=max_length, data_dir=data_dir)
    console.info(f"  calibration: {calibration.dataset}, {tokens.shape[0]} × {tokens.shape[1]} tokens")
    if not config.reconstruct_epochs:
        return list(tokens.split(calibration.batch_size))
    number = processes.num_processes()
    steps = tokens.split(config.reconstruct_batch_size)
    first, last = len(steps[0]), len(steps[-1])
    if last < number:
        raise UsageError(
            f"reconstruct_batch_size: steps of {first}, the last of {last}, cannot be shared by {number} processes.",
            f"Give a reconstruct_batch_size of {number} or more that divides the number of samples ({len(tokens)}).",
        )
    return [part for step in steps for part in step.tensor_split(number)]


def _metrics(outcome: Outcome, pattern: Pattern, source: BlockwiseModel, batches: list[torch.Tensor]) -> dict[str, Any]:
    """What stage.json says of the result, which is checked here."""
    broken = [layer for layer in outcome.layers if layer.violations]
    if broken:
        raise SparsityError(
            f"{len(broken)} pruned weights break {pattern}, first {broken[0].name} with "
            f"{broken[0].violations} violations; nothing was written.",
            "This is a fault of the pruning method: please report it with the recipe.",
        )
    off_grid = [name for name, number in outcome.off_grid.items() if number]
    if off_grid:
        raise SparsityError(
            f"{len(off_grid)} quantised weights have values off their grids, first {off_grid[0]} with "
            f"{outcome.off_grid[off_grid[0]]}; nothing was written.",
            "This is a fault of the pruning method: please report it with the recipe.",
        )
    network = source.network
    metrics = {**summarise(outcome.layers, pattern), "dtype": str(network.dtype).removeprefix("torch."),
               "commit": getattr(network.config, "_commit_hash", None)}  # fmt: skip
    if batches:
        num_samples, tokens = sum(len(batch) for batch in batches), sum(batch.numel() for batch in batches)
        metrics["calibration"] = {"num_samples": num_samples, "tokens": tokens, "sequence_length": batches[0].shape[1]}
        metrics["phases_s"] = outcome.phases.rounded()
    if outcome.few_tokens:
        metrics["few_tokens"] = outcome.few_tokens
        _report_few_tokens(outcome.few_tokens)
    return metrics


def _bits(
    config: PruneConfig, outcome: Outcome, pattern: Pattern, source: BlockwiseModel, weights: dict[str, PrunableWeight]
) -> dict[str, Any]:
    """What stage.json says of quantised weights."""
    spec = grid_spec(config)
    if spec is None:
        return {}
    held = [layer.as_packed(pattern) for layer in outcome.layers if weights[layer.name].is_linear]
    return packed_metrics(spec, held, 8 * source.network.dtype.itemsize)


def _report_few_tokens(few_tokens: dict[str, int]) -> None:
    unseen = sum(1 for tokens in few_tokens.values() if not tokens)
    name = min(few_tokens, key=lambda key: few_tokens[key])
    console.warn(
        f"{len(few_tokens)} weights saw fewer calibration tokens than they have inputs, least {name} with "
        f"{few_tokens[name]}; {unseen} saw none and were pruned by magnitude. More calibration samples would help; "
        "stage.json names them all."
    )


def _write_checkpoint(
    out: Path, source: BlockwiseModel, tokenizer: Any, config: PruneConfig, model: ModelConfig,
    base_fingerprint: str, metrics: dict[str, Any],
) -> None:  # fmt: skip
    from lors_cli.models.card import model_card
    from lors_cli.models.grids import save_grids
    from lors_cli.models.loading import MAX_SHARD_SIZE, save_settings
    from lors_cli.models.origins import inherited, with_dataset
    from lors_cli.models.tensor_files import write_checkpoint
    from lors_cli.pruning.walk.driver import block_grids

    staging = records.staging_dir(out)
    save_settings(source.network, tokenizer, staging)
    work = out / records.WORK_NAME
    write_checkpoint(staging, _tensors(source, work), max_shard_size=MAX_SHARD_SIZE)
    if config.quantize:
        save_grids(staging, block_grids(work, len(source.blocks)))
    fields = inherited(model)
    if "calibration" in metrics:
        fields = with_dataset(fields, metrics["calibration"]["source"])
    card = model_card(base_model=model.path, prune=hashes.plain(resolved_prune(config)), tune=None, metrics=metrics,
                      environment=environment.environment(), fields=fields, fingerprint=base_fingerprint)  # fmt: skip
    atomic.write_text(staging / records.CARD_NAME, card)


def _tensors(source: BlockwiseModel, work: Path) -> Iterator[tuple[Entry, Callable[[], torch.Tensor]]]:
    """Every tensor of the pruned checkpoint: those outside the blocks from the dense model, the rest as pruned."""
    from lors_cli.models.tensor_files import saved_tensors
    from lors_cli.pruning.walk.driver import block_file

    yield from source.outer_tensors()
    for index in range(len(source.blocks)):
        yield from saved_tensors(block_file(work, index))
