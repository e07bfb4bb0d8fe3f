"""Arguments and options with their help, their panel and what the shell completes; flags of the schema: `flags`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from lors_cli import __version__
from lors_cli.cli import completion
from lors_cli.cli.completion import of

SETTINGS, CALIBRATION, TRAINING, MACHINE, OUTPUT = "Settings", "Calibration", "Training", "Machine", "Output"


def option(help: str, *names: str, panel: str | None = None, complete: Any = None, **more: Any) -> Any:
    """An option of the command line, in a panel of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, autocompletion=complete, **more)


def flag(
    name: str, kind: Any, default: Any, help: str, panel: str, complete: Any = None, *, switch: bool = False
) -> inspect.Parameter:
    """An option as a command's parameter; a name of two words, a_b, is --a-b. Of a `switch` there is no --no-a-b."""
    names = [f"--{name.replace('_', '-')}"] if switch else []
    annotation: Any = Annotated[kind, option(help, *names, panel=panel, complete=complete)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def show_version(wanted: bool) -> None:
    """Print the version and leave, when that is asked for."""
    if wanted:
        typer.echo(f"lors {__version__}")
        raise typer.Exit


def _argument(help: str, metavar: str, complete: Any = None) -> Any:
    return typer.Argument(metavar=metavar, help=help, autocompletion=complete)


# Every command
Json = Annotated[bool, option("Print one JSON document on stdout, nothing else there.", "--json", panel=OUTPUT)]
Quiet = Annotated[bool, option("Only warnings, errors and the result.", "--quiet", "-q", panel=OUTPUT)]
Verbose = Annotated[
    int, option("More details; -vv: the libraries' logs.", "--verbose", "-v", panel=OUTPUT, count=True,
                show_default=False)
]  # fmt: skip
DryRun = Annotated[bool, option("Show the plan and its estimates; nothing is written.", "--dry-run", panel=OUTPUT)]
DataDir = Annotated[
    Path | None, option("Folder with local datasets; else $LORS_DATA_DIR, else the hub.", panel=MACHINE)
]
Nproc = Annotated[
    int | None, option("Processes on this machine that share the work, a GPU each; default 1.", panel=MACHINE)
]
Out = Annotated[Path, option("Folder for the results.")]


def _model(stage: str | None = None) -> Any:
    """The MODEL argument; of a stage's command KEY=VALUE may be typed before it."""
    help = "Folder, hub id, .gguf file or package://module/file.gguf."
    return _argument(help, "MODEL", completion.settings(stage, keys=False) if stage else None)


def _settings(stage: str | None, example: str) -> Any:
    """The KEY=VALUE arguments of a stage, or of a recipe."""
    help = f"Any setting, e.g. {example}; lors recipes reference lists them."
    return _argument(help, "KEY=VALUE", completion.settings(stage))


def _config(stage: str, example: str) -> Any:
    """The file with a stage's settings."""
    help = f"YAML file with the stage's settings, or a shipped one: {example}, …"
    return option(help, complete=completion.configs(stage))


Version = Annotated[bool, option("Show the version and exit.", "--version", "-V", is_eager=True, callback=show_version)]

# lors run
RunSettings = Annotated[list[str] | None, _settings(None, "tune.rank=32")]
RecipeName = Annotated[
    str | None, _argument("A recipe file, or the name of a shipped recipe.", "RECIPE", completion.recipes)
]
FromManifest = Annotated[
    Path | None, option("Repeat this finished run (its folder or manifest.json), without RECIPE.", panel="Repeat")
]
ChangedInputs = Annotated[
    bool, option("Repeat it though models or texts are no longer the same.", "--allow-changed-inputs", panel="Repeat")
]
RunOut = Annotated[Path | None, option("Run folder; default runs/<name>.")]
_stages = of("prune", "tune", "pack", "eval")
First = Annotated[str | None, option("Start at this stage.", "--from", panel="Stages", complete=_stages)]
Last = Annotated[str | None, option("Stop after this stage.", "--until", panel="Stages", complete=_stages)]
Force = Annotated[
    list[str] | None,
    option(
        "Do this stage again, though it is finished (a begun model goes on); may be repeated.",
        panel="Stages",
        complete=_stages,
    ),
]

# lors sweep
SweepName = Annotated[str, _argument("A sweep's file, or the name of a shipped one.", "SWEEP", completion.sweeps)]
SweepOut = Annotated[Path | None, option("The sweep's folder; default sweeps/<name>.")]
Only = Annotated[list[str] | None, option("Run this cell; patterns such as 'wanda-*' too; may be repeated.")]
Tflops = Annotated[
    float | None, option("With --dry-run: the device's TFLOP/s for the time; default: this one's.", panel=OUTPUT)
]

ON = "Several processes"
Executor = Annotated[
    str | None, option("Stages as processes of their own: local (this machine) or slurm; default: one after the other.",
                       panel=ON, complete=of("local", "slurm"))
]  # fmt: skip
Jobs = Annotated[int | None, option("Stages at once; local: default 1, or one a GPU.", panel=ON, min=1)]
Gpus = Annotated[str | None, option("local: the GPUs, such as 0,1,2,3; slurm: GPUs a stage, 0 or 1.", panel=ON)]
Partition = Annotated[str | None, option("slurm: where jobs go.", panel=ON)]
TimeLimit = Annotated[
    str | None, option("slurm: a job's time; one that runs out of it is saved and goes on later.", "--time", panel=ON)
]
Sbatch = Annotated[
    list[str] | None, option("slurm: another option of sbatch, such as account=mine; may be repeated.", panel=ON)
]
Status = Annotated[bool, option("Show how far each cell's stages are; nothing is run.", "--status", panel=OUTPUT)]
StageOfSweep = Annotated[str, _argument("The name of its folder.", "STAGE")]
CellOfSweep = Annotated[str, _argument("A cell that needs it.", "CELL")]

# lors prune, tune, eval; their flags are in `flags`
PruneModel = Annotated[str, _model("prune")]
TuneModel = Annotated[str, _model("tune")]
PruneSettings = Annotated[list[str] | None, _settings("prune", "refit=true")]
PruneConfig = Annotated[str | None, _config("prune", "prune/wanda-2of4")]
TuneSettings = Annotated[list[str] | None, _settings("tune", "warmup_steps=10")]
TuneConfig = Annotated[str | None, _config("tune", "tune/lors-alpaca")]
EvalArguments = Annotated[
    list[str], _argument("Models, maybe with a name, then any settings, e.g. perplexity_windows=20.",
                         "[NAME=]MODEL|KEY=VALUE",
                         completion.settings("eval", keys=False))
]  # fmt: skip
EvalConfig = Annotated[str | None, _config("eval", "eval/seven-tasks")]
EvalOut = Annotated[Path | None, option("Folder for results; without it they are only shown.")]

# lors merge, pack, inspect, report, recipes copy
Model = Annotated[str, _model()]
Base = Annotated[str, _argument("The sparse base: a folder or hub id.", "MODEL")]
SparseModel = Annotated[str, _argument("The sparse model: a folder or hub id.", "MODEL")]
Unpack = Annotated[bool, option("Make a packed model an ordinary one again.", "--unpack")]
Adapter = Annotated[Path, _argument("Folder with adapter_config.json, or of the tune stage.", "ADAPTER")]
Against = Annotated[str | None, option("Hold it against this N:M.", complete=of("2:4", "4:8", "1:4"))]
ReportFolders = Annotated[
    list[Path], _argument("The folder of a run, a sweep, or a stage's --out; several are compared.", "FOLDER")
]
ReportOut = Annotated[
    Path | None, option("Folder for the report; default FOLDER itself, of several a new one beside the first.")
]
Formats = Annotated[
    list[str] | None, option("md, html, csv or tex; may be repeated. Default: all.", "--format",
                             complete=of("md", "html", "csv", "tex"))
]  # fmt: skip
Shipped = Annotated[str, _argument("A shipped recipe's or sweep's name.", "NAME", completion.shipped)]
Target = Annotated[Path | None, _argument("File or folder; default: here.", "[TARGET]")]

# lors generate
Models = Annotated[
    list[str], _argument("A model (folder, hub id, .gguf file), or an adapter's folder; NAME=MODEL calls it NAME.",
                         "[NAME=]MODEL")
]  # fmt: skip
Prompt = Annotated[list[str] | None, option("What to answer; may be repeated. Without prompts: lines of stdin.")]
Prompts = Annotated[Path | None, option("File of prompts: .txt with one a line, or .jsonl, .csv … with one a row.")]
Template = Annotated[
    str | None, option("Prompt format: alpaca, alpaca_short, vicuna, chat; default: what each model was tuned with.",
                       panel=SETTINGS, complete=of("alpaca", "alpaca_short", "vicuna", "chat"))
]  # fmt: skip
Raw = Annotated[bool, option("No prompt format: continue the text as it is.", "--raw", panel=SETTINGS)]
MaxNewTokens = Annotated[int, option("Tokens an answer at most.", panel=SETTINGS)]
Temperature = Annotated[float, option("0: always the likeliest token; above: draw.", panel=SETTINGS)]
TopP = Annotated[float, option("Draw from the likeliest tokens with this much probability.", panel=SETTINGS)]
Seed = Annotated[int, option("Of the draws, anew for each prompt.", panel=SETTINGS)]
TextsOut = Annotated[Path | None, option("File for the answers, JSON lines.", panel=OUTPUT)]

# lors push
PushFolder = Annotated[Path, _argument("A checkpoint, or a run, whose tuned (else pruned) model goes.", "FOLDER")]
Repo = Annotated[str, _argument("owner/name on the hub, or a name of your own.", "REPO")]
Private = Annotated[bool, option("Make the new repository private.", "--private")]
Branch = Annotated[str, option("Branch to upload to; made if it is not there.", "--revision")]
ScoresFolder = Annotated[Path | None, option("Folder of lors eval, for the card; default: the run's own.")]
Yes = Annotated[bool, option("Do not ask.", "--yes", "-y")]
PushDryRun = Annotated[bool, option("Show what would go; nothing is uploaded.", "--dry-run", panel=OUTPUT)]

# lors data show
Tuned = Annotated[
    str, _argument("A recipe or a tune config: a file, or the name of a shipped one.", "RECIPE", completion.recipes)
]
NumShown = Annotated[int, option("Samples to show.", min=1)]
Tokenizer = Annotated[str | None, option("Whose tokenizer; a tune config names none.")]

# lors bench
BenchOut = Annotated[Path | None, option("Folder for bench.json and figures; a second call resumes there.")]
BENCH = (
    flag("decode", bool, False, "Time the writing of text, dense against packed, in place of training.", SETTINGS),
    flag("shape", str | None, None,
         "A model's shape with random 2:4 weights: llama3-8b, tinyllama, …; default smollm2-135m.", SETTINGS,
         completion.shapes),
    flag("model", str | None, None, "A checkpoint's folder instead of a shape.", SETTINGS),
    flag("pattern", str | None, None, "decode: a shape's zeros, 2:4 or unstructured; default 2:4.", SETTINGS,
         of("2:4", "unstructured")),
    flag("bits", int | None, None, "decode: of a shape's weights, 4 or 8, on a grid a group of 128 inputs.", SETTINGS),
    flag("blocks", int | None, None, "Only so many decoder blocks.", SETTINGS),
    flag("methods", str | None, None,
         "Comma-separated; default: all but variants of them such as lors-packed and sqft-qa.", SETTINGS,
         completion.bench_methods),
    flag("lengths", str | None, None,
         "Tokens a sequence, comma-separated; default 512,1024,2048. decode: of prompts; default 128,512.", SETTINGS),
    flag("tokens", int | None, None, "decode: tokens that are written; default 64.", SETTINGS),
    flag("ranks", str | None, None, "Comma-separated; default 16,32,64.", SETTINGS),
    flag("batch_size", int, 1, "Sequences a micro-batch; decode: at a time.", SETTINGS),
    flag("accumulation", int | None, None, "Micro-batches a step; default 1.", SETTINGS),
    flag("checkpointing", str | None, None, "Block checkpointing: off, on, or both; default off.", SETTINGS,
         of("off", "on", "both")),
    flag("rounds", int, 5, "Turns of every method, or of dense and packed.", SETTINGS),
    flag("steps", int | None, None, "Timed steps a turn; default 3.", SETTINGS),
    flag("dtype", str, "bfloat16", "bfloat16, float16 or float32.", MACHINE, of("bfloat16", "float16", "float32")),
    flag("device", str, "auto", "auto, cpu, cuda, cuda:1 or mps.", MACHINE, of("auto", "cpu", "cuda", "mps")),
)  # fmt: skip
