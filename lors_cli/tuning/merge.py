"""Adapters merged into their sparse base, zeros kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lors_cli.errors import MissingError, SparsityError, UsageError
from lors_cli.files import hashes, records
from lors_cli.machine import environment
from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
from lors_cli.models.sources import model_fingerprint
from lors_cli.output import console, progress
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.adapter import WEIGHTS_NAME, load_adapter, read_adapter_config
from lors_cli.tuning.attach import adapter_layers
from lors_cli.tuning.norms import merge_norms


@dataclass
class MergeCounts:
    """What a merge did to the weights that the base keeps."""

    kept: int = 0
    moved: int = 0
    zeroed: int = 0


def merge_adapters(model: PreTrainedModel) -> int:
    """`merge_counted`; how many kept weights became exactly zero."""
    return merge_counted(model).zeroed


def merge_counted(model: PreTrainedModel) -> MergeCounts:
    """Replace every layer with an adapter by an ordinary linear with the merged weight, in place; norms likewise.

    Raises:
        SparsityError: a zero of the base became non-zero, by a method that keeps zeros.
    """
    counts = MergeCounts()
    layers = adapter_layers(model)
    with progress.progress("merge", len(layers), "layers") as task:
        for name, layer in layers.items():
            linear = layer.to_linear()
            if not bool(torch.isfinite(linear.weight).all()):
                raise UsageError(f"the merged weight of {name} holds NaN or Inf; the adapter is broken.")
            base = layer.weight
            kept = base != 0
            if layer.keeps_zeros and bool(((linear.weight != 0) & ~kept).any()):
                raise SparsityError(f"merging would fill zeros of {name}; nothing was written.")
            counts.kept += int(kept.sum())
            counts.moved += int(((linear.weight != base) & kept).sum())
            counts.zeroed += int(((linear.weight == 0) & kept).sum())
            model.set_submodule(name, linear)
            task.advance()
    merge_norms(model)
    return counts


def merge(
    base_path: str, adapter: Path, out: Path, *, dtype: str = "auto", device: str = "auto", revision: str = "main",
    add_bos_token: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`lors merge`: the masked merge of a saved adapter into its sparse base, as a checkpoint; counts for the user."""
    started = time.monotonic()
    if not adapter.is_dir():
        raise MissingError(f"No adapter folder at {adapter}.")
    config = read_adapter_config(adapter)
    source = ModelConfig(path=base_path, dtype=dtype, device=device, revision=revision,  # type: ignore[arg-type]
                         add_bos_token=add_bos_token)  # fmt: skip
    fingerprint = model_fingerprint(source)
    if fingerprint != config.base_fingerprint:
        console.detail("  the base's fingerprint differs from training time; its zeros are compared instead")
    tokenizer = load_tokenizer(source)
    model = load_adapter(load_model(source), adapter)
    metrics = {"layers_merged": len(config.layers), "zeroed": merge_adapters(model)}
    save_checkpoint(model, tokenizer, records.staging_dir(out))
    inputs = {"model": fingerprint, "adapter": hashes.file_sha256(adapter / WEIGHTS_NAME)}
    record = records.StageRecord(
        "merge", hashes.fingerprint("merge", 1, {}, inputs), {"adapter": str(adapter)}, inputs, metrics,
        environment.environment(), round(time.monotonic() - started, 2), {},
    )  # fmt: skip
    records.publish(out, record)
    return metrics
