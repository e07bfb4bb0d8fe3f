"""Quality over core-hours: which start, method, text, loss and rate give the best 2:4 SmolLM2-135M, by halving.

python benchmarks/frontier.py --work FOLDER --data-dir DATA --calibration TOKENS --jobs 2   measures what is missing
python benchmarks/frontier.py --plot docs/frontier.png --page docs/frontier.md              figure and table

`plan` says which trials are worth running, given those that are there:
1. every start untuned; every method on one start and web text, at learning rates outwards from its first one until
   the best is not at the edge;
2. the best method, at its rate, with every text and loss;
3. with the best text and loss the three best methods, among them LoRS, with two seeds, on the start that is best
   untuned, for what its pruning leaves of an hour and a half (a worse start was never ahead after that);
4. the best of those for six hours, from a start that takes an hour and a half of them.
Trials are chosen by held-out web text and held-out responses together (mean of both losses), never by WikiText-2, which
is what the table is about. Each is a process of one thread (tuning: `--nproc` of them); a killed run goes on from
its training checkpoints. Core time is the processor's, of pruning and tuning without their measuring.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cells
from cells import MODEL, Figures, lors, seconds_of
from quality import held_out_loss, split_rows

HERE = Path(__file__).parent
STARTS = {"sparsegpt": ("method=sparsegpt",), "admm": ("method=admm",),
          "reconstructed-2": ("method=admm", "reconstruct_epochs=2"),
          "reconstructed": ("method=admm", "reconstruct_epochs=6"),
          "reconstructed-256": ("method=admm", "reconstruct_epochs=2", "calibration.dataset=slimpajama",
                                "calibration.num_samples=256", "calibration.sequence_length=512"),
          "reconstructed-512": ("method=admm", "reconstruct_epochs=1", "calibration.dataset=slimpajama",
                                "calibration.num_samples=512", "calibration.sequence_length=512"),
          "reconstructed-512x2": ("method=admm", "reconstruct_epochs=2", "calibration.dataset=slimpajama",
                                  "calibration.num_samples=512", "calibration.sequence_length=512")}  # fmt: skip
"""On the given tokens, but those that say which ones they take. Results have `earlier-…` ones, too: of reconstruction
as it was, four samples a step, towards what the dense block makes of the pruned ones' outputs."""
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "lors": (3e-4, ("method=lors",)),
    "lors-exact": (3e-4, ("method=lors", "gradient=exact")),
    "sqft": (3e-4, ("method=sqft",)),
    "hira": (3e-3, ("method=hira",)),
    "spp": (1e-2, ("method=spp",)),
}
"""Settings by name, and the learning rate that is tried first."""
TEXTS = ("web", "alpaca", "both")
LOSSES = {"labels": (), "teacher": ("distill={weight: 0.5}",)}
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_START = "reconstructed-256"
"""On which methods, texts and losses are tried."""
DENSE = 29.53
"""WikiText-2 of the dense model."""
SHORT = 40  # steps
LONG = {"sparsegpt": 335, "admm": 335, "reconstructed-2": 300, "reconstructed": 270,
        "reconstructed-256": 180, "reconstructed-512": 130}  # fmt: skip
