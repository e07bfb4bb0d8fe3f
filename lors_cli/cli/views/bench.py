"""`lors bench` at the command line: its flags, its tables and its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lors_cli.bench.decode import DecodeConfig, bench_decode
from lors_cli.bench.measure import AUTHORS_LOG, BenchConfig, bench
from lors_cli.errors import UsageError
from lors_cli.files.atomic import write_bytes
from lors_cli.output import console

COLUMNS = ["method", "tokens/s", "step ÷ LoRA", "step ÷ LoRS", "saved", "peak"]
ONLY_TRAINING = ("methods", "ranks", "accumulation", "checkpointing", "steps")
ONLY_DECODING = ("pattern", "bits", "tokens")


def run_bench(flags: dict[str, Any], out: Path | None) -> None:
    """Measure, print the figures, and write bench.json and pictures where there is a folder for them."""
    if flags.pop("decode"):
        document = bench_decode(decode_settings(flags), out)
        _show_decoding(document)
    else:
        document = bench(parse_flags(flags), out)
        _show_training(document)
        if out is not None:
            _draw(document, out)
    if out is not None:
        console.path("bench", out)
    console.document(document)


def parse_flags(flags: dict[str, Any]) -> BenchConfig:
    """A BenchConfig from the command line's flags; a UsageError on one that cannot be."""
    given = _given(flags, ONLY_DECODING, "is for --decode")
    if "methods" in given:
        given["methods"] = tuple(part.strip() for part in given["methods"].split(",") if part.strip())
    ways = {"off": (False,), "on": (True,), "both": (False, True)}
    if "checkpointing" in given:
        if given["checkpointing"] not in ways:
            raise UsageError(f"--checkpointing: must be off, on or both, not {given['checkpointing']}.")
        given["checkpointing"] = ways[given["checkpointing"]]
    return BenchConfig(**given)


def decode_settings(flags: dict[str, Any]) -> DecodeConfig:
    """A DecodeConfig from the command line's flags; a UsageError on one that cannot be."""
    given = _given(flags, ONLY_TRAINING, "is of training steps: --decode has none")
    if "pattern" in given and "model" in given:
        raise UsageError("--pattern: a checkpoint has its own zeros.", "It is for --shape.")
    if "bits" in given and "model" in given:
        raise UsageError("--bits: a checkpoint has its own grids, or none.", "It is for --shape.")
    return DecodeConfig(**given)


def _given(flags: dict[str, Any], foreign: tuple[str, ...], why: str) -> dict[str, Any]:
    """The flags that were given, none of which may be `foreign`, as settings of either benchmark."""
    given = {name: value for name, value in flags.items() if value is not None}
    if wrong := [name for name in foreign if name in given]:
        raise UsageError(f"--{wrong[0]} {why}.")
    if "model" in given:
        given["shape"] = None
    for name in ("lengths", "ranks"):
        if name in given:
            parts = given[name].split(",")
            if not all(part.strip().isdecimal() for part in parts):
                raise UsageError(f"--{name}: must be whole numbers with commas between them, not {given[name]}.")
            given[name] = tuple(int(part) for part in parts)
    if given["dtype"] not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype: must be bfloat16, float16 or float32, not {given['dtype']}.")
    return given


def _show_training(document: dict[str, Any]) -> None:
    """A table a cell."""
    for name, cell in document["cells"].items():
        console.table(COLUMNS, table_rows(cell), title=name)
    seconds = AUTHORS_LOG["lora"][0]
    log = ", ".join(f"{name} {taken / seconds:.2f} at {gib:.0f} GiB" for name, (taken, gib) in AUTHORS_LOG.items())
    console.result(f"The LoRS authors' own log (A6000), step ÷ LoRA: {log}")


def _show_decoding(document: dict[str, Any]) -> None:
    """Dense and packed side by side."""
    console.table(["", "dense", "packed", "dense ÷ packed"], decode_rows(document))
    environment = document["environment"]
    how = environment["kernel"] or f"none: {environment['why_no_kernel']}"
    threads = console.counted(environment["threads"], "thread")
    console.result(f"{environment['device']}, {threads}, {environment['clock']}; kernel: {how}")


def decode_rows(document: dict[str, Any]) -> list[list[str]]:
    """The figures for people: two rows a cell, then the weights."""
    rows = []
    for name, cell in document["cells"].items():
        arms = [cell["dense"], cell["packed"]]
        unit = "ms a token" if name.startswith("decode") else "ms"
        rates = [f"{arm['tokens_per_s']['median']:,.1f}" for arm in arms]
        times = [f"{arm['ms']['median']:,.2f} ({arm['ms']['min']:,.2f}–{arm['ms']['max']:,.2f})" for arm in arms]
        ratio = cell["dense_over_packed"]
        rows.append([f"{name}, tokens/s", *rates, f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"])
        rows.append([f"{name}, {unit}", *times, ""])
    for label, key in (("weights", "bytes"), ("of them in packed linears", "packed_linears_bytes")):
        found = document["sizes"][key]
        rows.append([label, *(f"{found[arm] / 1e6:,.1f} MB" for arm in ("dense", "packed")),
                     f"{found['dense'] / found['packed']:.2f}"])  # fmt: skip
    return rows


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
