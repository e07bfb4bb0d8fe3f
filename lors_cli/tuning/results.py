"""What tuning leaves behind: the adapter, the merged checkpoint and its card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lors_cli.errors import SparsityError
from lors_cli.grid import Grid
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.grids import save_grids
from lors_cli.models.loading import save_checkpoint, save_settings
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.sparsity import Pattern, measure, summarise
from lors_cli.tuning.adapter import AdapterConfig, layer_grids, save_adapter
from lors_cli.tuning.attach import Matrices, adapter_layers, adapter_tensors, mask_of
from lors_cli.tuning.baselines import LAYERS
from lors_cli.tuning.block_merge import BlockMerge
from lors_cli.tuning.grids import grid_digest, grid_metrics, kept_grids
from lors_cli.tuning.merge import merge_counted
from lors_cli.tuning.norms import norm_shifts

ADAPTER_NAME = "adapter"
ALMOST_NONE = 0.001
"""Share of the kept weights: where fewer move, training has done nothing."""


def adapter_config(
    config: TuneConfig, network: PreTrainedModel, layers: list[str], model: ModelConfig, base_fingerprint: str,
    prompt: str | None, pruned: Iterable[str], source: BlockwiseModel | None = None,
) -> AdapterConfig:  # fmt: skip
    """What adapter_config.json says of this training.

    Args:
        pruned: the names of all sparse weights.
        source: what a model in shards is read from.
    """
    skipped = tuple(name for name in pruned if name not in layers) if config.skip else ()
    adapted, grids = adapter_layers(network), layer_grids(network)
    weights = prunable_weights(network) if source is None else source.weights()
    matrices = Matrices(adapted, lambda name: adapted[name].weight if source is None else weights[name].matrix)
    return AdapterConfig(
        method=config.method, rank=config.rank, alpha=config.alpha, use_rslora=config.use_rslora,
        layers=tuple(layers), base=model.path,
        base_fingerprint=base_fingerprint, base_mask=mask_of(matrices, weights, skipped),
        base_dtype=str(network.dtype).removeprefix("torch."),
        norms=tuple(norm_shifts(network)), rounding=config.weight_rounding,
        prompt=prompt,
        skipped=skipped,
        base_grid=grid_digest(matrices, grids) if grids else None,
    )  # fmt: skip


def write_results(
    staging: Path, network: PreTrainedModel, tokenizer: Any, adapter: AdapterConfig, patterns: dict[str, Pattern],
    grids: Mapping[str, Grid], merging: BlockMerge | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Adapter and merged checkpoint into `staging`, which is for use if the merged weights keep the zeros.

    Args:
        grids: of the base, where it lies on such.
        merging: of a model in shards.
    """
    trainable = sum(tensor.numel() for tensor in adapter_tensors(network).values())
    save_adapter(network, staging / ADAPTER_NAME, adapter)
    held: dict[str, Pattern | None] = {**patterns}
    if not LAYERS[adapter.method].keeps_zeros:
        console.warn(f"method: {adapter.method} fills the zeros when it is merged: the tuned model is dense.")
        held = dict.fromkeys(patterns)
    if merging is None:
        counts, weights = merge_counted(network), prunable_weights(network)
        layers = [measure(name, weights[name].matrix, pattern) for name, pattern in held.items()]
    else:
        save_settings(merging.source.network, tokenizer, staging)
        layers = merging.write(staging, held)
        counts, weights = merging.counts, merging.source.weights()
    moved = counts.moved / counts.kept
    if moved < ALMOST_NONE:
        console.warn(f"{100 * moved:.2g} % of the weights moved: learning_rate is too low for {adapter.method}.")
    if counts.zeroed:
        console.info(f"  {counts.zeroed} kept weights became exactly zero in the merge")
    pattern = next(iter(held.values()))
    summary = summarise(layers, pattern)
    if summary["violations"]:
        raise SparsityError(
            f"the merged model breaks {pattern} at {summary['violations']} places; nothing was written."
        )
    if merging is None:
        save_checkpoint(network, tokenizer, staging)
    grids = kept_grids(grids, quantization_aware=adapter.base_grid is not None)
    if grids:
        save_grids(staging, grids)
    return {**summary, "trainable_parameters": trainable, "zeroed": counts.zeroed, "moved": round(moved, 6),
            "base_mask": adapter.base_mask,
            **({"skipped_layers": list(adapter.skipped)} if adapter.skipped else {}),
            **grid_metrics(grids, layers, pattern, weights)}  # fmt: skip
