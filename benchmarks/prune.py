"""Paired runs of `lors prune`, the reference codes' arithmetic, and the floor of two bare forward passes.

python benchmarks/prune.py --calibration TOKENS.safetensors --out results.json --rounds 3 --threads 1

Every arm of every round is a process of its own; arms run in an order that rotates from round to round. Figures:

    pruning_s           the phases that prune: forward passes, statistics, solving
    elapsed_s           all but loading: the first block's inputs too; for lors also imports, hashing, saving every
                        block (reading it, where it streams), and the checkpoint, which no other arm writes
    load_s, whole_s     loading model and tokenizer (0 for what is streamed); elapsed and loading together
    loaded_rss_mib      resident memory once loaded
    peak_rss_mib        the largest since then; whole_peak_rss_mib: with loading

`--out` is written after each round and a second call goes on from there, so give changed code another file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import reference
import torch
from cells import MODEL
from common import (
    cell,
    equal_share,
    first_block_masks,
    forward_floor,
    pruning_seconds,
    ratios,
    screen_of,
    software,
)
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from lors_cli.bench.measure import rotated, spread
from lors_cli.files import atomic, hashes
from lors_cli.models import blocks as models_blocks
from lors_cli.models import loading as models
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig
from lors_cli.sparsity import Pattern

SPARSITY = 0.5
FIGURES = ("pruning_s", "elapsed_s", "load_s", "whole_s", "loaded_rss_mib", "peak_rss_mib", "whole_peak_rss_mib",
           "peak_device_mib")  # fmt: skip
RATIO_FIGURES = ("pruning_s", "elapsed_s", "whole_s", "peak_rss_mib", "whole_peak_rss_mib")


@dataclass(frozen=True)
class Settings:
    """What every arm of a benchmark has in common.

    Args:
        model: as in `ModelConfig.path`.
        calibration: file with `input_ids` (samples, tokens).
        methods: of pruning.
        perplexity: file with `input_ids` (windows, tokens) to score the first round's results on.
        num_samples: calibration sequences; None for all in the file.
        batch_size: sequences a forward pass, in lors and the floor.
        blocks: how many decoder blocks are left in the model; None for all.
    """

    model: str
    calibration: str
    methods: tuple[str, ...]
    pattern: str = "2:4"
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 1
    perplexity: str | None = None
    num_samples: int | None = None
    batch_size: int = CalibrationConfig().batch_size
    blocks: int | None = None

    def model_config(self) -> ModelConfig:
        """Of the dense model."""
        return ModelConfig(path=self.model, dtype=self.dtype, device=self.device)  # type: ignore[arg-type]

    def prune_config(self, method: str) -> PruneConfig:
        """Of lors."""
        calibration = CalibrationConfig(
            dataset=self.calibration, num_samples=self.num_samples, batch_size=self.batch_size
        )
        sparsity = SPARSITY if self.pattern == "unstructured" else None
        return PruneConfig(method=method, pattern=self.pattern, sparsity=sparsity, calibration=calibration)  # type: ignore[arg-type]

    def batches(self) -> list[torch.Tensor]:
        """The calibration tokens as lors splits them."""
        tokens = load_file(self.calibration)["input_ids"][: self.num_samples].long()
        return list(tokens.split(self.batch_size))

    def arms(self) -> list[str]:
        """`floor`, and `reference METHOD` and `lors METHOD` for every method."""
        pairs = [[f"reference {method}"] * (method in reference.METHODS) + [f"lors {method}"]
                 for method in self.methods]  # fmt: skip
        return ["floor", *(arm for pair in pairs for arm in pair)]

    def as_written(self) -> dict[str, Any]:
        """For the results: files by name only."""
        perplexity = Path(self.perplexity).name if self.perplexity else None
        return hashes.plain(replace(self, calibration=Path(self.calibration).name, perplexity=perplexity))


# One arm, in a process of its own


def run_task(folder: Path) -> None:
    """Do what `task.json` in the folder says: truncate the model, or run an arm and write `result.json`."""
    task = json.loads((folder / "task.json").read_text())
    settings = Settings(**task["settings"])
    torch.set_num_threads(settings.threads)
    kind, _, method = task["arm"].partition(" ")
    if kind == "truncate":
        truncate(settings, folder / "model")
        return
    result, network = _lors(settings, method, folder) if kind == "lors" else _in_memory(settings, kind, method)
    if kind != "floor":
        save_file(first_block_masks(network), folder / "masks.safetensors")
        if settings.perplexity:
            result["perplexity"] = _perplexity(network, settings.perplexity)
    atomic.write_json(folder / "result.json", result)


def _in_memory(settings: Settings, kind: str, method: str) -> tuple[dict[str, Any], Any]:
    """The floor or the reference."""
    batches = settings.batches()
    with _loads_apart() as loading:
        network = models.load_model(settings.model_config())
    started = time.perf_counter()
    if kind == "floor":
        phases = forward_floor(network, batches)
    else:
        pattern = Pattern.of(settings.prune_config(method))
        phases = reference.prune_reference(network, batches, method, pattern)
    elapsed = time.perf_counter() - started
    return _figures(loading, elapsed, phases), network


def _lors(settings: Settings, method: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """`lors prune` as a user runs it, into the folder."""
    with _loads_apart() as loading:
        started = time.perf_counter()
        record = prune(settings.prune_config(method), settings.model_config(), folder / "pruned")
        elapsed = time.perf_counter() - started - loading["load_s"]
    result = _figures(loading, elapsed, record.metrics["phases_s"])
    return result, models.load_model(replace(settings.model_config(), path=str(folder / "pruned")))


@contextmanager
def _loads_apart() -> Iterator[dict[str, float]]:
    """Sum up what loading takes in this while, and let the peaks begin anew after it."""
    figures = {"load_s": 0.0, "loaded_rss_mib": _status_mib("VmRSS"), "whole_peak_rss_mib": 0.0}

    def apart(load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            loaded = load(*arguments, **options)
            figures["load_s"] += time.perf_counter() - started
            figures["loaded_rss_mib"] = _status_mib("VmRSS")
            figures["whole_peak_rss_mib"] = max(figures["whole_peak_rss_mib"], _status_mib("VmHWM"))
            _reset_peaks()
            return loaded

        return timed

    model, tokenizer = apart(models.load_model), apart(models.load_tokenizer)
    with mock.patch.object(models, "load_model", model), mock.patch.object(models, "load_tokenizer", tokenizer):
        yield figures


def _reset_peaks() -> None:
    with suppress(OSError):  # a kernel without it: the peak is of loading too
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _figures(loading: Mapping[str, float], elapsed: float, phases: Mapping[str, float]) -> dict[str, Any]:
    """All of an arm's figures, at its end.

    Args:
        loading: from `_loads_apart`.
        elapsed: seconds without loading.
        phases: seconds a phase.
    """
    peak = _status_mib("VmHWM")
    figures = {
        **loading,
        "pruning_s": pruning_seconds(phases),
        "elapsed_s": elapsed,
        "whole_s": loading["load_s"] + elapsed,
        "phases_s": phases,
        "peak_rss_mib": peak,
        "whole_peak_rss_mib": max(peak, loading["whole_peak_rss_mib"]),
    }
    if torch.cuda.is_available():
        figures["peak_device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def _status_mib(key: str) -> float:
    """A figure of /proc/self/status; unlike ru_maxrss its peak is not inherited from the parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def _perplexity(network: Any, windows: str) -> float:
    from lors_cli.evaluation.perplexity import token_perplexity

    return token_perplexity(network, load_file(windows)["input_ids"].long(), batch_size=8)["value"]


