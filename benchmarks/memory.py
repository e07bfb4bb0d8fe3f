"""Peak memory of `lors prune`: that of one decoder block and the calibration activations, never the model's.

python benchmarks/memory.py --shape llama3-8b --blocks 1 2 --methods sparsegpt --scratch /tmp --out results.json
python benchmarks/memory.py --out results.json                   prints what the file holds, and the estimates

Every case is a random bfloat16 checkpoint of a known shape with so many blocks (made on disk, tensor by tensor), and
`lors prune` as a process of its own, whose /proc/PID/status is read every 50 ms. Figures, in bytes:

    peak_anon       memory proper (RssAnon): what the process cannot do without
    peak_rss        VmHWM: with pages of the memory-mapped checkpoint, which the kernel may drop at any time
    hidden_states   the calibration samples between two blocks; beyond_hidden is peak_anon without them
    estimate        what `lors prune --dry-run` says (lors_cli.pruning.estimate)
    parts           of the estimate; libraries are not among them

Cases that `--out` holds already are not measured again. Estimates without a run, for whole models, stand below.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import screen_of, software
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lors_cli.files import atomic
from lors_cli.models.loading import MAX_SHARD_SIZE
from lors_cli.models.shapes import SHAPES, Shape
from lors_cli.models.size import ModelSize
from lors_cli.models.tensor_files import Entry, write_checkpoint
from lors_cli.pruning.estimate import memory_parts, needs
from lors_cli.recipe.schema import CalibrationConfig, PruneConfig

GIB = 1 << 30
DTYPE = torch.bfloat16
SAMPLED_EVERY_S = 0.05
WHOLE_MODELS = {
    "llama3-8b": SHAPES["llama3-8b"],
    "llama3-70b": Shape(("meta-llama/Meta-Llama-3-70B",), 8192, 28672, 80, 64, 8, 128256, 8192),
}
BATCH_SIZES = (CalibrationConfig().batch_size, 1)


@dataclass(frozen=True)
class Case:
    """One run of `lors prune`.

    Args:
        shape: a key of `SHAPES`.
        blocks: decoder blocks of the checkpoint.
        method: of pruning.
        num_samples: calibration sequences.
        sequence_length: tokens a sequence.
        batch_size: sequences a forward pass.
        pattern: N:M.
        threads: of torch.
    """

    shape: str
    blocks: int
    method: str
    num_samples: int
    sequence_length: int
    batch_size: int = 1
    pattern: str = "2:4"
    threads: int = 1

    @property
    def sizes(self) -> Shape:
        """The shape with this many blocks."""
        return replace(SHAPES[self.shape], num_layers=self.blocks)

    def prune_config(self) -> PruneConfig:
        """The stage's settings; only the calibration's source is left out."""
        calibration = CalibrationConfig(
            num_samples=self.num_samples, sequence_length=self.sequence_length, batch_size=self.batch_size
        )
        return PruneConfig(method=self.method, pattern=self.pattern, calibration=calibration)  # type: ignore[arg-type]


def size_of(shape: Shape) -> ModelSize:
    """A Llama's sizes from its shape alone."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    keys = hidden // shape.num_heads * shape.num_kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    prunable = shape.num_layers * sum(rows * columns for rows, columns in linears.values())
    norms = (2 * shape.num_layers + 1) * hidden
    return ModelSize(
        num_parameters=prunable + norms + shape.vocab_size * hidden * (1 if shape.tied else 2),
        layers=tuple(
            (f"model.layers.{block}.{name}", rows, columns, False)
            for block in range(shape.num_layers)
            for name, (rows, columns) in linears.items()
        ),
        hidden_size=hidden,
        intermediate_size=wide,
        num_blocks=shape.num_layers,
        vocab_size=shape.vocab_size,
        max_length=shape.max_length,
        bytes_a_weight=DTYPE.itemsize,
    )


