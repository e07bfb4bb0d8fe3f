"""Put adapters on a sparse model, save and load them, and merge them into the weights.

On disk an adapter looks like PEFT's, but names its type by its method (LORS, SQFT, SPP, LORS_HIRA): stock PEFT would
merge it densely without a word, so it must not take it for LoRA. Only an adapter that is LoRA says LORA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.data.prompts import TEMPLATES
from lors_cli.errors import UsageError, require_file
from lors_cli.files import atomic
from lors_cli.grid import Grid
from lors_cli.models.grids import load_grids, save_grids
from lors_cli.models.sources import model_fingerprint, settings_in
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.attach import adapter_layers, adapter_parameters, adapter_tensors, attach, base_mask
from lors_cli.tuning.baselines import LAYERS
from lors_cli.tuning.grids import grid_digest
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.norms import train_norms

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
MAX_RANK, MAX_ALPHA = 1 << 20, 1e9
"""Beyond what any adapter has, and within what can be computed."""


QUANTIZATION_AWARE = "_QA"
"""What the type of an adapter ends in that merges to its base's grid: who does not know that refuses it."""


def peft_type(method: str) -> str:
    """`peft_type` on disk of a `tune.method`: checkpointing changes how a layer is computed, not what.

    PEFT has a HiRA of its own, which would take ours for an untrained one.
    """
    name = method.removesuffix("-gc").upper()
    return "LORS_HIRA" if name == "HIRA" else name


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` holds.

    Args:
        layers: full names of the adapted linears.
        base: the sparse model's path or hub id.
        base_mask: digest of where the adapted weights, and those that no adapter can be put on, are zero.
        norms: full names of the trained parameters of normalisation layers.
        rounding: of merged weights to bfloat16, or to their grid.
        prompt: `data.template` of what was learnt, None of text.
        skipped: full names of the sparse linears that were to have no adapter; their zeros are in `base_mask` too.
        base_grid: digest of the adapted weights and of the grids that they merge to; None without quantization_aware.
        base_dtype: number format that the base was trained in.
    """

    method: str
    rank: int
    alpha: float
    use_rslora: bool
    layers: tuple[str, ...]
    base: str
    base_fingerprint: str
    base_mask: str
    base_dtype: str
    norms: tuple[str, ...] = ()
    rounding: Rounding = "nearest"
    prompt: str | None = None
    skipped: tuple[str, ...] = ()
    base_grid: str | None = None


def save_adapter(model: nn.Module, folder: Path, config: AdapterConfig) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; and the grids that merged weights stay on."""
    from safetensors.torch import save

    atomic.write_bytes(folder / WEIGHTS_NAME, save(adapter_tensors(model), metadata={"format": "pt"}))
    content = {
        "peft_type": peft_type(config.method) + (QUANTIZATION_AWARE if config.base_grid else ""),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.layers),
    }
    if content["peft_type"] != "LORA":  # which PEFT reads, and it warns of keys that it does not know
        content.update(
            base_fingerprint=config.base_fingerprint, base_mask=config.base_mask, base_dtype=config.base_dtype
        )
        if config.prompt is not None:
            content["prompt_format"] = config.prompt
    if config.base_grid:
        content.update(quantization_aware=True, base_grid=config.base_grid)
        save_grids(folder, layer_grids(model))
    if config.rounding != "nearest":
        content["rounding"] = config.rounding
    if config.skipped and content["peft_type"] != "LORA":
        content["skipped_modules"] = list(config.skipped)
    if config.norms:
        content["trained_norms"] = list(config.norms)
    atomic.write_json(folder / CONFIG_NAME, content)


def layer_grids(model: nn.Module) -> dict[str, Grid]:
    """The grids that a model's adapted weights stay on, by the layers' full names."""
    return {name: layer.grid for name, layer in adapter_layers(model).items() if layer.grid is not None}


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of a saved adapter; a UsageError if it is broken, or of a type that fills zeros."""
    path = require_file(folder / CONFIG_NAME, "adapter configuration")
    content = atomic.read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not readable JSON.")
    methods = {peft_type(method): method for method in reversed(LAYERS) if LAYERS[method].keeps_zeros}
    kind = str(content.get("peft_type"))
    if kind.removesuffix(QUANTIZATION_AWARE) not in methods:
        raise UsageError(
            f"{path} is a {kind} adapter, none of {', '.join(sorted(methods))}.",
            "Merging another kind of adapter would fill the zeros; lors merges those that keep them.",
        )
    try:
        found = AdapterConfig(
            method=methods[kind.removesuffix(QUANTIZATION_AWARE)],
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            use_rslora=bool(content["use_rslora"]),
            layers=_names(content["target_modules"]),
            base=str(content["base_model_name_or_path"]),
            base_fingerprint=str(content["base_fingerprint"]),
            base_mask=str(content["base_mask"]),
            base_dtype=content["base_dtype"],
            norms=_names(content.get("trained_norms", [])),
            rounding=content.get("rounding", "nearest"),
            prompt=content.get("prompt_format"),
            skipped=_names(content.get("skipped_modules", [])),
            base_grid=str(content["base_grid"]) if kind.endswith(QUANTIZATION_AWARE) else None,
        )
        if found.base_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"base_dtype is {found.base_dtype!r}, none of bfloat16, float16, float32")
        if found.prompt not in (None, "chat", *TEMPLATES):
            raise ValueError(f"prompt_format is {found.prompt!r}, none of chat, {', '.join(TEMPLATES)}")
        if found.rounding not in get_args(Rounding):
            raise ValueError(f"rounding is {found.rounding!r}, none of {', '.join(get_args(Rounding))}")
        if not 0 < found.rank <= MAX_RANK or not 0 < found.alpha <= MAX_ALPHA:
            raise ValueError(f"no adapter has rank {found.rank} and alpha {found.alpha:g}")
        return found
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path} is not complete: {error}") from error


def _names(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("the names of layers must be a list of texts")
    return tuple(value)


def load_tensors(model: nn.Module, path: Path) -> None:
    """Fill the adapters and trained norms of a model from a file written by `save_adapter`, if it fits the model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(require_file(path, "adapter weights"))
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
    wanted = adapter_tensors(model)
    odd = sorted(set(wanted) ^ set(tensors)) or [key for key in wanted if wanted[key].shape != tensors[key].shape]
    if odd:
        raise UsageError(f"{path} does not fit its configuration, first at {odd[0]}.")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[name])


def base_of(config: AdapterConfig, given: ModelConfig) -> tuple[ModelConfig, str]:
    """The base to load for an adapter, and its fingerprint; that it is another one than in training is said.

    Args:
        given: a base's path and settings. What is as by default becomes what it was in training: number format, BOS
            token, and of the same hub id the commit.
    """
    trained = settings_in(config.base_fingerprint)
    if given.path != config.base:
        trained.pop("revision", None)
    usual = ModelConfig(path=given.path)
    open_ = {key: value for key, value in trained.items() if getattr(given, key) == getattr(usual, key)}
    base = replace(given, **open_)
    if model_fingerprint(replace(base, dtype=trained.get("dtype", "auto"))) != config.base_fingerprint:
        console.info(f"  {given.path} is not what the adapter was trained on, {config.base} as it was then: its zeros "
                     "must be the same, its weights may be others, which the adapter was not made for")  # fmt: skip
    fingerprint = model_fingerprint(base)
    return (replace(base, dtype=config.base_dtype) if base.dtype == "auto" else base), fingerprint  # type: ignore[arg-type]


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a saved adapter on the sparse model it was trained for, in place; another number format is told of.

    Raises:
        UsageError: the base has other layers, or its zeros lie elsewhere; or, of a quantisation-aware adapter, its
            weights are others than those that it was trained on.
        MissingError: the adapter is not there.
    """
    config = read_adapter_config(folder)
    linears = {}
    for name in config.layers:
        try:
            module = base.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise UsageError(f"the adapter in {folder} was made for another model: this one has no linear {name}.")
        linears[name] = module
    if base_mask(base, linears, config.skipped) != config.base_mask:
        raise UsageError(
            f"the adapter in {folder} belongs to another sparse model: the zeros lie elsewhere.",
            f"It was trained on {config.base}; merging it here would not keep what was tuned.",
        )
    dtype = str(base.dtype).removeprefix("torch.")
    if config.base_dtype != dtype:
        console.info(f"  the adapter was trained on weights in {config.base_dtype}, and these are in {dtype}")
    grids = _grids(config, folder, linears)
    attach(base, list(config.layers), config.rank, config.alpha, use_rslora=config.use_rslora, method=config.method,
           rounding=config.rounding, grids=grids, quantization_aware=bool(grids))  # fmt: skip
    try:
        train_norms(base, config.norms)
    except AttributeError as error:
        raise UsageError(f"the adapter in {folder} was made for another model: {error}") from error
    load_tensors(base, folder / WEIGHTS_NAME)
    return base


def _grids(config: AdapterConfig, folder: Path, linears: Mapping[str, nn.Linear]) -> dict[str, Grid]:
    """The grids that a quantisation-aware adapter's merged weights stay on, if these linears are its base's."""
    if config.base_grid is None:
        return {}
    grids, weights = load_grids(folder), {name: linear.weight for name, linear in linears.items()}
    if set(weights) - set(grids) or grid_digest(weights, grids) != config.base_grid:
        raise UsageError(
            f"the quantisation-aware adapter in {folder} belongs on other weights, or on these in another format.",
            f"It was trained on {config.base}, as it is stored; on others its merged weights would be others too.",
        )
    return grids
