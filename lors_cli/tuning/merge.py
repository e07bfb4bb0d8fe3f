"""Adapters merged into their sparse base, zeros kept."""

from __future__ import annotations

import time
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


def merge_adapters(model: PreTrainedModel) -> int:
    """Make every layer with an adapter an ordinary linear, in place, norms likewise; how many kept weights became zero.

    Raises:
        SparsityError: a zero of the base became non-zero, by a method that keeps zeros.
    """
    num_lost = 0
    layers = adapter_layers(model)
    with progress.progress("merge", len(layers), "layers") as task:
        for name, layer in layers.items():
            linear = layer.to_linear()
            if not bool(torch.isfinite(linear.weight).all()):
                raise UsageError(f"the merged weight of {name} holds NaN or Inf; the adapter is broken.")
            if layer.keeps_zeros and bool(((linear.weight != 0) & (layer.weight == 0)).any()):
                raise SparsityError(f"merging would fill zeros of {name}; nothing was written.")
            num_lost += int(((linear.weight == 0) & (layer.weight != 0)).sum())
            model.set_submodule(name, linear)
            task.advance()
    merge_norms(model)
    return num_lost


def merge(
    base_path: str, adapter: Path, out: Path, *, dtype: str = "auto", device: str = "auto", revision: str = "main"
) -> dict[str, Any]:  # fmt: skip
    """`lors merge`: the masked merge of a saved adapter into its sparse base, as a checkpoint; counts for the user."""
    started = time.monotonic()
    if not adapter.is_dir():
        raise MissingError(f"No adapter folder at {adapter}.")
    config = read_adapter_config(adapter)
    source = ModelConfig(path=base_path, dtype=dtype, device=device, revision=revision)  # type: ignore[arg-type]
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
