"""Exact gradient initialisation against streamed sketches: subspaces, what they capture, time and memory.

python benchmarks/initialization.py --model SPARSE_CHECKPOINT --rows INSTRUCTIONS.jsonl --out results.json

Of every adapted linear, with dW its loss gradient: overlap of the two subspaces, ‖V_a·V_bᵀ‖²/r; share of ‖dW‖² that
each holds, ‖dW·Vᵀ‖²/‖dW‖², on the samples that it was made of and on as many others. Means over linears; random
vectors for comparison. Each way runs `--rounds` times, in turn. Times are medians, memory is the peak beyond weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import software
from torch import nn

from lors_cli.bench.live_memory import LiveBytes
from lors_cli.data.samples import PadCollator
from lors_cli.data.tokens import tuning_samples
from lors_cli.files import atomic
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.recipe.schema import ModelConfig, TuneDataConfig
from lors_cli.tuning.attach import adaptable_layers
from lors_cli.tuning.head import causal_lm_loss
from lors_cli.tuning.initialization import _layer_groups, _summed_gradients, gradient_directions
from lors_cli.tuning.stage import sparse_layers

Batches = list[dict[str, torch.Tensor]]
Directions = dict[str, torch.Tensor]


def gradients(model: Any, linears: dict[str, nn.Linear], batches: Batches) -> Iterator[tuple[str, torch.Tensor]]:
    """Every linear's dW (R, C)."""
    for group in _layer_groups(linears):
        yield from _summed_gradients(model, group, batches, causal_lm_loss).items()


def captured(
    model: Any, linears: dict[str, nn.Linear], batches: Batches, ways: dict[str, Directions]
) -> dict[str, float]:
    """Mean share of ‖dW‖² that each way's directions hold on these samples."""
    shares: dict[str, list[float]] = {way: [] for way in ways}
    for name, dW in gradients(model, linears, batches):
        whole = float(dW.square().sum())
        for way, directions in ways.items():
            shares[way].append(float((dW @ directions[name].T).square().sum()) / whole)
    return {way: round(statistics.mean(values), 4) for way, values in shares.items()}


def overlap(some: Directions, other: Directions) -> float:
    """Mean over linears of ‖V_a·V_bᵀ‖²/r."""
    values = [float((some[name] @ other[name].T).square().sum()) / len(some[name]) for name in some]
    return round(statistics.mean(values), 4)


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="instruction rows, or a named source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    source = ModelConfig(path=options.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    names = adaptable_layers(model, sparse_layers(prunable_weights(model), Path(options.model)))
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}
    wanted = TuneDataConfig(dataset=options.rows, num_samples=2 * options.samples)
    data = tuning_samples(wanted, tokenizer, seed=0, num_needed=None, model_max_length=2048, data_dir=None).samples
    collator = PadCollator(tokenizer.pad_token_id)
    here, others = (
        [collator(part[first : first + 4]) for first in range(0, len(part), 4)]
        for part in (data[: options.samples], data[options.samples :])
    )

    taken: dict[str, list[float]] = {"exact": [], "sketch": []}
    ways: dict[str, Directions] = {}
    for number in range(options.rounds):
        for way in sorted(taken, reverse=bool(number % 2)):
            started = time.perf_counter()
            found = gradient_directions(model, linears, here, options.rank, seed=0, exact=way == "exact",
                                        loss=causal_lm_loss)  # fmt: skip
            taken[way].append(time.perf_counter() - started)
            ways[way] = found
    peaks = {}
    for way in taken:
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            gradient_directions(model, linears, here, options.rank, seed=0, exact=way == "exact", loss=causal_lm_loss)
        peaks[way] = live.peak
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(linear.in_features, options.rank, generator=generator)
             for name, linear in linears.items()}  # fmt: skip
    ways["random"] = {name: torch.linalg.qr(matrix).Q.T.to(model.device) for name, matrix in drawn.items()}
    results = {
        "rank": options.rank, "samples": options.samples, "linears": len(linears),
        "overlap_sketch_exact": overlap(ways["sketch"], ways["exact"]),
        "seconds": {way: round(statistics.median(values), 2) for way, values in taken.items()},
        "seconds_sketch_over_exact": round(
            statistics.median(a / b for a, b in zip(taken["sketch"], taken["exact"], strict=True)), 3
        ),
        "peak_mib": {way: round(value / 2**20, 1) for way, value in peaks.items()},
        **software(),
    }  # fmt: skip
    atomic.write_json(options.out, results)
    results["captured"] = captured(model, linears, here, ways)
    results["captured_held_out"] = captured(model, linears, others, ways)
    atomic.write_json(options.out, results)
    for key, value in results.items():
        print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