# The checkpoint


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a model of random weights with a tokenizer; one tensor at a time is in memory."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(shape.config(), dtype=DTYPE)
    folder.mkdir(parents=True)
    network.config.save_pretrained(folder)
    tied = network.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name not in tied}
    loaders = [(Entry.of(name, tensor), partial(_random, tuple(tensor.shape))) for name, tensor in tensors.items()]
    write_checkpoint(folder, loaders, max_shard_size=MAX_SHARD_SIZE)
    words = models.WordLevel({f"w{token}": token for token in range(shape.vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1").save_pretrained(folder)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """A matrix of small numbers, or ones for a norm."""
    return torch.ones(shape, dtype=DTYPE) if len(shape) == 1 else torch.empty(shape, dtype=DTYPE).normal_(std=0.02)


def make_calibration(case: Case, path: Path) -> None:
    """Write random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.num_samples, case.sequence_length)
    save_file({"input_ids": torch.randint(case.sizes.vocab_size, shape, generator=generator)}, path)


# One run


def watch(command: Sequence[str], threads: int, log: Path) -> dict[str, Any]:
    """Run a command to its end.

    Args:
        command: an executable that does its work in one process.
        threads: of torch.
        log: file for what it prints.

    Returns:
        Peaks in bytes, when memory proper was at its peak, and how long it all took.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    peaks = {"RssAnon": 0, "VmHWM": 0}
    peak_at = 0.0
    started = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                for key, value in _status(process.pid).items():
                    if key == "RssAnon" and value > peaks[key]:
                        peak_at = time.monotonic() - started
                    peaks[key] = max(peaks[key], value)
                time.sleep(SAMPLED_EVERY_S)
        finally:
            process.kill()
            process.wait()
    elapsed = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()}")
    return {"peak_anon": peaks["RssAnon"], "peak_anon_at_s": round(peak_at, 1), "peak_rss": peaks["VmHWM"],
            "elapsed_s": round(elapsed, 1)}  # fmt: skip


def _status(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM in bytes; nothing for a process that has just ended."""
    with suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[0] in ("RssAnon:", "VmHWM:")}
    return {}


def measure(case: Case, checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """One case's settings and figures.

    Args:
        case: of the checkpoint's shape.
        checkpoint: the dense model.
        scratch: an empty folder.
    """
    make_calibration(case, scratch / "tokens.safetensors")
    command = [
        sys.executable, "-m", "lors_cli", "prune", str(checkpoint), "--out", str(scratch / "pruned"),
        "--method", case.method, "--pattern", case.pattern, "--calibration", str(scratch / "tokens.safetensors"),
        "--num-samples", str(case.num_samples), "--sequence-length", str(case.sequence_length),
        "--device", "cpu", "--dtype", "bfloat16", "--quiet", f"calibration.batch_size={case.batch_size}",
    ]  # fmt: skip
    figures = watch(command, case.threads, scratch / "log.txt")
    size = size_of(case.sizes)
    hidden = case.num_samples * case.sequence_length * size.hidden_size * DTYPE.itemsize
    return {
        **asdict(case),
        "checkpoint": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        **figures,
        "hidden_states": hidden,
        "beyond_hidden": figures["peak_anon"] - hidden,
        **_estimated(case.prune_config(), size),
    }


def _estimated(config: PruneConfig, size: ModelSize) -> dict[str, Any]:
    return {"estimate": needs(config, size).memory, "parts": memory_parts(config, size)}


# All of them


def whole_models(methods: Sequence[str] = ("sparsegpt", "wanda", "admm")) -> list[dict[str, Any]]:
    """What pruning whole models on 128 × 2048 tokens would need, by arithmetic."""
    rows = []
    for name, shape in WHOLE_MODELS.items():
        for method in methods:
            for batch_size in BATCH_SIZES:
                case = Case(name, shape.num_layers, method, 128, 2048, batch_size)
                size, config = size_of(shape), case.prune_config()
                rows.append({**asdict(case), "checkpoint": size.num_bytes, **_estimated(config, size)})
                del rows[-1]["threads"]
    return rows


def show(results: Mapping[str, Any], screen: Console) -> None:
    """Measured and estimated cases as tables, in GiB."""
    columns = ("peak_anon", "hidden_states", "beyond_hidden", "peak_rss", "estimate", "elapsed_s")
    _table("measured, GiB", results["rows"], columns, screen)
    rows = [{**row, "hidden_states": row["parts"]["hidden_states"]} for row in results["estimates"]]
    _table("by arithmetic, GiB", rows, ("hidden_states", "estimate"), screen)


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], screen: Console) -> None:
    table = Table("shape", "blocks", "method", "samples × tokens", "batch", "checkpoint", *columns, title=title)
    for row in rows:
        cells = [f"{row[key]:.0f}" if key == "elapsed_s" else f"{row[key] / GIB:.2f}"
                 for key in ("checkpoint", *columns)]  # fmt: skip
        samples = f"{row['num_samples']} × {row['sequence_length']}"
        table.add_row(row["shape"], str(row["blocks"]), row["method"], samples, str(row["batch_size"]), *cells)
    screen.print(table)


def benchmark(cases: Sequence[Case], scratch: Path | None, out: Path, screen: Console) -> dict[str, Any]:
    """Measure the cases that `out` does not hold yet, and write and show them all.

    Args:
        cases: in order; those of one checkpoint one after the other.
        scratch: folder with room for twice the largest checkpoint and its sparse copy; None for the system's.
        out: JSON file.
        screen: for progress and tables.

    Returns:
        What `out` holds.
    """
    results = atomic.read_json(out) or {**software(), "rows": []}
    results["estimates"] = whole_models()
    done = [{key: row[key] for key in Case.__dataclass_fields__} for row in results["rows"]]
    missing = [case for case in cases if asdict(case) not in done]
    for case, checkpoint, folder in _prepared(missing, scratch, screen.print):
        results["rows"].append(measure(case, checkpoint, folder))
        atomic.write_json(out, results)
    atomic.write_json(out, results)
    show(results, screen)
    return results


def _prepared(
    cases: Sequence[Case], scratch: Path | None, say: Callable[[str], None]
) -> Iterator[tuple[Case, Path, Path]]:
    """Every case with its checkpoint and an empty folder; both are gone after the last case that needs them."""
    for sizes in dict.fromkeys((case.shape, case.blocks) for case in cases):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            own = [case for case in cases if (case.shape, case.blocks) == sizes]
            say(f"{own[0].shape} with {own[0].blocks} blocks: writing a checkpoint")
            make_checkpoint(own[0].sizes, Path(folder) / "dense")
            for case in own:
                say(f"{case.shape} with {case.blocks} blocks: pruning by {case.method}")
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    yield case, Path(folder) / "dense", Path(work)


def main() -> None:
    """Measure one shape with every number of blocks and every method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", choices=[*SHAPES])
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="decoder blocks of each checkpoint")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt"], choices=["sparsegpt", "wanda", "admm"])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    cases = [Case(given.shape, blocks, method, given.num_samples, given.sequence_length, given.batch_size,
                  threads=given.threads) for blocks in given.blocks for method in given.methods]  # fmt: skip
    benchmark(cases, given.scratch, given.out, screen_of())


if __name__ == "__main__":
    main()
