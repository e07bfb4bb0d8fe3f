"""Step 5: pruning a Llama-3-8B-shaped decoder block: lors' maths and the reference codes' arithmetic, time and memory.

Weights and tokens are random. Every arm gets the same of both, computes the inputs of its blocks, prunes them and
computes their outputs; the device is waited for at every change of phase. The floor is two bare forward passes. lors
runs `batch_size` sequences a forward pass and sums statistics once for linears that share their input; the reference
runs one sequence and sums for each linear.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import (
    PhaseTimer,
    equal_share,
    first_block_masks,
    forward_floor,
    linears_of,
    pruning_seconds,
)
from gpu.box import Box, Figures
from reference import METHODS as REFERENCE
from reference import prune_reference
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.methods import STATISTICS, prune_group
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.walk.calibration import BlockArguments, capture
from lors_cli.sparsity import Pattern

VOCABULARY = 4096
SHARING = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a Llama block that read the same tensor."""
Pruner = Callable[[Any, Sequence[torch.Tensor]], dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """Shape of the blocks (Llama-3-8B's by default) and amount of calibration data."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_heads: int = 32
    num_key_value_heads: int = 8
    blocks: int = 1
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 8
    pattern: str = "2:4"
    dtype: str = "bfloat16"
    device: str = "cuda"
    methods: tuple[str, ...] = ("sparsegpt", "wanda", "admm")

    def model(self) -> Any:
        """A causal LM with these blocks and random weights."""
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.blocks, num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads, max_position_embeddings=self.sequence_length,
            dtype=getattr(torch, self.dtype),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlamaForCausalLM._from_config(config).eval().requires_grad_(False)

    def batches(self) -> list[torch.Tensor]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (self.num_samples, self.sequence_length), generator=generator)
        return list(tokens.split(self.batch_size))

    def arms(self) -> dict[str, Pruner]:
        """The floor, and lors and the reference for every method."""
        pattern = Pattern.parse(self.pattern, 0.5 if self.pattern == "unstructured" else None)
        arms: dict[str, Pruner] = {"floor": forward_floor}
        for method in self.methods:
            for name, prune in (("lors", prune_lors), ("reference", prune_reference)):
                if name == "lors" or method in REFERENCE:
                    arms[f"{name} {method}"] = lambda model, batches, method=method, prune=prune: prune(  # type: ignore[misc]
                        model, batches, method, pattern
                    )
        return arms


def prune_lors(model: Any, batches: Sequence[torch.Tensor], method: str, pattern: Pattern) -> dict[str, float]:
    """Prune a Llama in place with lors' statistics and methods, nothing saved; seconds a phase."""
    _, blocks = decoder_blocks(model)
    timer = PhaseTimer(model.device)
    with timer.phase("inputs"):
        hidden, arguments = capture(model, list(blocks), batches)
    for block, own_arguments in zip(blocks, arguments, strict=True):
        _prune_block(block, hidden, own_arguments, method, pattern, timer)
    return timer.seconds


@torch.no_grad()
def _prune_block(
    block: nn.Module,
    hidden: list[torch.Tensor],
    arguments: BlockArguments,
    method: str,
    pattern: Pattern,
    timer: PhaseTimer,
) -> None:
    """Prune one block and replace `hidden` by its outputs."""
    linears = linears_of(block)
    groups = [(names, InputStatistics(STATISTICS[method])) for names in SHARING]

    def hook(statistics: InputStatistics) -> Callable[..., None]:
        def update(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            with timer.phase("statistics"):
                statistics.update(inputs[0])

        return update

    handles = [linears[names[0]].register_forward_pre_hook(hook(statistics)) for names, statistics in groups]
    with timer.phase("forward"):
        for index, batch in enumerate(hidden):
            arguments.run(block, batch, index)
    for handle in handles:
        handle.remove()
    with timer.phase("solve"):
        for names, statistics in groups:
            weights = [linears[name].weight.data for name in names]
            for weight, pruned in zip(weights, prune_group(method, weights, statistics, pattern), strict=True):
                weight.copy_(pruned)
    with timer.phase("forward"):
        for index, batch in enumerate(hidden):
            hidden[index] = arguments.run(block, batch, index)


def measure(model: Any, weights: dict[str, torch.Tensor], batches: Sequence[torch.Tensor], run: Pruner) -> Figures:
    """An arm on the dense weights: seconds, and GiB on the device at the start and at most (None without CUDA)."""
    model.load_state_dict(weights)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() / 2**30 if cuda else None
    started = time.perf_counter()
    phases = run(model, batches)
    elapsed = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"pruning_s": pruning_seconds(phases), "elapsed_s": elapsed, "phases_s": phases, "base_gib": base,
            "peak_gib": peak}  # fmt: skip


def warm_up(settings: Settings) -> None:
    """Run every arm on a tiny model, so that the device's libraries are started."""
    tiny = replace(settings, hidden_size=256, intermediate_size=512, num_heads=4, num_key_value_heads=2, blocks=1,
                   num_samples=2, sequence_length=32, batch_size=2)  # fmt: skip
    for run in tiny.arms().values():
        run(tiny.model(), tiny.batches())


TINY = Settings(hidden_size=64, intermediate_size=160, num_heads=4, num_key_value_heads=2, num_samples=4,
                sequence_length=24, batch_size=4, dtype="float32", device="cpu")  # fmt: skip


def run(box: Box, settings: Settings | None = None) -> None:
    """Every arm once, the floor first, and how those so far compare."""
    settings = settings or (TINY if box.rehearse else Settings())
    if not box.rehearse:
        box.item("warm-up", lambda: warm_up(settings) or {})
    model, batches, masks = settings.model(), settings.batches(), {}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for arm, prune in settings.arms().items():
        if box.item(arm, lambda prune=prune: measure(model, weights, batches, prune), 5 if not box.rehearse else 0.1):  # type: ignore[misc]
            masks[arm] = first_block_masks(model)
        box.items["compared"] = compared(box.items, masks)
        box.write()


def compared(items: dict[str, Figures], masks: dict[str, dict[str, torch.Tensor]]) -> Figures:
    """By method the quotients of pruning times, and by linear the share of mask entries equal to the reference's."""
    seconds = {arm: figures["pruning_s"] for arm, figures in items.items() if "pruning_s" in figures}
    found: Figures = {}
    for arm in seconds:
        kind, _, method = arm.partition(" ")
        if kind == "lors":
            row = found[method] = {f"lors/{other}": seconds[arm] / seconds[name]
                                   for other, name in (("floor", "floor"), ("reference", f"reference {method}"))
                                   if name in seconds}  # fmt: skip
            if f"reference {method}" in masks:
                row["equal_masks"] = equal_share(masks[arm], masks[f"reference {method}"])
    return found
