"""Tokens a second that streamed text gives, against what training takes.

python benchmarks/data_throughput.py --data TEXT.jsonl.gz --out results.json [--training-rate NAME=TOKENS_PER_S …]

Two arms, each reading every sample of one pass in training's order and collating it in micro-batches of four:
`cold` starts with an empty cache, so it waits for the process that tokenises (its start included); `cached` reads what
a run before left. Rounds alternate; figures are medians with ranges. `tokens_per_cpu_s` counts the processor time that
was really had, of the tokenising process (cold) or the reader (cached): on a busy machine it says more. With every rate
that is given, the ratio of each arm to it is printed: 3 is what the data pipeline should never fall below.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from cells import MODEL
from common import cell, screen_of, software

from lors_cli.bench.measure import spread
from lors_cli.data.samples import PadCollator, count_tokens
from lors_cli.data.tokens import tuning_data
from lors_cli.files import atomic
from lors_cli.models.loading import load_tokenizer
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig

MICRO_BATCH = 4
WANTED_RATIO = 3.0


def read_through(config: TuneConfig, tokenizer: Any) -> tuple[int, float, float, float]:
    """One pass in training's order.

    Returns:
        Tokens, seconds, and processor seconds of this process and of the one that tokenises.
    """
    collator = PadCollator(tokenizer.pad_token_id)
    started, own, others = time.perf_counter(), time.process_time(), _children_s()
    data = tuning_data(config, tokenizer, model_max_length=config.data.max_length, data_dir=None)
    tokens = 0
    for first in range(0, len(data.samples), MICRO_BATCH):
        tokens += count_tokens(collator(data.samples[first : first + MICRO_BATCH]))
    data.close()
    return tokens, time.perf_counter() - started, time.process_time() - own, _children_s() - others


def _children_s() -> float:
    """Processor seconds of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(config: TuneConfig, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Tokens a second of both arms, and what the reader's memory grew by."""
    rates: dict[str, list[float]] = {"cold": [], "cached": []}
    cpu_rates: dict[str, list[float]] = {"cold": [], "cached": []}
    tokens = 0
    before = psutil.Process().memory_info().rss
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LORS_CACHE_DIR"] = folder
            for arm in rates:
                tokens, seconds, own_s, children_s = read_through(config, tokenizer)
                rates[arm].append(tokens / seconds)
                cpu_rates[arm].append(tokens / (children_s if arm == "cold" else own_s))
            num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    grown = psutil.Process().memory_info().rss - before
    return {
        "tokens": tokens, "cache_bytes_a_token": round(num_bytes / tokens, 3), "reader_grew_mib": round(grown / 2**20),
        "tokens_per_s": {arm: spread(values) for arm, values in rates.items()},
        "tokens_per_cpu_s": {arm: spread(values) for arm, values in cpu_rates.items()},
    }  # fmt: skip


def parse_rates(texts: list[str]) -> dict[str, float]:
    """Training's tokens a second by name."""
    return {name: float(rate) for name, _, rate in (text.rpartition("=") for text in texts)}


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", required=True, help="a file of text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--buffer", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training-rate", action="append", default=[], help="name=tokens a second; may be repeated")
    options = parser.parse_args()

    tokenizer = load_tokenizer(ModelConfig(path=options.model))
    rates = parse_rates(options.training_rate)
    cells = {}
    for packing in ("concatenated", "isolated"):
        data = TuneDataConfig(dataset=options.data, max_length=options.length, stream="on", packing=packing,
                              shuffle_buffer=options.buffer)  # fmt: skip
        figures = measure(TuneConfig(data=data, epochs=1), tokenizer, options.rounds)
        figures["times_training"] = {
            name: {arm: round(found["median"] / rate, 1) for arm, found in figures["tokens_per_s"].items()}
            for name, rate in rates.items()
        }
        cells[packing] = figures
    cores = len(os.sched_getaffinity(0))
    results = {"model": options.model, "sequence_length": options.length, "shuffle_buffer": options.buffer,
               "rounds": options.rounds, "cores": cores, "training_rates": rates, "cells": cells,
               **software()}  # fmt: skip
    atomic.write_json(options.out, results)
    screen = screen_of()
    for packing, figures in cells.items():
        for arm, found in figures["tokens_per_s"].items():
            of_cpu = cell(figures["tokens_per_cpu_s"][arm], 0)
            screen.print(f"{packing:13} {arm:7} {cell(found, 0)} tokens/s, {of_cpu} a processor second")
            for name, ratios in figures["times_training"].items():
                verdict = "enough" if ratios[arm] >= WANTED_RATIO else "TOO SLOW"
                screen.print(f"  {ratios[arm]:,.1f} × {name} ({rates[name]:,.0f} tokens/s): {verdict}")


if __name__ == "__main__":
    main()
