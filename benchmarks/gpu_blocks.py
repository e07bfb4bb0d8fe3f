"""Time and device memory of pruning Llama-3-8B-shaped decoder blocks: lors' maths and the reference codes' arithmetic.

python benchmarks/gpu_blocks.py --out blocks.json --rounds 3

Weights and tokens are random. Every arm gets the same of both, computes the inputs of its blocks, prunes them and
computes their outputs; the device is waited for at every change of phase. The floor is two bare forward passes. lors
runs `batch_size` sequences a forward pass and sums statistics once for linears that share their input; the reference
runs one sequence and sums for each linear.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    PhaseTimer,
    cell,
    equal_share,
    first_block_masks,
    forward_floor,
    linears_of,
    pruning_seconds,
    ratios,
    screen_of,
    software,
)
from reference import prune_reference
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lors_cli.bench.measure import rotated, spread
from lors_cli.files import atomic, hashes
from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.methods import prune_group
from lors_cli.pruning.methods.statistics import InputStatistics, Kind
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
KINDS: dict[str, Kind] = {"wanda": "norm", "sparsegpt": "hessian"}
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
    methods: tuple[str, ...] = ("sparsegpt", "wanda")

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
            arms[f"reference {method}"] = lambda model, batches, method=method: prune_reference(  # type: ignore[misc]
                model, batches, method, pattern
            )
            arms[f"lors {method}"] = lambda model, batches, method=method: prune_lors(  # type: ignore[misc]
                model, batches, method, pattern
            )
        return arms


def prune_lors(model: Any, batches: Sequence[torch.Tensor], method: str, pattern: Pattern) -> dict[str, float]:
    """Prune a Llama in place with lors' statistics and methods; nothing is saved.

    Args:
        model: causal LM.
        batches: calibration tokens (samples, tokens) each.
        method: key of `KINDS`.
        pattern: how many weights stay.

    Returns:
        Seconds a phase: `inputs` (of the first block), `forward`, `statistics`, `solve`.
    """
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
    groups = [(names, InputStatistics(KINDS[method])) for names in SHARING]

    def hook(statistics: InputStatistics) -> Callable[..., None]:
        def update(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            with timer.phase("statistics"):
                statistics.update(inputs[0])

        return update

    handles = [linears[names[0]].register_forward_pre_hook(hook(statistics)) for names, statistics in groups]
    with timer.phase("forward"):
        for batch in hidden:
            arguments.run(block, batch)
    for handle in handles:
        handle.remove()
    with timer.phase("solve"):
        for names, statistics in groups:
            weights = [linears[name].weight.data for name in names]
            for weight, pruned in zip(weights, prune_group(method, weights, statistics, pattern), strict=True):
                weight.copy_(pruned)
    with timer.phase("forward"):
        for index, batch in enumerate(hidden):
            hidden[index] = arguments.run(block, batch)


def measure(model: Any, batches: Sequence[torch.Tensor], run: Pruner) -> dict[str, Any]:
    """Seconds, and GiB on the device: at the start (`base_gib`) and at most (`peak_gib`; None without CUDA)."""
    cuda = model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() / 2**30 if cuda else None
    started = time.perf_counter()
    phases = run(model, batches)
    elapsed = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"pruning_s": pruning_seconds(phases), "elapsed_s": elapsed, "phases_s": phases, "base_gib": base,
            "peak_gib": peak}  # fmt: skip


def run_round(
    settings: Settings, number: int, model: Any, weights: Mapping[str, torch.Tensor], screen: Console
) -> dict[str, Any]:
    """Every arm once, on the given weights.

    Args:
        settings: of the benchmark.
        number: of the round, from 0; decides the order, and masks are compared in round 0.
        model: of these settings; its weights are overwritten.
        weights: its dense state.
        screen: for a line an arm.

    Returns:
        `order`, `arms` with the figures of each, `masks` with the shares by method and linear.
    """
    arms = settings.arms()
    order = rotated(list(arms), number)
    batches = settings.batches()
    figures: dict[str, Any] = {}
    masks = {}
    for arm in order:
        model.load_state_dict(weights)
        figures[arm] = measure(model, batches, arms[arm])
        if number == 0 and arm != "floor":
            masks[arm] = first_block_masks(model)
        phases = "  ".join(f"{name} {seconds:.3f}" for name, seconds in figures[arm]["phases_s"].items())
        screen.print(f"round {number + 1}  {arm:<20} {figures[arm]['pruning_s']:8.3f} s  {phases}")
    shares = {method: equal_share(masks[f"lors {method}"], masks[f"reference {method}"])
              for method in settings.methods if masks}  # fmt: skip
    return {"order": order, "arms": figures, "masks": shares}


def summarise(rounds: Sequence[Mapping[str, Any]], settings: Settings) -> dict[str, Any]:
    """Medians and spreads of every arm, ratios of arms round by round."""
    results = [number["arms"] for number in rounds]
    arms = {}
    for arm, first in results[0].items():
        keys = [key for key in ("pruning_s", "elapsed_s", "base_gib", "peak_gib") if first[key] is not None]
        phases = {name: spread([result[arm]["phases_s"][name] for result in results]) for name in first["phases_s"]}
        arms[arm] = {**{key: spread([result[arm][key] for result in results]) for key in keys}, "phases_s": phases}
    quotients = {}
    for method in settings.methods:
        lors, ref = f"lors {method}", f"reference {method}"
        quotients[method] = {"lors/floor": ratios(results, lors, "floor", "pruning_s"),
                             "lors/reference": ratios(results, lors, ref, "pruning_s"),
                             "floor/reference": ratios(results, "floor", ref, "pruning_s")}  # fmt: skip
    return {"rounds": len(rounds), "arms": arms, "ratios": quotients, "masks": rounds[0]["masks"]}


def show(summary: Mapping[str, Any], screen: Console) -> None:
    """The summary as tables."""
    table = Table("arm", "pruning s", "forward", "statistics", "solve", "peak GiB",
                  title=f"median of {summary['rounds']} rounds (smallest–largest)")  # fmt: skip
    for arm, figures in summary["arms"].items():
        phases = [cell(figures["phases_s"][name], 2) if name in figures["phases_s"] else ""
                  for name in ("forward", "statistics", "solve")]  # fmt: skip
        peak = cell(figures["peak_gib"], 2) if "peak_gib" in figures else ""
        table.add_row(arm, cell(figures["pruning_s"], 2), *phases, peak)
    screen.print(table)
    for method, quotients in summary["ratios"].items():
        screen.print(f"{method}: " + "  ".join(f"{name} {cell(figures, 3)}" for name, figures in quotients.items()))
        shares = "  ".join(f"{name} {share:.4%}" for name, share in summary["masks"][method].items())
        screen.print(f"  equal mask entries in the first block: {shares}")


def warm_up(settings: Settings) -> None:
    """Run every arm on a tiny model, so that the device's libraries are started."""
    tiny = replace(settings, hidden_size=256, intermediate_size=512, num_heads=4, num_key_value_heads=2, blocks=1,
                   num_samples=2, sequence_length=32, batch_size=2)  # fmt: skip
    for run in tiny.arms().values():
        run(tiny.model(), tiny.batches())


def benchmark(settings: Settings, num_rounds: int, out: Path, screen: Console) -> dict[str, Any]:
    """Run, write and show all rounds; `out` is written after each.

    Args:
        settings: of the benchmark.
        num_rounds: in all.
        out: JSON file.
        screen: for progress and tables.

    Returns:
        What `out` holds.
    """
    warm_up(settings)
    model = settings.model()
    weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type
    results: dict[str, Any] = {**software(), "device": device, "settings": hashes.plain(asdict(settings)),
                               "rounds": []}  # fmt: skip
    for number in range(num_rounds):
        results["rounds"].append(run_round(settings, number, model, weights, screen))
        results["summary"] = summarise(results["rounds"], settings)
        atomic.write_json(out, results)
    show(results["summary"], screen)
    return results


def main() -> None:
    """Measure with the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    for name, value in asdict(Settings()).items():
        if name != "methods":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--methods", nargs="+", choices=list(KINDS), default=list(Settings().methods))
    arguments = vars(parser.parse_args())
    out, num_rounds = arguments.pop("out"), arguments.pop("rounds")
    settings = Settings(**{**arguments, "methods": tuple(arguments["methods"])})
    benchmark(settings, num_rounds, out, screen_of())


if __name__ == "__main__":
    main()
