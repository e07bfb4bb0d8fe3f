"""Put adapters on a sparse model, save and load them, and merge them into the weights.

On disk an adapter looks like PEFT's, but names its type by its method (LORS, SQFT, SPP, HIRA): stock PEFT would merge
it densely without a word, so it must not take it for LoRA. Only an adapter that is LoRA says LORA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lors_cli.errors import MissingError, SparsityError, UsageError, require_file
from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment
from lors_cli.models.blocks import prunable_weights
from lors_cli.output import console, progress
from lors_cli.sparsity import mask_digest
from lors_cli.tuning.baselines import LAYERS, check_rank
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import CompressedLorsLinear, LorsLinear
from lors_cli.tuning.norms import merge_norms, norm_shifts, train_norms
from lors_cli.tuning.rounding import Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
MAX_RANK, MAX_ALPHA = 1 << 20, 1e9
"""Beyond what any adapter has, and within what can be computed."""


def peft_type(method: str) -> str:
    """`peft_type` on disk of a `tune.method`: checkpointing changes how a layer is computed, not what.

    Args:
        method: of `LAYERS`.
    """
    return method.removesuffix("-gc").upper()


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` holds.

    Args:
        method: of `tune.method`.
        rank: r.
        alpha: numerator of the scale.
        use_rslora: scale alpha/√r, else alpha/r.
        layers: full names of the adapted linears.
        base: the sparse model's path or hub id.
        base_fingerprint: its fingerprint.
        base_mask: digest of where the adapted weights, and those that no adapter can be put on, are zero.
        norms: full names of the trained parameters of normalisation layers.
        rounding: of merged bfloat16 weights, `nearest` or `stochastic`.
    """

    method: str
    rank: int
    alpha: float
    use_rslora: bool
    layers: tuple[str, ...]
    base: str
    base_fingerprint: str
    base_mask: str
    norms: tuple[str, ...] = ()
    rounding: Rounding = "nearest"


def attach(
    model: nn.Module,
    layers: list[str],
    rank: int,
    alpha: float,
    *,
    use_rslora: bool,
    method: str = "lors",
    compressed: bool = False,
    rounding: Rounding = "nearest",
) -> dict[str, AdapterLinear]:
    """Replace linears by layers with adapters, in place.

    Args:
        model: the sparse model.
        layers: full names of its linears.
        rank: r.
        alpha: numerator of the scale.
        use_rslora: scale alpha/√r, else alpha/r.
        method: of `tune.method`.
        compressed: hold the weights, which must be 2:4, as their kept values; for lors alone.
        rounding: of merged bfloat16 weights; stochastic for lors alone.

    Returns:
        The new layers by name.

    Raises:
        UsageError: the method cannot take this rank, or a weight is not 2:4.
    """
    check_rank(method, rank, (model.get_submodule(name).out_features for name in layers))  # type: ignore[misc]
    layer_class = CompressedLorsLinear if compressed else LAYERS[method]
    adapted = {}
    for name in layers:
        try:
            adapted[name] = layer_class(model.get_submodule(name), rank, alpha, use_rslora=use_rslora)  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(f"base: compressed is for 2:4 weights, and that of {name} is none: {error}") from error
        model.set_submodule(name, adapted[name])
    for layer in adapted.values():
        if isinstance(layer, LorsLinear):
            layer.rounding = rounding
    return adapted


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Every layer with an adapter of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def adaptable_layers(model: PreTrainedModel, pruned: Iterable[str]) -> list[str]:
    """Those of the pruned weights that can have an adapter: linears. Experts and Conv1D stay as they are.

    Args:
        model: the sparse model, without adapters.
        pruned: full names of its pruned weights.

    Raises:
        UsageError: there is none.
    """
    weights = prunable_weights(model)
    layers = [name for name in pruned if isinstance(weights[name].module, nn.Linear)]
    others = [name for name in pruned if not isinstance(weights[name].module, nn.Linear)]
    if not layers:
        kind = type(weights[others[0]].module).__name__
        raise UsageError(f"adapters go on nn.Linear only, and none is sparse here: {others[0]} is a weight of {kind}.")
    if others:
        console.info(
            f"  {len(others)} pruned weights stay as they are, first {others[0]}: adapters go on nn.Linear only"
        )
    return layers


def base_mask(model: PreTrainedModel, layers: dict[str, Any]) -> str:
    """The digest of where a sparse model is zero: in adapted linears, and in what no adapter can be put on.

    Args:
        model: with or without adapters.
        layers: its linears, adapted or not, by full name.
    """
    others = ((name, weight.matrix) for name, weight in prunable_weights(model).items()
              if name not in layers and not isinstance(weight.module, nn.Linear))  # fmt: skip
    return mask_digest(chain(((name, layer.weight) for name, layer in layers.items()), others))


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, on the CPU: adapters under PEFT's names, and shifts of norms."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names on disk."""
    trained = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part)
               for name, layer in adapter_layers(model).items() for part in ("lora_A", "lora_B")}  # fmt: skip
    return trained | {f"{PREFIX}{name}.shift": shift for name, shift in norm_shifts(model).items()}


