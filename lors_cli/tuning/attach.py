"""Adapters onto a sparse model's linears, and the tensors they hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.grid import Grid
from lors_cli.models.blocks import PrunableWeight, left_out, prunable_weights
from lors_cli.models.skip import say_skipped, skipped
from lors_cli.output import console
from lors_cli.recipe.schema import TuneConfig
from lors_cli.sparsity import mask_digest
from lors_cli.tuning.baselines import LAYERS, check_rank
from lors_cli.tuning.grids import check_on_grids
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import PackedLorsLinear
from lors_cli.tuning.norms import norm_parameters, norm_shifts, train_norms

PREFIX = "base_model.model."


def attach(
    model: nn.Module,
    layers: list[str],
    rank: int,
    alpha: float,
    *,
    use_rslora: bool,
    method: str = "lors",
    packed: bool = False,
    rounding: Rounding = "nearest",
    grids: Mapping[str, Grid] | None = None,
    quantization_aware: bool = False,
) -> dict[str, AdapterLinear]:
    """Replace linears by layers with adapters, in place; the new layers by name.

    Args:
        layers: full names of its linears.
        packed: hold the weights packed; for lors alone.
        rounding: of merged weights to bfloat16, stochastic for lors alone, or to their grids.
        grids: that the weights lie on, where they do; held where they are read.
        quantization_aware: round merged weights to their grids; for lors and sqft alone.
    """
    check_rank(method, rank, (model.get_submodule(name).out_features for name in layers))  # type: ignore[misc]
    grids = (grids or {}) if quantization_aware or packed else {}
    if quantization_aware:
        check_on_grids({name: model.get_submodule(name).weight for name in layers}, grids)  # type: ignore[misc]
    layer_class = PackedLorsLinear if packed else LAYERS[method]
    adapted = {}
    for name in layers:
        linear: Any = model.get_submodule(name)
        adapted[name] = layer_class(linear, rank, alpha, use_rslora=use_rslora, grid=grids.get(name))
        model.set_submodule(name, adapted[name])
    for layer in adapted.values():
        layer.rounding, layer.quantization_aware = rounding, quantization_aware
    return adapted


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Every layer with an adapter of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def adaptable_layers(model: PreTrainedModel, pruned: Iterable[str], skip: Sequence[str] = ()) -> list[str]:
    """Those of the pruned weights that can have an adapter: linears. Experts and Conv1D stay as they are.

    Args:
        skip: globs of those that get none.

    Raises:
        UsageError: there is none, or a glob matches nothing.
    """
    weights = prunable_weights(model)
    out = set(skipped(skip, weights)) if skip else set[str]()
    say_skipped([name for name in pruned if name in out], "get no adapter")
    pruned = [name for name in pruned if name not in out]
    if not pruned:
        raise UsageError("skip: every pruned layer is left out, none is left to tune.", "Skip fewer.")
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


class Matrices(Mapping[str, torch.Tensor]):
    """Weights by name, each made, or read, when it is asked for."""

    def __init__(self, names: Collection[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def base_mask(model: PreTrainedModel, layers: dict[str, Any], skipped: Collection[str] = ()) -> str:
    """The digest of where a sparse model is zero: in `layers`, in `skipped`, and in what can have no adapter."""
    return mask_of(Matrices(layers, lambda name: layers[name].weight), prunable_weights(model), skipped)


def mask_of(
    adapted: Mapping[str, torch.Tensor], weights: Mapping[str, PrunableWeight], skipped: Collection[str]
) -> str:
    """`base_mask`, of matrices; `weights` are all that could be pruned of the model."""
    others = ((name, weight.matrix) for name, weight in weights.items()
              if name not in adapted and (name in skipped or not isinstance(weight.module, nn.Linear)))  # fmt: skip
    return mask_digest(chain(adapted.items(), others))


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, on the CPU: adapters under PEFT's names, and shifts of norms."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names on disk."""
    trained = {f"{PREFIX}{name}.{part}.weight": getattr(layer, part)
               for name, layer in adapter_layers(model).items() for part in ("lora_A", "lora_B")}  # fmt: skip
    return trained | {f"{PREFIX}{name}.shift": shift for name, shift in norm_shifts(model).items()}


def put_adapters(
    config: TuneConfig, network: PreTrainedModel, layers: list[str], grids: Mapping[str, Grid], *, norms: bool = True
) -> dict[str, AdapterLinear]:
    """Put all that is trained on a model, in place; the adapted layers by name.

    Args:
        grids: of the sparse weights, where they lie on such.
        norms: put shifts on normalisation layers too, where they are trained.
    """
    adapted = attach(network, layers, config.rank, config.alpha, use_rslora=config.use_rslora, method=config.method,
                     packed=config.base == "packed", rounding=config.weight_rounding,
                     grids=grids, quantization_aware=config.quantization_aware)  # fmt: skip
    if config.train_norms and norms:
        apart = tuple(f"{part}." for part in left_out(network))
        train_norms(network, [name for name in norm_parameters(network) if not name.startswith(apart)])
    return adapted
