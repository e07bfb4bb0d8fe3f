"""Perplexity and time of pruning methods on SmolLM2-135M and given calibration tokens.

python benchmarks/methods.py --calibration TOKENS.safetensors --windows WINDOWS.safetensors --out results.json \
    sparsegpt:2:4 admm:2:4 sparsegpt:2:4:refit wanda:unstructured:owl

python benchmarks/methods.py --out results.json --table     prints what the file holds as Markdown

A cell is method:pattern with any of the options refit, sequential, whole (not sequential), permute, owl, reconstruct
(two epochs), reconstruct6, batchN (N sequences a forward pass); unstructured is 50 %. Cells that `--out` holds already
are not measured again.
`cpu_s` is the process's processor time while it prunes, over all its threads, which other work on the machine
disturbs less than `elapsed_s`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import MODEL

from lors_cli.evaluation.perplexity import token_perplexity
from lors_cli.files import atomic
from lors_cli.models.loading import load_model
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "refit": {"refit": True}, "sequential": {"true_sequential": True}, "whole": {"true_sequential": False},
    "permute": {"channel_permutation": True}, "owl": {"layer_sparsity": "owl"},
    "reconstruct": {"reconstruct_epochs": 2}, "reconstruct6": {"reconstruct_epochs": 6},
}  # fmt: skip


def parse_cell(cell: str, calibration: Path) -> PruneConfig:
    """`method:pattern[:option…]` as a config."""
    method, *rest = cell.split(":")
    pattern = rest.pop(0)
    if pattern != "unstructured":
        pattern += f":{rest.pop(0)}"
    sizes = [int(option.removeprefix("batch")) for option in rest if option.startswith("batch")]
    chosen = [option for option in rest if not option.startswith("batch")]
    changes: dict[str, Any] = {key: value for option in chosen for key, value in OPTIONS[option].items()}
    return PruneConfig(
        method=method,  # type: ignore[arg-type]
        pattern=pattern,
        sparsity=0.5 if pattern == "unstructured" else None,
        calibration=CalibrationConfig(dataset=str(calibration), batch_size=sizes[0] if sizes else 8),
        **changes,
    )


def measure(config: PruneConfig, model: ModelConfig, windows: Path) -> dict[str, Any]:
    """Prune once; perplexity over the windows, seconds in all and by phase."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        started, cpu_started = time.monotonic(), time.process_time()
        record = prune(config, model, out)
        elapsed, cpu = time.monotonic() - started, time.process_time() - cpu_started
        pruned = load_model(ModelConfig(path=str(out), dtype=model.dtype, device=model.device))
        ids = load_file(windows)["input_ids"].long()
        perplexity = token_perplexity(pruned, ids, batch_size=8)
    return {
        "perplexity": round(perplexity["value"], 3),
        "elapsed_s": round(elapsed, 1),
        "cpu_s": round(cpu, 1),
        "phases_s": record.metrics.get("phases_s"),
        "sparsity": record.metrics["sparsity"],
        "violations": record.metrics["violations"],
        "environment": {**record.environment, "platform": f"{platform.system()} {platform.machine()}"},
    }


PATTERNS = ("unstructured", "2:4", "4:8")


def table(results: dict[str, Any]) -> str:
    """Perplexity (processor minutes) of every method at every pattern, as a Markdown table a number format."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for key, result in results.items():
        cell, dtype = key.split()
        pattern = next(name for name in PATTERNS if f":{name}" in cell)
        method = cell.replace(f":{pattern}", "", 1).replace(":", " + ")
        minutes = result.get("cpu_s", 0) / 60
        rows.setdefault((dtype, method), {})[pattern] = f"{result['perplexity']:.2f} ({minutes:.1f})"
    lines = []
    for dtype in sorted({dtype for dtype, _ in rows}):
        lines += [f"| {dtype} | 50 % | 2:4 | 4:8 |", "|---|--:|--:|--:|"]
        lines += [f"| {method} | " + " | ".join(cells.get(name, "") for name in PATTERNS) + " |"
                  for (kind, method), cells in sorted(rows.items()) if kind == dtype]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure every cell that is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="method:pattern[:option…]")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    arguments = parser.parse_args()
    results = atomic.read_json(arguments.out) or {}
    if arguments.table:
        print(table(results))
    if arguments.cells and not (arguments.calibration and arguments.windows):
        parser.error("--calibration and --windows are needed to measure cells")
    model = ModelConfig(path=arguments.model, dtype=arguments.dtype, device=arguments.device)
    for cell in arguments.cells:
        key = f"{cell} {arguments.dtype}"
        if key not in results:
            results[key] = measure(parse_cell(cell, arguments.calibration), model, arguments.windows)
            atomic.write_json(arguments.out, results)
        shown = ("perplexity", "elapsed_s", "cpu_s", "phases_s")
        print(json.dumps({key: {name: results[key][name] for name in shown}}))


if __name__ == "__main__":
    main()
