"""Quality over size: SmolLM2-135M dense, dense in few bits, sparse, and sparse in few bits, before and after tuning.

python benchmarks/int4_quality.py --work FOLDER --data-dir DATA --calibration TOKENS --jobs 2   measures what is missing
python benchmarks/int4_quality.py --plot docs/int4-quality.png --page docs/int4.md              figure and table
Another model: with `--model` and tokens of its own, another `--work`, and an `--out` that the page has marks for.

A row of `ROWS` is a model. Its first cell makes it (`lors prune`, `lors tune`, or GPTQ of the dense model), packs it,
and takes perplexity on the first 80 windows of WikiText-2 (512 tokens); its second one the seven tasks at limit 200.
All perplexities come before the first task. Cells are processes of one thread each; they lie one by one in `--work` and
together in `--out`. What is there is not measured again, and a killed run goes on where its stages were.

Bits a weight: over the pruned linears, scales and masks included, and over the whole file, whose embeddings stay
bfloat16. Sparse models are packed and their files' bytes counted; dense ones of few bits, which nothing here packs, are
counted as codes of so many bits and bfloat16 scales.

SmolLM2's float weights are not in a package: these were made plain again from 4-bit GGUF (Q4_1), which makes rounding
them to 4 bits easier than it would be.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
from cells import MODEL, Figures, lors

HERE = Path(__file__).parent
GROUP_SIZE = 128
BATCH_SIZE = 8
QUANTIZED = f"quantize={{bits: 4, group_size: {GROUP_SIZE}}}"
TUNING = ("rank=64", "alpha=64", "init=kaiming", "learning_rate=1e-3", "warmup_steps=5", "max_steps=60", "batch_size=4",
          "save_steps=20", "data.max_length=512")  # fmt: skip
ADMM = ("method=admm", "reconstruct_epochs=2")
AWARE = "quantization_aware=true"


@dataclass(frozen=True)
class Row:
    """A model: dense, dense in `bits`, pruned with the settings `prune`, or tuned from the row `base` with `tune`."""

    label: str
    family: str
    bits: int | None = None
    prune: tuple[str, ...] = ()
    base: str | None = None
    tune: tuple[str, ...] = ()


def _tuned(base: str, label: str) -> dict[str, Row]:
    """A sparse int4 model tuned in three ways."""
    return {
        f"{base}-lors": Row(f"{label}, LoRS, merged into floats", "sparse bfloat16, tuned", base=base),
        f"{base}-lors-qa": Row(f"{label}, LoRS-QA", "sparse int4, tuned", base=base, tune=(AWARE,)),
        f"{base}-sqft-qa": Row(f"{label}, SQFT-QA", "sparse int4, tuned", base=base, tune=("method=sqft", AWARE)),
    }


ROWS: dict[str, Row] = {
    "dense": Row("dense bfloat16", "dense"),
    "sparsegpt": Row("2:4 bfloat16, SparseGPT", "sparse bfloat16", prune=("method=sparsegpt",)),
    "admm": Row("2:4 bfloat16, ADMM + reconstruction", "sparse bfloat16", prune=ADMM),
    "dense-int4": Row("dense int4, GPTQ", "dense, few bits", bits=4),
    "dense-int3": Row("dense int3, GPTQ", "dense, few bits", bits=3),
    "sparsegpt-int4": Row("2:4 int4, SparseGPT", "sparse int4", prune=("method=sparsegpt", QUANTIZED)),
    "admm-int4": Row("2:4 int4, ADMM + reconstruction", "sparse int4", prune=(*ADMM, QUANTIZED)),
    **_tuned("sparsegpt-int4", "2:4 int4, SparseGPT"),
    **_tuned("admm-int4", "2:4 int4, ADMM + reconstruction"),
    "admm-int4-lors-qa-exact": Row(
        "2:4 int4, ADMM + reconstruction, LoRS-QA, exact gradients",
        "sparse int4, tuned",
        base="admm-int4",
        tune=("gradient=exact", AWARE),
    ),
}
COLOURS = {"dense": "#4D4D4D", "dense, few bits": "#CC79A7", "sparse bfloat16": "#E69F00",
           "sparse bfloat16, tuned": "#D55E00", "sparse int4": "#56B4E9", "sparse int4, tuned": "#0072B2"}  # fmt: skip


# ---- one cell


@dataclass(frozen=True)
class Bench:
    """Where things lie."""

    work: Path
    data_dir: Path
    calibration: Path
    limit: int
    windows: int
    model: str = MODEL

    def folder(self, name: str) -> str:
        """The model of a row."""
        return self.model if name == "dense" else str(self.work / "models" / name)

    def make(self, name: str) -> None:
        """Make a row's model; a stage that was interrupted goes on."""
        row = ROWS[name]
        out = ("--out", self.folder(name))
        if row.prune:
            lors("prune", self.model, *out, "--calibration", str(self.calibration), "pattern=2:4",
                 f"calibration.batch_size={BATCH_SIZE}", *row.prune)  # fmt: skip
        elif row.base is not None:
            lors("tune", self.folder(row.base), *out, "--data-dir", str(self.data_dir), "--dataset", "slimpajama",
                 *TUNING, *row.tune)  # fmt: skip
        elif row.bits is not None and not Path(self.folder(name), "config.json").is_file():
            quantise_dense_model(self.model, Path(self.folder(name)), self.calibration, row.bits)

    def evaluated(self, name: str, folder: str, *settings: str) -> Figures:
        """What `lors eval` finds; windows begin as the tokenizer begins a text, or Gemma's perplexity is doubled."""
        from lors_cli.data.tokenising import begin_tokens
        from lors_cli.models.loading import load_tokenizer
        from lors_cli.recipe.schema import ModelConfig

        bos = ("--add-bos-token",) if begin_tokens(load_tokenizer(ModelConfig(path=self.model))) else ()
        return cells.evaluated(self.folder(name), self.work / folder / name, self.data_dir, *bos, *settings)

    def size(self, name: str) -> Figures:
        """Bits a weight and bytes of a row's file."""
        row, packed = ROWS[name], self.work / "packed" / name
        if row.prune or row.base is not None:
            lors("pack", self.folder(name), "--out", str(packed))
            return packed_size(packed, Path(self.folder(name)))
        return dense_size(self.model, row.bits)

    def measure(self, name: str, kind: str) -> Figures:
        """The figures of one cell, with the seconds that its commands took now."""
        clock = {"started": time.monotonic()}

        def seconds() -> float:
            last, clock["started"] = clock["started"], time.monotonic()
            return round(clock["started"] - last, 1)

        if kind == "tasks":
            found = self.evaluated(name, "tasks", "--limit", str(self.limit))
            return {**cells.accuracies(found), "limit": self.limit, "tasks_s": seconds()}
        self.make(name)
        figures: Figures = {"make_s": seconds(), **self.size(name), "size_s": seconds()}
        found = self.evaluated(name, "perplexity", "--tasks", "", "--perplexity", "wikitext2-lines",
                               f"perplexity_windows={self.windows}", "perplexity_length=512")  # fmt: skip
        return {"wikitext2": found["perplexity"]["wikitext2-lines"]["value"], **figures, "perplexity_s": seconds()}


