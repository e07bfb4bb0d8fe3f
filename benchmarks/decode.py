"""Packed weights against dense ones: single linears, and whole models as `lors bench --decode` measures them.

python benchmarks/decode.py --out results.json [--shapes 2048x5632 …] [--batches 1 4 …] [--threads 1 2]
                            [--models smollm2-135m tinyllama]

`--shapes` or `--models` without a word leaves that part out. The file is written after each cell; the same command
goes on from there, also with more cells. Every cell has the machine's load average.

Linears are compared with torch's dense ones and with dense kernels in C that are tuned alike, of bfloat16 and of 4
bits: the same loops and look-ups without a mask. Weights of 4 and 8 bits lie on symmetric grids in groups of
`--group-size`. Each round runs every
arm in turn, in rotating order, on the same inputs; a ratio is taken within a round, and given as the median over rounds
with its range. As in decoding, each call finds its weight in memory and not in the cache: the arms go round as many
copies as fill `--megabytes` (0: one copy, which a large cache may hold). With one thread the thread's processor time is
taken, which other work on the machine disturbs less than time on the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import cell, screen_of, software
from rich.table import Table
from torch.nn import functional as F

from lors_cli.bench.decode import DecodeConfig, measure_missing
from lors_cli.bench.measure import rotated, spread
from lors_cli.files.atomic import write_json
from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.machine.environment import hardware
from lors_cli.models.packed.format import GROUP_SIZES, pack
from lors_cli.models.packed.kernels import ops
from lors_cli.models.packed.kernels.build import NATIVE, library
from lors_cli.sparsity import TWO_OF_FOUR

SHAPES = ("576x1536", "1536x576", "2048x2048", "2048x5632", "4096x4096", "4096x14336")
BATCHES = (1, 2, 4, 8, 16, 32, 128, 512)
MODELS = ("smollm2-135m", "tinyllama")
ROUND_S = 0.004
"""A turn repeats its call for about so long."""
LEAST_ROUNDS = 5
RATIOS = (
    ("torch", "packed"), ("dense C", "packed"), ("torch", "dense C"), ("torch", "packed int4"),
    ("torch", "packed int8"), ("dense int4", "packed int4"), ("packed", "packed int4"),
)  # fmt: skip
"""Arms whose times are divided within a round."""

Arm = Callable[[int], Any]


def choose(rows: int, columns: int, pattern: str) -> torch.Tensor:
    """Where weights are kept: two of four neighbours, or half of all."""
    if pattern == "2:4":
        return torch.rand(rows, columns // 4, 4).argsort(-1).lt(2).view(rows, columns)
    return torch.rand(rows, columns) < 0.5


def arms_of(
    rows: int, columns: int, batch: int, dtype: torch.dtype, pattern: str, megabytes: int, group_size: int = 128
) -> dict[str, Arm]:
    """The arms by name; each is called with a number that says which copy of the weight it is to use."""
    kept = choose(rows, columns, pattern)
    weight = torch.randn(rows, columns).mul(kept).to(dtype)
    x, out = torch.randn(batch, columns).to(dtype), torch.empty(batch, rows, dtype=dtype)
    in_c = getattr(library(NATIVE, "DENSE"), f"{ops.PREFIXES[dtype]}_dense_linear")
    in_c.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2

    def copies(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        count = max(1, math.ceil(megabytes * 2**20 / sum(tensor.nbytes for tensor in tensors)))
        return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]

    def of_c(held: list[tuple[torch.Tensor, ...]], spec: GridSpec | None = None) -> Arm:
        kind = (0, 0) if spec is None else (spec.bits, spec.group_size)

        def run(index: int) -> torch.Tensor:
            values, *scales = held[(index + len(held) // 2) % len(held)]  # not what torch brought into the cache
            at = scales[0].data_ptr() if scales else None
            in_c(values.data_ptr(), x.data_ptr(), out.data_ptr(), rows, columns, batch, at, None, *kind)
            return out

        return run

    def packed(grid: Grid | None) -> Arm:
        held_to = TWO_OF_FOUR if pattern == "2:4" else None
        of = pack(weight if grid is None else grid.rounded(weight).masked_fill_(~kept, 0), held_to, grid)
        if grid is None:
            held = copies(of.values, of.mask, of.starts)
            return lambda index: ops.linear(x, *held[index % len(held)])
        codes = [(parts[:3], Grid(grid.spec, parts[3])) for parts in copies(of.values, of.mask, of.starts, grid.scales)]

        def run(index: int) -> torch.Tensor:
            tensors, its_grid = codes[index % len(codes)]
            return ops.linear(x, *tensors, None, its_grid, held_to is not None)

        return run

    grids = {bits: fit_grid(weight, kept, GridSpec(bits, group_size)) for bits in (4, 8)}
    codes = grids[4].codes(weight)
    dense = copies(weight)
    arms: dict[str, Arm] = {
        "torch": lambda index: F.linear(x, *dense[index % len(dense)]),
        "dense C": of_c(dense),
        "packed": packed(None),
        "dense int4": of_c(copies(codes[:, ::2] | codes[:, 1::2] << 4, grids[4].scales), grids[4].spec),
        "packed int4": packed(grids[4]),
        "packed int8": packed(grids[8]),
    }
    for name, run in arms.items():
        grid = grids.get(int(name[-1])) if name[-1].isdigit() else None
        expected = x.float() @ (weight if grid is None else grid.rounded(weight)).float().T
        error = float((run(0).float() - expected).abs().max() / expected.abs().max())
        assert error < 0.02, f"{name}: wrong by {error}"
    return arms


def measure(arms: dict[str, Arm], clock: Callable[[], float], seconds: float) -> dict[str, Any]:
    """Microseconds a call by arm, and the ratios within a round."""
    names, started = list(arms), time.perf_counter()
    begun = clock()
    arms["torch"](0)
    repeats = max(1, round(ROUND_S / max(clock() - begun, 1e-6)))
    rounds: list[dict[str, float]] = []
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        found = {}
        for name in rotated(names, len(rounds)):
            run, first = arms[name], len(rounds) * repeats
            begun = clock()
            for index in range(first, first + repeats):
                run(index)
            found[name] = (clock() - begun) / repeats * 1e6
        rounds.append(found)
    return {
        "rounds": len(rounds),
        "microseconds": {name: spread([found[name] for found in rounds]) for name in names},
        **{f"{one} ÷ {other}": spread([found[one] / found[other] for found in rounds]) for one, other in RATIOS},
    }


def measure_linears(given: argparse.Namespace, document: dict[str, Any], keep: Callable[[], None]) -> None:
    """Every linear at every batch and number of threads that the document lacks."""
    dtype, done = getattr(torch, given.dtype), {_cell(result) for result in document["results"]}
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        for batch in given.batches:
            missing = [threads for threads in given.threads if (shape, batch, threads) not in done]
            arms = arms_of(rows, columns, batch, dtype, given.pattern, given.megabytes,
                           given.group_size) if missing else {}  # fmt: skip
            for threads in missing:
                torch.set_num_threads(threads)
                result = measure(arms, time.thread_time if threads == 1 else time.perf_counter, given.seconds)
                document["results"].append(
                    {"shape": shape, "batch": batch, "threads": threads, **result, "load": os.getloadavg()[0]}
                )
                keep()


def _cell(result: dict[str, Any]) -> tuple[str, int, int]:
    return result["shape"], result["batch"], result["threads"]


def measure_models(given: argparse.Namespace, document: dict[str, Any], keep: Callable[[], None]) -> None:
    """Every model at every number of threads: decoding and prompts, cell by cell."""
    for shape, bits in itertools.product(given.models, given.bits):
        config = DecodeConfig(
            shape=shape, pattern=given.pattern, bits=bits, group_size=given.group_size, lengths=tuple(given.lengths),
            tokens=given.tokens, dtype=given.dtype, device="cpu", rounds=given.rounds,
        )  # fmt: skip
        kind = f"{shape} int{bits}" if bits else shape
        for threads in given.threads:
            torch.set_num_threads(threads)
            name = f"{kind}, {threads} thread{'s' if threads > 1 else ''}"
            measure_missing(config, document["models"].setdefault(name, {"cells": {}}), keep)


def begun(out: Path, what: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has measured in the same way, or an empty document."""
    if not out.is_file():
        return {"what": what, "software": software(), "hardware": hardware(), "kernel": ops.instructions(),
                "results": [], "models": {}}  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if found["what"] != what or found["software"] != software() or "models" not in found:
        raise SystemExit(f"{out} was measured in another way or with other software; name another file.")
    return found


