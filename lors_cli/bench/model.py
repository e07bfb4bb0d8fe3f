"""The parts of `lors bench`: a frozen sparse model, the ways to adapt its linears, and what a step takes in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lors_cli.bench.live_memory import LiveBytes
from lors_cli.errors import MissingError
from lors_cli.grid import Grid, GridSpec
from lors_cli.models.blocks import decoder_blocks, prunable_weights
from lors_cli.models.shapes import SHAPES
from lors_cli.output import console
from lors_cli.tuning.baselines import LAYERS
from lors_cli.tuning.head import causal_lm_loss
from lors_cli.tuning.kernels.cache import Keep, MergedCache
from lors_cli.tuning.kernels.rounding import Rounding, kept_thresholds
from lors_cli.tuning.kernels.scratch import free_scratch, scratch_memory
from lors_cli.tuning.layers import AdapterLinear
from lors_cli.tuning.lors import Gradient, LorsLinear, PackedLorsLinear, choose_gradients


@dataclass(frozen=True)
class Arm:
    """One way to adapt the linears.

    Args:
        method: of `tune.method`.
        keep: lors: how long merged weights are kept.
        float32_adapters: lora: PEFT's default; without it its adapters have the weights' dtype, which is faster.
        packed: lors: the weights are held packed.
        int4: the weights lie on a grid of 4 bits, and packed ones are held as codes.
        quantization_aware: merged weights stay on it.
        gradient: lors: of `tune.gradient`.
    """

    method: str
    keep: Keep = "never"
    float32_adapters: bool = True
    packed: bool = False
    rounding: Rounding = "stochastic"
    int4: bool = False
    quantization_aware: bool = False
    gradient: Gradient = "approximate"


GRID = GridSpec(bits=4, group_size=128)
"""Of arms with 4 bits."""
ARMS: dict[str, Arm] = {
    "lora": Arm("lora", float32_adapters=False),
    "lora-float32": Arm("lora"),
    "lors": Arm("lors"),
    "lors-cached": Arm("lors", "always"),
    "lors-exact": Arm("lors", gradient="exact"),
    "lors-rotating": Arm("lors", gradient="rotating"),
    "lors-nearest": Arm("lors", rounding="nearest"),
    "lors-packed": Arm("lors", packed=True),
    "lors-int4": Arm("lors", packed=True, int4=True),
    "lors-qa": Arm("lors", packed=True, int4=True, quantization_aware=True),
    "sqft-qa": Arm("sqft", int4=True, quantization_aware=True),
    **{method: Arm(method) for method in LAYERS if method not in ("lora", "lors")},
}


def sparse_model(
    shape: str | None, path: str | None, blocks: int | None, dtype: torch.dtype, device: torch.device,
    pattern: str = "2:4",
) -> tuple[Any, dict[str, nn.Linear]]:  # fmt: skip
    """A frozen sparse model and the linears in its decoder blocks, by name.

    It has random weights in a `shape` of `SHAPES`, half of them zero by `pattern`, 2:4 or unstructured, or those of
    the folder `path`; `blocks` None is all of them.
    """
    from transformers import AutoModelForCausalLM

    from lors_cli.models.loading import load_model
    from lors_cli.recipe.schema import ModelConfig

    if path is None:
        assert shape is not None
        settings = SHAPES[shape].config()
        settings.num_hidden_layers = blocks or settings.num_hidden_layers
        console.info(f"  making {shape} with random {pattern} weights, {settings.num_hidden_layers} decoder blocks")
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    else:
        if not Path(path).is_dir():
            raise MissingError(f"No checkpoint folder at {path}.")
        source = ModelConfig(path=path, dtype=str(dtype).removeprefix("torch."), device=str(device))  # type: ignore[arg-type]
        model = load_model(source)
    model.requires_grad_(False)
    layers = decoder_blocks(model)[1]
    weights = prunable_weights(model)
    del layers[blocks or len(layers) :]
    left = set(layers.modules())
    linears = {name: weight.module for name, weight in weights.items()
               if isinstance(weight.module, nn.Linear) and weight.module in left}  # fmt: skip
    if path is None:
        for linear in linears.values():
            (_make_two_of_four if pattern == "2:4" else _make_half)(linear.weight)
    return model, linears


@torch.no_grad()
def _make_two_of_four(weight: torch.Tensor) -> None:
    """Set two of every four inputs of a row to zero, drawn evenly from the six ways."""
    ways = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    ways = ways.to(weight.device, weight.dtype)
    groups = weight.view(weight.shape[0], -1, 4)
    groups.mul_(ways[torch.randint(6, groups.shape[:2], device=weight.device)])


@torch.no_grad()
def _make_half(weight: torch.Tensor) -> None:
    """Set each weight to zero or not, as a coin falls."""
    weight.mul_(torch.rand(weight.shape, device=weight.device) < 0.5)


@torch.no_grad()
def put_on_grids(linears: Mapping[str, nn.Linear], spec: GridSpec = GRID) -> dict[str, Grid]:
    """Round weights' non-zeros, in place, to grids that reach as far as they do; the grids by name.

    None becomes zero, as of those that are pruned few do: the larger ones are kept.
    """
    grids = {}
    for name, linear in linears.items():
        weight, size = linear.weight, spec.group_size
        groups = nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        grid = Grid(spec, (groups.abs().amax(-1) / (spec.middle - 1)).clamp_min(1e-6).to(weight.dtype))
        least = grid.scales.repeat_interleave(size, dim=1)[:, : weight.shape[1]]
        weight.copy_(weight.sign() * torch.maximum(grid.rounded(weight).abs(), least))
        grids[name] = grid
    return grids


def checkpoint_blocks(model: Any, wanted: bool) -> None:
    """Have decoder blocks computed again in backward, or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer names, which older transformers 5 do not have
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()


