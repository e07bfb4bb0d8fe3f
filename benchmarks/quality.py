"""LoRS against SQFT, SPP and HiRA at equal steps and data, each at its own learning rate, on SmolLM2-135M.

python benchmarks/quality.py --data-dir DATA --work FOLDER --out results.json          search, then the comparison
python benchmarks/quality.py --out results.json --table                                what the file holds, as Markdown

1. SmolLM2-135M is pruned 2:4 by SparseGPT and by Wanda, in bfloat16.
2. Search: on the SparseGPT model with seed 0, every method is tuned at the learning rates of `GRID`, the middle ones
   first, outwards for as long as the best is at the edge. The best has the lowest loss on held-out instructions.
3. Comparison: at these rates, seeds 0 and 1 on SparseGPT's model and seed 0 on Wanda's: held-out loss, perplexity of
   WikiText-2 (wikitext2-lines), accuracy on the seven tasks.

A cell is one run; those that `--out` holds already are not measured again, and a killed run goes on from its last
training checkpoint in `--work`. `--budget MINUTES` starts no cell after so long, `--cells` measures the named ones
alone (two processes, one a core, are quicker than one with two threads), `--steps`, `--limit`, `--windows` its size.
Held-out samples are rows of the instruction file that no run is tuned on. `lors-kaiming-65` runs 65 steps, which take
LoRS about as long as 50 take SQFT.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cells import add_places, require_places
from common import software

from lors_cli.data.samples import IGNORED, PadCollator
from lors_cli.data.tokens import tuning_samples
from lors_cli.evaluation.stage import evaluate
from lors_cli.files import atomic, records
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import (
    CalibrationConfig,
    DistillConfig,
    EvalConfig,
    ModelConfig,
    PruneConfig,
    TuneConfig,
    TuneDataConfig,
)
from lors_cli.tuning.head import causal_lm_loss
from lors_cli.tuning.stage import tune

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_TRIED = (3e-4, 1e-3)
HELD_OUT = 200
SPLIT_SEED = 0
MAX_LENGTH = 512

Figures = dict[str, Any]

LORS: dict[str, Any] = {"method": "lors", "rounding": "nearest"}  # what is better at small rates: precision.py
METHODS: dict[str, dict[str, Any]] = {
    "lors": LORS,
    "lors-kaiming": {**LORS, "init": "kaiming"},
    "sqft": {"method": "sqft"},
    "spp": {"method": "spp"},
    "hira": {"method": "hira"},
    "lors-kaiming-norms": {**LORS, "init": "kaiming", "train_norms": True},
    "lors-kaiming-norms5": {**LORS, "init": "kaiming", "train_norms": True, "norms_lr_ratio": 5.0},
    "lors-kaiming-plus4": {**LORS, "init": "kaiming", "loraplus_lr_ratio": 4.0},
    "lors-kaiming-distill": {**LORS, "init": "kaiming", "distill": DistillConfig()},
    "lors-kaiming-65": {**LORS, "init": "kaiming", "max_steps": 65},
}
"""What is compared; further rows may be added, their cells are measured then."""


class OutOfTime(Exception):
    """The budget is used up: the rest another day."""


def split_rows(data_dir: Path, folder: Path) -> tuple[Path, Path]:
    """Write Alpaca in two files: to tune on, and held out.

    Args:
        data_dir: with alpaca/train.jsonl.gz.
        folder: where they go.
    """
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if not held_out.is_file():
        with gzip.open(data_dir / "alpaca/train.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = file.readlines()
        random.Random(SPLIT_SEED).shuffle(lines)
        atomic.write_text(train, "".join(lines[HELD_OUT:]))
        atomic.write_text(held_out, "".join(lines[:HELD_OUT]))
    return train, held_out


@torch.no_grad()
def held_out_loss(checkpoint: Path, rows: Path) -> float:
    """Mean negative log-likelihood of the held-out responses' tokens, in nats.

    Args:
        checkpoint: a model's folder.
        rows: instruction rows.
    """
    source = ModelConfig(path=str(checkpoint))
    model, tokenizer = load_model(source), load_tokenizer(source)
    config = TuneDataConfig(dataset=str(rows), max_length=MAX_LENGTH)
    samples = tuning_samples(config, tokenizer, seed=0, num_needed=None, model_max_length=8192, data_dir=None).samples
    samples.sort(key=lambda sample: len(sample["input_ids"]))
    collator = PadCollator(tokenizer.pad_token_id)
    total, count = 0.0, 0
    for first in range(0, len(samples), 8):
        batch = {key: value.to(model.device) for key, value in collator(samples[first : first + 8]).items()}
        num_labels = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(causal_lm_loss(model, batch)) * num_labels
        count += num_labels
    return total / count


class Sweep:
    """The cells of one results file.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.cells: dict[str, Figures] = atomic.read_json(options.out) or {}
        self.started = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        self.train, self.held_out = split_rows(options.data_dir, self.work)

    def cell(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """A cell's figures, measured unless the file has them."""
        if name not in self.cells:
            budget = self.options.budget
            if budget is not None and time.monotonic() - self.started > 60 * budget:
                raise OutOfTime
            print(f"{time.strftime('%H:%M')} {name}", flush=True)
            self.cells[name] = {**measure(), **software()}
            atomic.write_json(self.options.out, self.cells)
            shown = {key: value for key, value in self.cells[name].items() if key in ("held_out_loss", "wikitext2")}
            print(f"{time.strftime('%H:%M')} {name} {shown}", flush=True)
        return self.cells[name]

    def pruned(self, pruner: str) -> Path:
        """The sparse model of a pruning method, made once."""
        out = self.work / f"pruned-{pruner}"
        config = PruneConfig(method=pruner, calibration=CalibrationConfig(  # type: ignore[arg-type]
            dataset=str(self.options.calibration)))  # fmt: skip
        if records.read_record(out) is None:
            prune(config, ModelConfig(path=self.options.model), out)
        return out

    def score(self, checkpoint: Path, name: str, *, tasks: bool) -> Figures:
        """Held-out loss and perplexity of a model, and its accuracies where asked for."""
        figures: Figures = {"held_out_loss": round(held_out_loss(checkpoint, self.held_out), 5)}
        config = EvalConfig(tasks=EvalConfig().tasks if tasks else (), perplexity=("wikitext2-lines",),
                            limit=self.options.limit, perplexity_windows=self.options.windows,
                            perplexity_length=512)  # fmt: skip
        folder = self.work / "eval" / name.replace("/", "-").replace(" ", "-")
        found = evaluate(config, {"model": ModelConfig(path=str(checkpoint))}, folder, data_dir=self.options.data_dir)
        figures["wikitext2"] = round(found["model"]["perplexity"]["wikitext2-lines"]["value"], 3)
        if tasks:
            figures["tasks"] = {task: scores["acc"] for task, scores in found["model"]["tasks"].items()}
            figures["mean_acc"] = round(found["model"]["average"]["value"], 5)
        return figures

    def tuned(self, method: str, pruner: str, rate: float, seed: int) -> Path:
        """The folder of a tuned model, made once."""
        out = self.work / "tuned" / f"{method}-{pruner}-{rate:g}-{seed}"
        settings = dict(METHODS[method])
        source = ModelConfig(path=str(self.pruned(pruner)), dtype=settings.pop("dtype", "auto"))
        max_steps = settings.pop("max_steps", self.options.steps)
        config = TuneConfig(
            rank=16, alpha=16, learning_rate=rate, warmup_steps=max_steps // 10, batch_size=20,
            per_device_batch_size=4, max_steps=max_steps, save_steps=20, seed=seed,
            data=TuneDataConfig(dataset=str(self.train), max_length=MAX_LENGTH), **settings,
        )  # fmt: skip
        if records.read_record(out) is None:
            tune(config, source, out)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return out

    def run(self, method: str, pruner: str, rate: float, seed: int, *, tasks: bool) -> Figures:
        """Tune and score one model."""
        out = self.tuned(method, pruner, rate, seed)
        record = records.read_record(out)
        assert record is not None
        return {"first_loss": record.metrics["first_loss"], "last_loss": record.metrics["last_loss"],
                "tokens_per_s": record.metrics["tokens_per_s"], "elapsed_s": record.elapsed_s,
                **self.score(out, out.name, tasks=tasks)}  # fmt: skip

    def search(self, method: str) -> float:
        """The learning rate of `GRID` with the lowest held-out loss."""
        losses: dict[int, float] = {}
        wanted = [GRID.index(rate) for rate in FIRST_TRIED]
        while wanted:
            index = wanted.pop()
            losses[index] = self.tried(method, GRID[index])
            best = min(losses, key=losses.__getitem__)
            if not wanted:
                wanted = [near for near in (best - 1, best + 1) if 0 <= near < len(GRID) and near not in losses]
        return GRID[min(losses, key=losses.__getitem__)]

    def tried(self, method: str, rate: float) -> float:
        """The held-out loss at one learning rate; a run that broke counts as infinite."""
        from lors_cli.errors import UsageError

        def measure() -> Figures:
            try:
                return self.run(method, "sparsegpt", rate, 0, tasks=False)
            except UsageError as error:
                if not error.message.startswith("training broke"):
                    raise
                return {"held_out_loss": None, "broke": error.message}

        loss = self.cell(f"search {method} {rate:g}", measure)["held_out_loss"]
        return float("inf") if loss is None else loss

    def all(self) -> None:
        """Every cell, as far as the budget goes."""
        for pruner in ("sparsegpt", "wanda"):
            self.cell(f"pruned {pruner}", lambda pruner=pruner: self.score(self.pruned(pruner), pruner, tasks=True))
        chosen = {method: self.search(method) for method in self.options.methods}
        for pruner, seed in (("sparsegpt", 0), ("wanda", 0), ("sparsegpt", 1)):
            for method, rate in chosen.items():
                self.compared(method, pruner, rate, seed)

    def some(self, names: list[str]) -> None:
        """The cells of these names, in this order; a comparison runs at the best rate that the file holds."""
        for name in names:
            match name.split():
                case ["search", method, rate]:
                    self.tried(method, float(rate))
                case [pruner, "seed", seed, method]:
                    self.compared(method, pruner, self.best_rate(method), int(seed))
                case _:
                    raise SystemExit(f"no cell is called {name!r}")

    def best_rate(self, method: str) -> float:
        """The rate with the lowest held-out loss among the cells that the file holds."""
        losses = {rate: self.cells.get(f"search {method} {rate:g}", {}).get("held_out_loss") for rate in GRID}
        found = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not found:
            raise SystemExit(f"no learning rate of {method} was tried yet")
        return min(found, key=found.__getitem__)

    def compared(self, method: str, pruner: str, rate: float, seed: int) -> None:
        """One cell of the comparison."""
        self.cell(f"{pruner} seed {seed} {method}", lambda: {
            "learning_rate": rate, **self.run(method, pruner, rate, seed, tasks=True)})  # fmt: skip


def table(cells: dict[str, Figures]) -> Iterator[str]:
    """Search and comparison as Markdown."""
    yield "| learning rate | " + " | ".join(f"{rate:g}" for rate in GRID) + " |"
    yield "|---|" + "--:|" * len(GRID)
    for method in METHODS:
        found = [cells.get(f"search {method} {rate:g}", {}).get("held_out_loss") for rate in GRID]
        yield f"| {method} | " + " | ".join("" if loss is None else f"{loss:.4f}" for loss in found) + " |"
    yield ""
    yield "| model | learning rate | held-out loss | WikiText-2 | mean acc |"
    yield "|---|--:|--:|--:|--:|"
    for name, figures in cells.items():
        if "mean_acc" in figures:
            rate = figures.get("learning_rate")
            yield (
                f"| {name} | {'' if rate is None else f'{rate:g}'} | {figures['held_out_loss']:.4f} | "
                f"{figures['wikitext2']:.2f} | {100 * figures['mean_acc']:.2f} |"
            )


def main() -> None:
    """Read the command line, measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    add_places(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--cells", nargs="+", metavar="NAME",
                        help='these alone, such as "search spp 0.03" or "wanda seed 0 spp"')  # fmt: skip
    parser.add_argument("--budget", type=float, help="minutes after which no further cell is begun")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.out.read_text()))))
        return
    require_places(parser, options)
    try:
        sweep = Sweep(options)
        sweep.some(options.cells) if options.cells else sweep.all()
    except OutOfTime:
        print("the budget is used up; the same command goes on")


if __name__ == "__main__":
    main()