def truncate(settings: Settings, out: Path) -> None:
    """Write the model with only its first `blocks` decoder blocks."""
    network = models.load_model(settings.model_config())
    _, blocks = models_blocks.decoder_blocks(network)
    del blocks[settings.blocks :]
    config = network.config.get_text_config()
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(blocks)]
    models.save_checkpoint(network, models.load_tokenizer(settings.model_config()), out)


# Rounds


def spawn(folder: Path, threads: int) -> None:
    """`run_task` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "task", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{done.stderr}")


def run_round(settings: Settings, number: int, scratch: Path, screen: Console) -> dict[str, Any]:
    """Every arm once.

    Args:
        settings: the model may be the truncated one.
        number: of the round, from 0; decides the order and whether perplexity is measured.
        scratch: an empty folder.
        screen: for a line an arm.

    Returns:
        `order`, `arms` with the figures of each, `masks` with the shares by method and linear.
    """
    order = rotated(settings.arms(), number)
    own_settings = settings if number == 0 else replace(settings, perplexity=None)
    arms = {}
    for arm in order:
        folder = scratch / arm.replace(" ", "-")
        atomic.write_json(folder / "task.json", {"arm": arm, "settings": asdict(own_settings)})
        spawn(folder, settings.threads)
        arms[arm] = json.loads((folder / "result.json").read_text())
        screen.print(f"round {number + 1}  {arm:<20} {arms[arm]['pruning_s']:8.2f} s  {_phases(arms[arm]['phases_s'])}")
    masks = {method: equal_share(*(load_file(scratch / f"{kind}-{method}" / "masks.safetensors")
                                   for kind in ("lors", "reference")))
             for method in settings.methods if method in reference.METHODS}  # fmt: skip
    return {"order": order, "arms": arms, "masks": masks}


def summarise(rounds: Sequence[Mapping[str, Any]], settings: Settings) -> dict[str, Any]:
    """Medians and spreads of every arm, ratios of arms round by round, the first round's masks and perplexities."""
    results = [number["arms"] for number in rounds]
    arms: dict[str, Any] = {}
    for arm, first in results[0].items():
        figures = {key: spread([result[arm][key] for result in results]) for key in FIGURES if key in first}
        phases = {name: spread([result[arm]["phases_s"].get(name, 0.0) for result in results])["median"]
                  for name in first["phases_s"]}  # fmt: skip
        arms[arm] = {**figures, "phases_s": phases, "perplexity": first.get("perplexity")}
    quotients: dict[str, Any] = {}
    for method in settings.methods:
        pairs = [("lors", f"lors {method}", "floor", "floor")]
        if method in reference.METHODS:
            pairs += [("lors", f"lors {method}", "reference", f"reference {method}"),
                      ("floor", "floor", "reference", f"reference {method}")]  # fmt: skip
        quotients[method] = {f"{over}/{under}": {key: ratios(results, over_arm, under_arm, key)
                                                 for key in RATIO_FIGURES}
                             for over, over_arm, under, under_arm in pairs}  # fmt: skip
    return {"rounds": len(rounds), "arms": arms, "ratios": quotients, "masks": rounds[0]["masks"]}