def show(document: dict[str, Any]) -> None:
    """Both parts as tables."""
    linears = Table("linear", "batch", "threads", "torch, µs", "packed, µs", "torch ÷ packed", "dense C ÷ packed",
                    "packed int4, µs", "torch ÷ packed int4", "dense int4 ÷ packed int4")  # fmt: skip
    for result in document["results"]:
        times = result["microseconds"]
        linears.add_row(result["shape"], str(result["batch"]), str(result["threads"]), cell(times["torch"]),
                        cell(times["packed"]), cell(result["torch ÷ packed"], 2),
                        cell(result["dense C ÷ packed"], 2), cell(times["packed int4"]),
                        cell(result["torch ÷ packed int4"], 2),
                        cell(result["dense int4 ÷ packed int4"], 2))  # fmt: skip
    models = Table("model", "what", "dense, ms", "packed, ms", "dense ÷ packed", "load")
    for name, found in document["models"].items():
        for what, figures in found["cells"].items():
            models.add_row(name, what, cell(figures["dense"]["ms"]), cell(figures["packed"]["ms"]),
                           cell(figures["dense_over_packed"], 2), str(figures["load_average"]))  # fmt: skip
    for table in (linears, models):
        if table.row_count:
            screen_of().print(table)


def main() -> None:
    """Measure, print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="outputs x inputs of a linear")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="of linears")
    parser.add_argument("--models", nargs="*", default=MODELS, help="shapes of whole models, at batch 1")
    parser.add_argument("--bits", nargs="+", type=lambda word: int(word) or None, default=(None, 4),
                        help="of whole models' weights, 0 for the dtype's own")  # fmt: skip
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128, help="of weights of few bits")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--pattern", choices=("2:4", "unstructured"), default="2:4")
    parser.add_argument("--seconds", type=float, default=5.0, help="for a linear, batch and number of threads")
    parser.add_argument("--megabytes", type=int, default=192, help="of dense weights that a linear's calls go round")
    parser.add_argument("--tokens", type=int, default=64, help="that a model decodes")
    parser.add_argument("--lengths", nargs="*", type=int, default=(128, 512), help="of prompts that a model reads")
    parser.add_argument("--rounds", type=int, default=5, help="of a model")
    given = parser.parse_args()
    if reason := ops.available(getattr(torch, given.dtype)):
        raise SystemExit(f"No kernel: {reason}")
    torch.manual_seed(0)
    cells = ("out", "shapes", "batches", "models", "bits", "threads")
    what = json.loads(json.dumps({key: value for key, value in vars(given).items() if key not in cells}))
    document = begun(given.out, what)

    def keep() -> None:
        write_json(given.out, document)

    measure_linears(given, document, keep)
    measure_models(given, document, keep)
    show(document)


if __name__ == "__main__":
    main()