def quantise_dense_model(model: str, out: Path, calibration: Path, bits: int) -> None:
    """Write a dense model whose linears GPTQ has rounded, each block on what the rounded ones before it give."""
    import torch
    from safetensors.torch import load_file

    from lors_cli.grid import GridSpec
    from lors_cli.models.blocks import block_weights, decoder_blocks
    from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
    from lors_cli.pruning.methods.gptq import quantise_dense
    from lors_cli.pruning.walk.calibration import capture
    from lors_cli.pruning.walk.recorder import InputRecorder
    from lors_cli.recipe.schema import ModelConfig

    config = ModelConfig(path=model)
    network, spec = load_model(config), GridSpec(bits, GROUP_SIZE, symmetric=True)
    prefix, blocks = decoder_blocks(network)
    batches = list(load_file(calibration)["input_ids"].long().split(BATCH_SIZE))
    with torch.no_grad():
        hidden, arguments = capture(network, list(blocks), batches)
        for index, (block, own) in enumerate(zip(blocks, arguments, strict=True)):
            weights = block_weights(block, f"{prefix}.{index}")
            recorder = InputRecorder(weights, "hessian")
            for number, batch in enumerate(hidden):
                own.run(block, batch, number)
                recorder.end_batch()
            recorder.close()
            for group in recorder.groups:
                for name in group.names:
                    matrix = weights[name].matrix
                    matrix.copy_(quantise_dense(matrix, group.statistics, spec)[0])
            hidden = [own.run(block, batch, number) for number, batch in enumerate(hidden)]
            print(f"block {index + 1} of {len(blocks)}", flush=True)
    staging = out.with_name(out.name + ".part")
    save_checkpoint(network, load_tokenizer(config), staging)
    staging.rename(out)


