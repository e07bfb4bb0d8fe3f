"""Adapters merged into their sparse base, zeros kept."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lors_cli.errors import MissingError, SparsityError, UsageError
from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.card import model_card
from lors_cli.models.grids import save_grids
from lors_cli.models.inspection import dense_layers, layer_patterns
from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
from lors_cli.models.origins import inherited, with_dataset
from lors_cli.output import progress
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import Pattern, measure, summarise
from lors_cli.tuning.adapter import WEIGHTS_NAME, base_of, load_adapter, read_adapter_config
from lors_cli.tuning.attach import adapter_layers
from lors_cli.tuning.grids import base_grids, grid_metrics, kept_grids
from lors_cli.tuning.kernels.on_grid import lies_on
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.norms import merge_norms
from lors_cli.tuning.prompt_format import fit_to_prompt


@dataclass
class MergeCounts:
    """What a merge did to the weights that the base keeps."""

    kept: int = 0
    moved: int = 0
    zeroed: int = 0


def merge_counted(model: PreTrainedModel) -> MergeCounts:
    """Replace every layer with an adapter by an ordinary linear with the merged weight, in place; norms likewise.

    Raises:
        SparsityError: a zero of the base became non-zero, by a method that keeps zeros.
    """
    counts = MergeCounts()
    layers = adapter_layers(model)
    with progress.progress("merge", len(layers), "layers") as task:
        for name, layer in layers.items():
            merge_layer(model, name, layer, counts)
            task.advance()
    merge_norms(model)
    return counts


def merge_layer(model: PreTrainedModel, name: str, layer: AdapterLinear, counts: MergeCounts) -> None:
    """Replace one layer with an adapter as `merge_counted` does, and add it to the counts."""
    linear = layer.to_linear()
    if not all(bool(torch.isfinite(part).all()) for part in (linear.weight, layer.lora_A, layer.lora_B)):
        raise UsageError(f"the merged weight of {name} holds NaN or Inf; the adapter is broken.")
    base = layer.weight
    kept = base != 0
    if layer.keeps_zeros and bool(((linear.weight != 0) & ~kept).any()):
        raise SparsityError(f"merging would fill zeros of {name}; nothing was written.")
    assert layer.grid is None or lies_on(linear.weight, layer.grid), f"{name} left its grid"
    counts.kept += int(kept.sum())
    counts.moved += int(((linear.weight != base) & kept).sum())
    counts.zeroed += int(((linear.weight == 0) & kept).sum())
    model.set_submodule(name, linear)


def merge(
    base_path: str, adapter: Path, out: Path, *, dtype: str = "auto", device: str = "auto", revision: str = "main",
    add_bos_token: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`lors merge`: the masked merge of a saved adapter into its sparse base, as a checkpoint; counts for the user."""
    started = time.monotonic()
    if not adapter.is_dir():
        raise MissingError(f"No adapter folder at {adapter}.")
    config = read_adapter_config(adapter)
    given = ModelConfig(path=base_path, dtype=dtype, device=device, revision=revision,  # type: ignore[arg-type]
                        add_bos_token=add_bos_token)  # fmt: skip
    source, fingerprint = base_of(config, given)
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    base = records.read_record(Path(base_path))
    patterns: dict[str, Pattern | None] = {**layer_patterns(prunable_weights(model), base)}
    load_adapter(model, adapter)
    grids = kept_grids(base_grids(source), quantization_aware=config.base_grid is not None)
    counts = {"layers_merged": len(config.layers), "zeroed": merge_counted(model).zeroed}
    weights = prunable_weights(model)
    layers = [measure(name, weights[name].matrix, pattern) for name, pattern in patterns.items()]
    method = {key: getattr(config, key) for key in ("method", "rank", "alpha", "use_rslora")}
    method |= {"quantization_aware": True} if grids else {}
    pattern = next(iter(patterns.values()), None)
    dense = dense_layers(base)
    metrics = {**counts, **summarise(layers, pattern), **grid_metrics(grids, layers, pattern, weights),
               **({"dense_layers": dense} if dense else {}),
               **fit_to_prompt(model, tokenizer, config.prompt), "adapter": method}  # fmt: skip
    staging = records.staging_dir(out)
    save_checkpoint(model, tokenizer, staging)
    if grids:
        save_grids(staging, grids)
    settings = {key: value for key, value in asdict(config).items() if not key.startswith("base")}
    inputs = {"model": fingerprint, "adapter": hashes.file_sha256(adapter / WEIGHTS_NAME),
              "adapter_settings": hashes.fingerprint("adapter", 1, settings, {})}  # fmt: skip
    record = records.StageRecord(
        "merge", hashes.fingerprint("merge", 1, {}, inputs), {"adapter": str(adapter)}, {**inputs, "path": base_path},
        metrics, environment.environment(), round(time.monotonic() - started, 2), {},
    )  # fmt: skip
    write_card(staging, source, fingerprint, method, metrics)
    records.publish(out, record)
    return metrics


def write_card(
    staging: Path, base: ModelConfig, fingerprint: str, tune: dict[str, Any], metrics: dict[str, Any],
    data_fingerprints: Iterable[str] = (),
) -> None:  # fmt: skip
    """The model card of what was made from a base; what that is a model of, and how it was pruned, says its record.

    Args:
        fingerprint: the base's.
        tune: settings of the training, as far as they are known.
    """
    record, fields = records.read_record(Path(base.path)), inherited(base)
    for each in data_fingerprints:
        fields = with_dataset(fields, each)
    card = model_card(
        base_model=record.inputs.get("path", base.path) if record else base.path,
        prune=record.config if record and record.stage == "prune" else None, tune=tune, metrics=metrics,
        environment=environment.environment(), fields=fields,
        fingerprint=str(record.inputs.get("model")) if record else fingerprint,
    )  # fmt: skip
    atomic.write_text(staging / records.CARD_NAME, card)