@contextmanager
def adapted(
    model: Any, linears: dict[str, nn.Linear], arm: Arm, rank: int, grids: Mapping[str, Grid] | None = None
) -> Iterator[torch.optim.Optimizer]:
    """The model with an arm's adapters on it (lora_B no longer zero) and afterwards as before; their optimiser.

    Args:
        grids: of the weights, for arms with 4 bits.
    """
    adapters: list[nn.Parameter] = []
    device = model.device
    try:
        for name, linear in linears.items():
            layer = _layer(linear, arm, rank, (grids or {})[name] if arm.int4 else None)
            adapters += [layer.lora_A, layer.lora_B]
            model.set_submodule(name, layer)
            if arm.packed:
                linear.weight.data = linear.weight.data.cpu()  # or the plain weights would count too
        choose_gradients(model, arm.gradient, step=0)
        yield torch.optim.AdamW(adapters, lr=1e-5)
    finally:
        for name, linear in linears.items():
            linear.weight.data = linear.weight.data.to(device)
            model.set_submodule(name, linear)
        free_scratch()


def _layer(linear: nn.Linear, arm: Arm, rank: int, grid: Grid | None) -> AdapterLinear:
    layer = (PackedLorsLinear if arm.packed else LAYERS[arm.method])(linear, rank, float(rank), grid=grid)
    layer.rounding, layer.quantization_aware = arm.rounding, arm.quantization_aware
    if isinstance(layer, LorsLinear):
        layer.cache = MergedCache(arm.keep)
    if not arm.float32_adapters:
        layer.peft.to(linear.weight.dtype)
    nn.init.normal_(layer.lora_B, std=1e-3)
    return layer


def memory_of_step(
    model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[torch.Tensor],
    step: Callable[[], None],
) -> dict[str, int]:  # fmt: skip
    """Bytes that a forward pass leaves for backward, and the peak of a step with weights and optimiser.

    On a GPU torch's allocator counts, elsewhere `LiveBytes`. A batch has shape (sequences, tokens).
    """
    inputs = {"input_ids": batches[0], "labels": batches[0]}
    _drop_caches(model)
    if model.device.type == "cuda":
        tidy(model.device)
        before = torch.cuda.memory_allocated(model.device)
        loss = causal_lm_loss(model, inputs)
        saved = torch.cuda.memory_allocated(model.device) - before
        del loss
        torch.cuda.reset_peak_memory_stats(model.device)
        step()
        return {"saved_bytes": saved, "peak_bytes": torch.cuda.max_memory_allocated(model.device)}
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    static = [*model.parameters(), *model.buffers(), *states]
    if any(isinstance(module, LorsLinear) and module.rounding == "stochastic" for module in model.modules()):
        static += kept_thresholds.values()
    with LiveBytes([*static, *batches, *scratch_memory()]) as live:
        loss = causal_lm_loss(model, inputs)
        gc.collect()
        saved = live.current
        del loss
    _drop_caches(model)
    free_scratch()
    gc.collect()
    with LiveBytes([*static, *batches]) as live:
        step()
    unique = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in static}
    return {"saved_bytes": saved, "peak_bytes": sum(unique.values()) + live.peak}


def _drop_caches(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LorsLinear):
            module.cache.drop()


def tidy(device: torch.device) -> None:
    """Collect what is no longer used, so that the next method starts as this one did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
