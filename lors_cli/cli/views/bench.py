"""`lors bench` at the command line: its flags, its tables and its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lors_cli.bench.measure import AUTHORS_LOG, BenchConfig, bench
from lors_cli.errors import UsageError
from lors_cli.files.atomic import write_bytes
from lors_cli.output import console

COLUMNS = ["method", "tokens/s", "step ÷ LoRA", "step ÷ LoRS", "saved", "peak"]


def run_bench(flags: dict[str, Any], out: Path | None) -> None:
    """Measure, print a table a cell, and write bench.json and the figures where there is a folder for them."""
    document = bench(parse_flags(flags), out)
    for name, cell in document["cells"].items():
        console.table(COLUMNS, table_rows(cell), title=name)
    seconds = AUTHORS_LOG["lora"][0]
    log = ", ".join(f"{name} {taken / seconds:.2f} at {gib:.0f} GiB" for name, (taken, gib) in AUTHORS_LOG.items())
    console.result(f"The LoRS authors' own log (A6000), step ÷ LoRA: {log}")
    if out is not None:
        _draw(document, out)
        console.path("bench", out)
    console.document(document)


def parse_flags(flags: dict[str, Any]) -> BenchConfig:
    """A BenchConfig from the command line's flags; a UsageError on one that cannot be."""
    given = {name: value for name, value in flags.items() if value is not None}
    if "model" in given:
        given["shape"] = None
    for name in ("lengths", "ranks"):
        parts = given[name].split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"--{name}: must be whole numbers with commas between them, not {given[name]}.")
        given[name] = tuple(int(part) for part in parts)
    if "methods" in given:
        given["methods"] = tuple(part.strip() for part in given["methods"].split(",") if part.strip())
    ways = {"off": (False,), "on": (True,), "both": (False, True)}
    if given["checkpointing"] not in ways:
        raise UsageError(f"--checkpointing: must be off, on or both, not {given['checkpointing']}.")
    given["checkpointing"] = ways[given["checkpointing"]]
    if given["dtype"] not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype: must be bfloat16, float16 or float32, not {given['dtype']}.")
    return BenchConfig(**given)


def table_rows(cell: dict[str, Any]) -> list[list[str]]:
    """A cell's figures for people, a row a method."""
    rows = []
    for name, figures in cell.items():
        if "failed" in figures:
            rows.append([name, figures["failed"], "", "", "", ""])
            continue
        rates = figures["tokens_per_s"]
        over = [figures.get(f"step_over_{other}", {}).get("median") for other in ("lora", "lors")]
        rows.append([
            name, f"{rates['median']:,.0f} ({rates['min']:,.0f}–{rates['max']:,.0f})",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in over),
            console.gib(figures["saved_bytes"]), console.gib(figures["peak_bytes"]),
        ])  # fmt: skip
    return rows


def _draw(document: dict[str, Any], out: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.warn("the package matplotlib is not installed: no figures are drawn (pip install matplotlib).")
        return
    from lors_cli.bench.figures import draw

    for name, content in draw(document).items():
        write_bytes(out / f"{name}.png", content)
        console.detail(f"  {out / name}.png")