def save_adapter(model: nn.Module, folder: Path, config: AdapterConfig) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: with adapters.
        folder: made when missing.
        config: written beside the tensors.
    """
    from safetensors.torch import save

    atomic.write_bytes(folder / WEIGHTS_NAME, save(adapter_tensors(model), metadata={"format": "pt"}))
    content = {
        "peft_type": peft_type(config.method),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.layers),
    }
    if content["peft_type"] != "LORA":  # which PEFT reads, and it warns of keys that it does not know
        content.update(base_fingerprint=config.base_fingerprint, base_mask=config.base_mask)
    if config.rounding != "nearest":
        content["rounding"] = config.rounding
    if config.norms:
        content["trained_norms"] = list(config.norms)
    atomic.write_json(folder / CONFIG_NAME, content)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of a saved adapter.

    Raises:
        MissingError: there is none.
        UsageError: it is broken, or of a type that fills zeros.
    """
    path = require_file(folder / CONFIG_NAME, "adapter configuration")
    content = atomic.read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not readable JSON.")
    methods = {peft_type(method): method for method in reversed(LAYERS) if LAYERS[method].keeps_zeros}
    if str(content.get("peft_type")) not in methods:
        raise UsageError(
            f"{path} is a {content.get('peft_type')!s} adapter, none of {', '.join(sorted(methods))}.",
            "Merging another kind of adapter would fill the zeros; lors merges those that keep them.",
        )
    try:
        found = AdapterConfig(
            method=methods[content["peft_type"]],
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            use_rslora=bool(content["use_rslora"]),
            layers=_names(content["target_modules"]),
            base=str(content["base_model_name_or_path"]),
            base_fingerprint=str(content["base_fingerprint"]),
            base_mask=str(content["base_mask"]),
            norms=_names(content.get("trained_norms", [])),
            rounding=_rounding(content),
        )
        if not 0 < found.rank <= MAX_RANK or not 0 < found.alpha <= MAX_ALPHA:
            raise ValueError(f"no adapter has rank {found.rank} and alpha {found.alpha:g}")
        return found
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path} is not complete: {error}") from error


def _rounding(content: dict[str, Any]) -> Rounding:
    """What an adapter's configuration says of rounding."""
    found = content.get("rounding", "nearest")
    if found not in get_args(Rounding):
        raise ValueError(f"rounding is {found!r}, none of {', '.join(get_args(Rounding))}")
    return found


def _names(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("the names of layers must be a list of texts")
    return tuple(value)


def load_tensors(model: nn.Module, path: Path) -> None:
    """Fill the adapters and trained norms of a model from a file written by `save_adapter`.

    Raises:
        UsageError: names or shapes do not fit the model.
    """
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


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a saved adapter on the sparse model it was trained for.

    Args:
        base: a model with the same zeros as at training; changed in place.
        folder: written by `save_adapter`.

    Returns:
        `base` with adapters.

    Raises:
        UsageError: the base has other layers, or its zeros lie elsewhere.
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
    if base_mask(base, linears) != config.base_mask:
        raise UsageError(
            f"the adapter in {folder} belongs to another sparse model: the zeros lie elsewhere.",
            f"It was trained on {config.base}; merging it here would not keep what was tuned.",
        )
    attach(base, list(config.layers), config.rank, config.alpha, use_rslora=config.use_rslora, method=config.method,
           rounding=config.rounding)  # fmt: skip
    try:
        train_norms(base, config.norms)
    except AttributeError as error:
        raise UsageError(f"the adapter in {folder} was made for another model: {error}") from error
    load_tensors(base, folder / WEIGHTS_NAME)
    return base


def merge_adapters(model: PreTrainedModel) -> int:
    """Replace every layer with an adapter by an ordinary linear with the merged weight, in place; norms likewise.

    Args:
        model: with adapters.

    Returns:
        How many kept weights became exactly zero.

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


def merge(base_path: str, adapter: Path, out: Path, *, dtype: str = "auto", device: str = "auto") -> dict[str, Any]:
    """`lors merge`: the masked merge of a saved adapter into its sparse base, as a checkpoint.

    Args:
        base_path: the sparse model.
        adapter: folder written by tuning.
        out: stage folder for the merged checkpoint.
        dtype: of the base, auto for its own.
        device: where to merge.

    Returns:
        Counts for the user: layers, weights that became zero.
    """
    import time

    from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.recipe.schema import ModelConfig

    started = time.monotonic()
    if not adapter.is_dir():
        raise MissingError(f"No adapter folder at {adapter}.")
    config = read_adapter_config(adapter)
    source = ModelConfig(path=base_path, dtype=dtype, device=device)  # type: ignore[arg-type]
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