def packed_size(folder: Path, plain: Path) -> Figures:
    """Sizes of a packed checkpoint, whose weights are counted in the plain one."""
    from lors_cli.models.checks import safetensors_files
    from lors_cli.models.stored import open_tensors
    from lors_cli.models.tensor_files import entry_of

    def entries(checkpoint: Path) -> dict[str, Any]:
        tensors = open_tensors(safetensors_files(checkpoint, str(checkpoint)), str(checkpoint))
        return {key: entry_of(key, tensor) for key, tensor in tensors.items()}

    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    packed, weights = entries(folder), {key: math.prod(entry.shape) for key, entry in entries(plain).items()}
    own = [entry.num_bytes for key, entry in packed.items()
           if key.rpartition(".")[0] in modules and not key.endswith(".bias")]  # fmt: skip
    linears = sum(weights[f"{name}.weight"] for name in modules)
    return _bits(8 * sum(own) / linears, sum(entry.num_bytes for entry in packed.values()), sum(weights.values()))


def dense_size(model: str, bits: int | None) -> Figures:
    """Sizes of a dense model, its linears in bfloat16 or in `bits` with a bfloat16 scale a group."""
    from lors_cli.models.size import model_size
    from lors_cli.recipe.schema import ModelConfig

    size = model_size(ModelConfig(path=model))
    assert size is not None
    of_linears = 16 * size.num_prunable
    if bits is not None:
        groups = sum(rows * math.ceil(columns / GROUP_SIZE) for rows, columns in size.linears)
        of_linears = bits * size.num_prunable + 16 * groups
    others = size.num_parameters - size.num_prunable
    return _bits(of_linears / size.num_prunable, of_linears // 8 + 2 * others, size.num_parameters)


def _bits(of_linears: float, num_bytes: int, num_weights: int) -> Figures:
    return {"bits": round(of_linears, 4), "bits_file": round(8 * num_bytes / num_weights, 4), "file_bytes": num_bytes}


# ---- all cells


def cells_of(names: list[str], with_tasks: bool) -> list[str]:
    """Cells of rows in the order of measuring; a row's base comes before it."""
    wanted = [name for name in ROWS if name in {*names, *(ROWS[name].base for name in names)}]
    return [f"{name}.model" for name in wanted] + [f"{name}.tasks" for name in names if with_tasks]


def needed(cell: str) -> str | None:
    """The cell that has to be there before."""
    name, _, kind = cell.partition(".")
    base = ROWS[name].base
    return f"{name}.model" if kind == "tasks" else None if base is None else f"{base}.model"


def ready(wanted: list[str], found: dict[str, Figures]) -> list[str]:
    """Those that can be measured now."""
    return [cell for cell in wanted if (before := needed(cell)) is None or before in found]


def rows_of(found: dict[str, Figures]) -> dict[str, Figures]:
    """Every row's figures, of all its cells that are there."""
    rows: dict[str, Figures] = {}
    for name in ROWS:
        for kind in ("model", "tasks"):
            rows.setdefault(name, {}).update(found.get(f"{name}.{kind}", {}))
    return {name: figures for name, figures in rows.items() if figures}


# ---- figure and table


def table(rows: dict[str, Figures]) -> Iterator[str]:
    """What was measured, as Markdown."""
    yield "| model | bits a weight: linears | whole file | MB | WikiText-2 | seven tasks, mean % |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, figures in rows.items():
        accuracy = f"{100 * figures['mean_acc']:.2f}" if "mean_acc" in figures else ""
        yield (f"| {ROWS[name].label} | {figures['bits']:.2f} | {figures['bits_file']:.2f} | "
               f"{figures['file_bytes'] / 1e6:.0f} | {figures['wikitext2']:.2f} | {accuracy} |")  # fmt: skip


def marks_of(out: Path) -> tuple[str, str]:
    """Between which the page has the table of a file of results."""
    return f"<!-- {out.name}, by benchmarks/int4_quality.py -->", "<!-- end -->"


def figure(rows: dict[str, Figures]) -> bytes:
    """Perplexity, and accuracy where it was measured, over bits a weight, as PNG."""
    from lors_cli.report import drawing

    with drawing.style():
        has_tasks = any("mean_acc" in figures for figures in rows.values())
        canvas = drawing.canvas(13 if has_tasks else 7, 5.2)
        panels = canvas.subplots(1, 1 + has_tasks, squeeze=False)[0]
        panels[0].set_yscale("log")
        _panel(panels[0], rows, "wikitext2", 1, "WikiText-2 perplexity (lower is better)")
        drawing.plain_ticks(panels[0].yaxis)
        if has_tasks:
            _panel(panels[1], rows, "mean_acc", 100, "Mean of seven tasks, % (higher is better)")
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels) if has_tasks else 3, fontsize=9)
        return drawing.png(canvas)