def show(summary: Mapping[str, Any], screen: Console) -> None:
    """The summary as tables: arms, ratios, masks."""
    table = Table("arm", *FIGURES[:-1], "perplexity", title=f"median of {summary['rounds']} rounds (smallest–largest)")
    for arm, figures in summary["arms"].items():
        seconds = [cell(figures[key], 2) for key in FIGURES if key.endswith("_s")]
        mebibytes = [cell(figures[key], 0) for key in FIGURES[:-1] if key.endswith("_mib")]
        perplexity = f"{figures['perplexity']:.2f}" if figures["perplexity"] else ""
        table.add_row(arm, *seconds, *mebibytes, perplexity)
    screen.print(table)
    for arm, figures in summary["arms"].items():
        screen.print(f"{arm:<20} {_phases(figures['phases_s'])}")
    table = Table("method", "ratio", *RATIO_FIGURES)
    for method, quotients in summary["ratios"].items():
        for name, figures in quotients.items():
            table.add_row(method, name, *(cell(figures[key], 3) for key in RATIO_FIGURES))
    screen.print(table)
    for method, shares in summary["masks"].items():
        text = "  ".join(f"{name} {share:.4%}" for name, share in shares.items())
        screen.print(f"equal mask entries in the first block, lors and reference, {method}: {text}")


def _phases(phases: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())


def benchmark(settings: Settings, num_rounds: int, out: Path, screen: Console) -> dict[str, Any]:
    """Run the rounds that `out` does not hold yet, and write and show them all.

    Args:
        settings: of all arms.
        num_rounds: in all.
        out: JSON file.
        screen: for progress and tables.

    Returns:
        What `out` holds.
    """
    written = settings.as_written()
    results = atomic.read_json(out) or {**software(), "settings": written, "rounds": []}
    if results["settings"] != written:
        raise SystemExit(f"{out} holds rounds of other settings: {results['settings']}")
    with tempfile.TemporaryDirectory() as scratch:
        if len(results["rounds"]) < num_rounds and settings.blocks:
            folder = Path(scratch) / "truncated"
            atomic.write_json(folder / "task.json", {"arm": "truncate", "settings": asdict(settings)})
            spawn(folder, settings.threads)
            settings = replace(settings, model=str(folder / "model"))
        for number in range(len(results["rounds"]), num_rounds):
            with tempfile.TemporaryDirectory(dir=scratch) as round_scratch:
                results["rounds"].append(run_round(settings, number, Path(round_scratch), screen))
            results["summary"] = summarise(results["rounds"], settings)
            atomic.write_json(out, results)
    show(results["summary"], screen)
    return results


def main() -> None:
    """Run the rounds, or with `task FOLDER` one arm."""
    if sys.argv[1:2] == ["task"]:
        from lors_cli.output import console

        console.configure(verbosity=-1)
        run_task(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="safetensors file with input_ids (samples, tokens)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "admm"])
    parser.add_argument("--pattern", default="2:4", help="N:M, or unstructured (half of the weights)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="only so many decoder blocks")
    parser.add_argument("--num-samples", type=int, help="only so many calibration sequences")
    parser.add_argument("--batch-size", type=int, default=CalibrationConfig().batch_size)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--perplexity", help="safetensors file with input_ids (windows, tokens)")
    arguments = vars(parser.parse_args())
    out, num_rounds = arguments.pop("out"), arguments.pop("rounds")
    settings = Settings(**{**arguments, "methods": tuple(arguments["methods"])})
    benchmark(settings, num_rounds, out, screen_of())


if __name__ == "__main__":
    main()