"""Steps by start: with its pruning an hour and a half."""
FULL = ("reconstructed-512x2", 1250)
"""Start and steps of six hours, where an hour and a half of pruning is no more than its share."""
SAMPLES = 4  # a step
TUNING = ("rank=64", "alpha=64", "init=kaiming", f"batch_size={SAMPLES}", "save_steps=20",
          "data.max_length=512")  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model: a start alone, or one that was tuned."""

    start: str
    method: str = "none"
    text: str = "web"
    loss: str = "labels"
    rate: float = 0.0
    steps: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """As in file names."""
        if self.method == "none":
            return self.start
        return f"{self.start}_{self.method}_{self.text}_{self.loss}_{self.rate:g}_{self.steps}_{self.seed}"

    @classmethod
    def of(cls, name: str) -> Trial:
        """The trial of a name."""
        if "_" not in name:
            return cls(name)
        start, method, text, loss, rate, steps, seed = name.split("_")
        return cls(start, method, text, loss, float(rate), int(steps), int(seed))


# ---- the plan

Found = dict[str, Figures]


def objective(figures: Figures) -> float:
    """Mean loss of held-out web text and held-out responses, nats a token; infinite where training broke."""
    return math.inf if "broke" in figures else (math.log(figures["web"]) + figures["responses"]) / 2


def plan(found: Found) -> list[Trial]:
    """The trials that are wanted next, the most wanted first; those that are there may be among them."""
    starts = [Trial(start) for start in STARTS]
    if FIRST_START not in found:
        return sorted(starts, key=lambda trial: trial.start != FIRST_START)
    searches = {method: search(method, found) for method in METHODS}
    wanted = [trial for trials, _ in searches.values() for trial in trials] + starts
    if missing(wanted, found):
        return wanted
    tried = sorted((trial for _, trial in searches.values() if trial is not None), key=lambda t: _loss(t, found))
    own = next(trial for trial in tried if trial.method.startswith("lors"))
    texts = [replace(tried[0], text=text, loss=loss) for text in TEXTS for loss in LOSSES]
    wanted = [*wanted, *texts]
    if missing(wanted, found):
        return wanted
    start = min((trial for trial in starts if trial.start in LONG), key=lambda trial: _loss(trial, found)).start
    best = min(texts, key=lambda trial: _loss(trial, found))
    leaders = tried[:3] if own in tried[:3] else [*tried[:2], own]
    long = [
        replace(trial, start=start, text=best.text, loss=best.loss, steps=LONG[start], seed=seed)
        for seed in (0, 1) for trial in leaders
    ]  # fmt: skip
    wanted = [*wanted, *long]
    if missing(long, found):
        return wanted
    last = min(long[:3], key=lambda trial: _loss(trial, found) + _loss(replace(trial, seed=1), found))
    return [*wanted, replace(last, start=FULL[0], steps=FULL[1])]


def names(found: Found) -> list[str]:
    """The cells of the plan: its trials, and then the tasks of starts and of all with many steps."""
    trials = plan(found)
    scored = [trial for trial in trials if trial.name in found and (trial.method == "none" or trial.steps > SHORT)]
    return [trial.name for trial in trials] + [f"tasks-{trial.name}" for trial in scored]


def search(method: str, found: Found) -> tuple[list[Trial], Trial | None]:
    """Trials of a method's learning rates, and the best one once it is not at the edge of those tried."""
    first, _ = METHODS[method]
    trials = {index: Trial(FIRST_START, method, rate=rate, steps=SHORT) for index, rate in enumerate(GRID)}
    tried = {index for index, trial in trials.items() if trial.name in found}
    middle = GRID.index(first)
    if not tried >= (start := {middle, middle + 1}):
        return [trials[index] for index in sorted(start)], None
    best = min(tried, key=lambda index: _loss(trials[index], found))
    near = [index for index in (best - 1, best + 1) if index in trials]
    wanted = [trials[index] for index in sorted({*tried, *near})]
    return wanted, trials[best] if set(near) <= tried else None


def missing(trials: list[Trial], found: Found) -> list[Trial]:
    """Those that are not there yet."""
    return [trial for trial in trials if trial.name not in found]


def _loss(trial: Trial, found: Found) -> float:
    return objective(found[trial.name])


# ---- one trial