def _panel(axes: Any, rows: dict[str, Figures], key: str, factor: float, title: str) -> None:
    from lors_cli.report import drawing

    axes.set_xscale("log", base=2)
    places = {name: (figures["bits"], factor * figures[key]) for name, figures in rows.items() if key in figures}
    for family, colour in COLOURS.items():
        found = [place for name, place in places.items() if ROWS[name].family == family]
        axes.scatter([bits for bits, _ in found], [value for _, value in found], s=34, color=colour, label=family,
                     zorder=3)  # fmt: skip
    axes.set_xlim(2.7, 24)  # room for the last name
    axes.set_xticks([3, 4, 6, 9, 16], ["3", "4", "6", "9", "16"])
    axes.set_xlabel("bits a weight, over the linears")
    axes.set_title(title, fontsize=11)
    axes.grid(color=drawing.GRID, linewidth=0.6)
    taken: dict[int, float] = {}
    for name, place in sorted(places.items(), key=lambda item: item[1][1]):
        column, height = round(4 * math.log2(place[0])), 72 / axes.figure.dpi * axes.transData.transform(place)[1]
        up = max(2.0, taken.get(column, -math.inf) + 8 - height)  # points; names of one column stay apart
        taken[column] = height + up
        axes.annotate(name, place, (6, up - 4), textcoords="offset points", fontsize=7)


def main() -> None:
    """Read the command line, measure or draw."""
    parser = cells.parser_of(__doc__, HERE / "results" / "int4-quality-cpu.json")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="NAME", help="these rows, and their bases")
    parser.add_argument("--no-tasks", action="store_true", help="perplexities alone")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--windows", type=int, default=80)
    options = parser.parse_args()
    if options.plot or options.page:
        rows = {name: row for name in ROWS if (row := json.loads(options.out.read_text()).get(name))}
        cells.publish(options, "Quality over bits a weight", marks_of(options.out), table(rows), lambda: figure(rows))
        return
    cells.require_places(parser, options)
    own = cells.cells_of_command(options, "limit", "windows")
    if options.cell:
        bench = Bench(options.work, options.data_dir, options.calibration, options.limit, options.windows,
                      options.model)  # fmt: skip
        own.finish(options.cell, bench.measure(*options.cell.split(".")))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = cells_of(options.only or list(ROWS), not options.no_tasks)
    whole = own.run(lambda found: ready(wanted, found), jobs=options.jobs,
                    seen=lambda found: cells.keep(options.out, rows_of(found)))  # fmt: skip
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