@dataclass(frozen=True)
class Bench:
    """Where things lie, and the processes of a trial's tuning."""

    work: Path
    data_dir: Path
    calibration: Path
    model: str = MODEL
    nproc: int = 1

    def measure(self, trial: Trial) -> Figures:
        """Make a trial's model and score it; a model goes on where it was broken off."""
        folder = self.folder(trial)
        counted = folder.parent / f"{trial.name}.seconds.json"
        try:
            lors(*(self.pruning(trial) if trial.method == "none" else self.tuning(trial)), "--out", str(folder),
                 counted=counted)  # fmt: skip
        except subprocess.CalledProcessError as error:
            if error.returncode != 2 or not (folder / ".work").is_dir():
                raise
            scores: Figures = {"broke": True}  # a loss that is not finite: mistakes of usage come before any work
        else:
            scores = self.scores(trial, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {"trial": asdict(trial), "cpu_s": seconds_of(counted), **scores}

    def folder(self, trial: Trial) -> Path:
        """Where its model lies."""
        return self.work / "models" / trial.name

    def pruning(self, trial: Trial) -> list[str]:
        """The command of a start."""
        return ["prune", self.model, "--data-dir", str(self.data_dir), f"calibration.dataset={self.calibration}",
                "pattern=2:4", "calibration.batch_size=8", *STARTS[trial.start]]  # fmt: skip

    def tuning(self, trial: Trial) -> list[str]:
        """The command of a tuned model."""
        alpaca, _ = split_rows(self.data_dir, self.work)
        texts = {"web": ["--dataset", "slimpajama"], "alpaca": ["--dataset", str(alpaca)],
                 "both": ["--dataset", "slimpajama", f"data.mix=[{{dataset: '{alpaca}', weight: 0.3}}]"]}  # fmt: skip
        return ["tune", str(self.folder(Trial(trial.start))), "--data-dir", str(self.data_dir), *texts[trial.text],
                *TUNING, *METHODS[trial.method][1], *LOSSES[trial.loss], f"learning_rate={trial.rate}",
                f"max_steps={trial.steps}", f"warmup_steps={trial.steps // 30}", f"seed={trial.seed}",
                f"per_device_batch_size={SAMPLES // self.nproc}", "--nproc", str(self.nproc)]  # fmt: skip

    def scores(self, trial: Trial, folder: Path) -> Figures:
        """Perplexities of WikiText-2 and of held-out web text, the loss of held-out responses."""
        _, responses = split_rows(self.data_dir, self.work)
        found = cells.evaluated(
            str(folder), self.work / "scores" / trial.name, self.data_dir, "--tasks", "",
            "--perplexity", "wikitext2-lines,slimpajama", "perplexity_windows=80", "perplexity_length=512",
        )["perplexity"]  # fmt: skip
        return {"wikitext2": round(found["wikitext2-lines"]["value"], 3), "web": round(found["slimpajama"]["value"], 3),
                "responses": round(held_out_loss(folder, responses), 5)}  # fmt: skip

    def tasks(self, trial: Trial) -> Figures:
        """Accuracy on the seven tasks at limit 300."""
        return cells.accuracies(cells.evaluated(
            str(self.folder(trial)), self.work / "tasks" / trial.name, self.data_dir, "--limit", "300"))  # fmt: skip


# ---- figure and table


def core_hours(figures: Figures, found: Found) -> float:
    """Of pruning and tuning."""
    start = figures["trial"]["start"]
    seconds = figures["cpu_s"] + (found[start]["cpu_s"] if figures["trial"]["method"] != "none" else 0)
    return float(seconds / 3600)


def table(found: Found) -> Iterator[str]:
    """What was measured, as Markdown, the trials of many steps first."""
    yield "| start | method | text | loss | rate | steps | seed | core-hours | WikiText-2 | web | responses | acc, % |"
    yield "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    trials = [figures for figures in found.values() if "wikitext2" in figures]
    for figures in sorted(trials, key=lambda row: (-row["trial"]["steps"], row["wikitext2"])):
        trial = Trial(**figures["trial"])
        tuned = ["", "", "", "", "", ""] if trial.method == "none" else [
            trial.method, trial.text, trial.loss, f"{trial.rate:g}", str(trial.steps), str(trial.seed)]  # fmt: skip
        accuracy = found.get(f"tasks-{trial.name}", {}).get("mean_acc")
        yield "| " + " | ".join([
            trial.start, *tuned, f"{core_hours(figures, found):.2f}", f"{figures['wikitext2']:.2f}",
            f"{figures['web']:.2f}", f"{figures['responses']:.4f}",
            "" if accuracy is None else f"{100 * accuracy:.2f}"]) + " |"  # fmt: skip


MARKS = ("<!-- made by benchmarks/frontier.py -->", "<!-- end -->")


def figure(found: Found) -> bytes:
    """Perplexity of WikiText-2 over core-hours, as PNG."""
    from lors_cli.report import drawing

    with drawing.style():
        canvas = drawing.canvas(8, 5.2)
        axes = canvas.subplots()
        rows = [figures for figures in found.values() if "wikitext2" in figures]
        for method in ("none", *METHODS):
            own = [row for row in rows if row["trial"]["method"] == method]
            colour = drawing.DENSE if method == "none" else drawing.METHOD_COLOURS[method]
            axes.scatter([core_hours(row, found) for row in own], [row["wikitext2"] for row in own], s=30, color=colour,
                         label="untuned" if method == "none" else method, zorder=3)  # fmt: skip
        axes.axhline(DENSE, color=drawing.DENSE, linestyle="dashed", linewidth=1, label="dense")
        axes.set_xscale("log")
        axes.set_yscale("log")
        drawing.plain_ticks(axes.xaxis)
        drawing.plain_ticks(axes.yaxis)
        axes.set_xlabel("core-hours of pruning and tuning")
        axes.set_title("WikiText-2 perplexity, SmolLM2-135M 2:4 (lower is better)", fontsize=11)
        axes.grid(color=drawing.GRID, linewidth=0.6)
        canvas.legend(loc="outside right center", fontsize=9)
        return drawing.png(canvas)


def main() -> None:
    """Read the command line, measure or draw."""
    parser = cells.parser_of(__doc__, HERE / "results" / "frontier-cpu.json")
    parser.add_argument("--minutes", type=float, help="after so long no further trial begins")
    parser.add_argument("--nproc", type=int, choices=(1, 2, 4), default=1, help="processes of a trial's tuning")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured next")
    options = parser.parse_args()
    if options.plot or options.page:
        found = json.loads(options.out.read_text())
        cells.publish(options, "Perplexity over core-hours", MARKS, table(found), lambda: figure(found))
        return
    cells.require_places(parser, options)
    trials = cells.cells_of_command(options, "nproc")
    bench = Bench(options.work, options.data_dir, options.calibration, options.model, options.nproc)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that seconds are counted, and trials end with us
    if options.cell:
        measure = bench.tasks if options.cell.startswith("tasks-") else bench.measure
        trials.finish(options.cell, measure(Trial.of(options.cell.removeprefix("tasks-"))))
        return
    if options.dry_run:
        found = trials.found()
        print("\n".join(name for name in names(found) if name not in found))
        return
    if not trials.run(names, jobs=options.jobs, minutes=options.minutes, seen=partial(cells.keep, options.out)):
        raise SystemExit(f"some trials failed: {options.work / 'logs'} says why")


if __name__ == "__main__":
    main()
