"""The arguments and options of every command, with their help, their panel and what the shell completes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lors_cli import completion
from lors_cli.completion import of, setting

SETTINGS, CALIBRATION, TRAINING, MACHINE, OUTPUT = "Settings", "Calibration", "Training", "Machine", "Output"


def _option(help: str, *names: str, panel: str | None = None, complete: Any = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, autocompletion=complete, **more)


def show_version(wanted: bool) -> None:
    """Print the version and leave, when that is asked for."""
    if wanted:
        from lors_cli import __version__

        typer.echo(f"lors {__version__}")
        raise typer.Exit


def _argument(help: str, metavar: str, complete: Any = None) -> Any:
    return typer.Argument(metavar=metavar, help=help, autocompletion=complete)


# Every command
Json = Annotated[bool, _option("Print one JSON document on stdout, nothing else there.", "--json", panel=OUTPUT)]
Quiet = Annotated[bool, _option("Only warnings, errors and the result.", "--quiet", "-q", panel=OUTPUT)]
Verbose = Annotated[
    int, _option("More details; -vv: the libraries' logs.", "--verbose", "-v", panel=OUTPUT, count=True,
                 show_default=False)
]  # fmt: skip
DryRun = Annotated[bool, _option("Show the plan and its estimates; nothing is written.", "--dry-run", panel=OUTPUT)]
Device = Annotated[
    str, _option("auto, cpu, cuda, cuda:1 or mps.", "--device", panel=MACHINE,
                 complete=of("auto", "cpu", "cuda", "mps"))
]  # fmt: skip
Dtype = Annotated[
    str, _option("auto, bfloat16, float16 or float32.", "--dtype", panel=MACHINE,
                 complete=of("auto", "bfloat16", "float16", "float32"))
]  # fmt: skip
DataDir = Annotated[
    Path | None, _option("Folder with local datasets; else $LORS_DATA_DIR, else the hub.", "--data-dir", panel=MACHINE)
]
Nproc = Annotated[
    int | None, _option("Processes on this machine that share the work, a GPU each; default 1.", "--nproc",
                        panel=MACHINE)
]  # fmt: skip
Out = Annotated[Path, _option("Folder for the results.", "--out")]
Model = Annotated[str, _argument("Folder, hub id, .gguf file or package://module/file.gguf.", "MODEL")]


def _settings(stage: str | None, example: str) -> Any:
    """The KEY=VALUE arguments of a stage, or of a recipe."""
    help = f"Any setting, e.g. {example}; lors recipes reference lists them."
    return _argument(help, "KEY=VALUE", completion.settings(stage))


def _config(stage: str, example: str) -> Any:
    """The file with a stage's settings."""
    help = f"YAML file with the stage's settings, or a shipped one: {example}, …"
    return _option(help, "--config", complete=completion.configs(stage))


Version = Annotated[
    bool, _option("Show the version and exit.", "--version", "-V", is_eager=True, callback=show_version)
]

# lors run
RunSettings = Annotated[list[str] | None, _settings(None, "tune.rank=32")]
RecipeName = Annotated[
    str | None, _argument("A recipe file, or the name of a shipped recipe.", "RECIPE", completion.recipes)
]
FromManifest = Annotated[
    Path | None,
    _option("Repeat this finished run (its folder or manifest.json), without RECIPE.", "--from-manifest",
            panel="Repeat")
]  # fmt: skip
ChangedInputs = Annotated[
    bool, _option("Repeat it though models or texts are no longer the same.", "--allow-changed-inputs",
                  panel="Repeat")
]  # fmt: skip
RunOut = Annotated[Path | None, _option("Run folder; default runs/<name>.", "--out")]
_stages = of("prune", "tune", "eval")
First = Annotated[str | None, _option("Start at this stage.", "--from", panel="Stages", complete=_stages)]
Last = Annotated[str | None, _option("Stop after this stage.", "--until", panel="Stages", complete=_stages)]
Force = Annotated[
    list[str] | None,
    _option("Do this stage again, though it is finished; may be repeated.", "--force", panel="Stages",
            complete=_stages)
]  # fmt: skip

# lors sweep
SweepName = Annotated[
    str, _argument("A sweep's file, or the name of a shipped one.", "SWEEP", completion.sweeps)
]  # fmt: skip
SweepOut = Annotated[Path | None, _option("The sweep's folder; default sweeps/<name>.", "--out")]
Only = Annotated[list[str] | None, _option("Run this cell; patterns such as 'wanda-*' too; may be repeated.", "--only")]
Tflops = Annotated[
    float | None, _option("With --dry-run: the device's TFLOP/s for the time; default: this one's.", "--tflops",
                          panel=OUTPUT)
]  # fmt: skip

# lors prune
PruneSettings = Annotated[list[str] | None, _settings("prune", "refit=true")]
PruneConfig = Annotated[str | None, _config("prune", "prune/wanda-2of4")]
PruneMethod = Annotated[
    str | None, _option("magnitude, wanda, sparsegpt (default), ria or admm.", "--method", panel=SETTINGS,
                        complete=setting("prune", "method"))
]  # fmt: skip
PrunePattern = Annotated[
    str | None, _option("N:M such as 2:4 (default), or unstructured.", "--pattern", panel=SETTINGS,
                        complete=of("2:4", "4:8", "1:4", "unstructured"))
]  # fmt: skip
PruneSparsity = Annotated[
    float | None, _option("Share of zeros; alone it means unstructured.", "--sparsity", panel=SETTINGS)
]
Calibration = Annotated[
    str | None, _option("alpaca, c4 (default), pydoc, slimpajama, wikitext2 or a file.", "--calibration",
                        panel=CALIBRATION, complete=completion.texts)
]  # fmt: skip
NumSamples = Annotated[int | None, _option("Sequences; default 128.", "--num-samples", panel=CALIBRATION)]
SequenceLength = Annotated[
    int | None,
    _option("Tokens a sequence; default 2048, or the model's limit.", "--sequence-length", panel=CALIBRATION),
]
CalibrationSeed = Annotated[int | None, _option("Of the choice of sequences.", "--seed", panel=CALIBRATION)]

# lors tune
TuneSettings = Annotated[list[str] | None, _settings("tune", "warmup_steps=10")]
TuneConfig = Annotated[str | None, _config("tune", "tune/lors-alpaca")]
TuneMethod = Annotated[
    str | None, _option("lors (default), sqft, sqft-gc, spp, spp-gc, hira or lora.", "--method", panel=SETTINGS,
                        complete=setting("tune", "method"))
]  # fmt: skip
Rank = Annotated[int | None, _option("Rank of the adapters; default 16.", "--rank", panel=SETTINGS)]
Alpha = Annotated[float | None, _option("Numerator of the adapters' scale; default 16.", "--alpha", panel=SETTINGS)]
Init = Annotated[
    str | None, _option("gradient (default of lors), gradient-exact or kaiming.", "--init", panel=SETTINGS,
                        complete=setting("tune", "init"))
]  # fmt: skip
Dataset = Annotated[
    str | None, _option("alpaca (default), c4, pydoc, slimpajama, wikitext2 or a file.", "--dataset", panel=TRAINING,
                        complete=completion.texts)
]  # fmt: skip
MaxLength = Annotated[int | None, _option("Tokens a sample; default 512.", "--max-length", panel=TRAINING)]
LearningRate = Annotated[float | None, _option("Peak learning rate; default 2e-5.", "--learning-rate", panel=TRAINING)]
Epochs = Annotated[float | None, _option("Passes over the data; default 3.", "--epochs", panel=TRAINING)]
MaxSteps = Annotated[int | None, _option("Optimiser steps; overrides epochs.", "--max-steps", panel=TRAINING)]
MaxTokens = Annotated[
    float | None, _option("Tokens of streamed text, e.g. 0.5e9; overrides epochs.", "--max-tokens", panel=TRAINING)
]
TuneBatch = Annotated[int | None, _option("Samples an optimiser step; default 32.", "--batch-size", panel=TRAINING)]
TuneSeed = Annotated[int | None, _option("Of order and adapters.", "--seed", panel=TRAINING)]

# lors eval
EvalArguments = Annotated[
    list[str], _argument("Models, then any settings, e.g. perplexity_windows=20.", "MODEL|KEY=VALUE")
]
EvalConfig = Annotated[str | None, _config("eval", "eval/seven-tasks")]
EvalOut = Annotated[Path | None, _option("Folder for results; without it they are only shown.", "--out")]
Tasks = Annotated[
    str | None, _option("Tasks of lm-evaluation-harness, with commas; default seven, '' for none.", "--tasks",
                        panel=SETTINGS, complete=completion.tasks)
]  # fmt: skip
Perplexity = Annotated[
    str | None, _option("Texts for token perplexity, with commas.", "--perplexity", panel=SETTINGS,
                        complete=completion.texts_list)
]  # fmt: skip
Limit = Annotated[int | None, _option("At most so many documents a task.", "--limit", panel=SETTINGS)]
EvalBatch = Annotated[int | None, _option("Sequences a forward pass; default 8.", "--batch-size", panel=SETTINGS)]

# lors merge, inspect, report, recipes copy
Base = Annotated[str, _argument("The sparse base: a folder or hub id.", "MODEL")]
Adapter = Annotated[Path, _argument("Folder with adapter_config.json, or of the tune stage.", "ADAPTER")]
Against = Annotated[str | None, _option("Hold it against this N:M.", "--pattern", complete=of("2:4", "4:8", "1:4"))]
ReportFolder = Annotated[Path, _argument("The folder of a run or of a sweep.", "FOLDER")]
Formats = Annotated[
    list[str] | None, _option("md, html, csv or tex; may be repeated. Default: all.", "--format",
                              complete=of("md", "html", "csv", "tex"))
]  # fmt: skip
Shipped = Annotated[str, _argument("A shipped recipe's or sweep's name.", "NAME", completion.shipped)]
Target = Annotated[Path | None, _argument("File or folder; default: here.", "[TARGET]")]

# lors data show
Tuned = Annotated[
    str, _argument("A recipe or a tune config: a file, or the name of a shipped one.", "RECIPE", completion.recipes)
]
NumShown = Annotated[int, _option("Samples to show.", "--num", min=1)]
Tokenizer = Annotated[str | None, _option("Whose tokenizer; a tune config names none.", "--model")]

# lors bench
Shape = Annotated[
    str, _option("A model's shape with random 2:4 weights: smollm2-135m, llama3-8b, …", "--shape",
                 panel=SETTINGS, complete=completion.shapes)
]  # fmt: skip
BenchModel = Annotated[str | None, _option("A checkpoint's folder instead of a shape.", "--model", panel=SETTINGS)]
Blocks = Annotated[int | None, _option("Only so many decoder blocks.", "--blocks", panel=SETTINGS)]
BenchMethods = Annotated[
    str | None, _option("Comma-separated; default: all but lora-float32, lors-nearest and lors-compressed.",
                        "--methods", panel=SETTINGS, complete=completion.bench_methods)
]  # fmt: skip
Lengths = Annotated[str, _option("Tokens a sequence, comma-separated.", "--lengths", panel=SETTINGS)]
Ranks = Annotated[str, _option("Comma-separated.", "--ranks", panel=SETTINGS)]
BenchBatch = Annotated[int, _option("Sequences a micro-batch.", "--batch-size", panel=SETTINGS)]
Accumulation = Annotated[int, _option("Micro-batches a step.", "--accumulation", panel=SETTINGS)]
Checkpointing = Annotated[
    str, _option("Block checkpointing: off, on, or both.", "--checkpointing", panel=SETTINGS,
                 complete=of("off", "on", "both"))
]  # fmt: skip
Rounds = Annotated[int, _option("Turns of every method.", "--rounds", panel=SETTINGS)]
Steps = Annotated[int, _option("Timed steps a turn.", "--steps", panel=SETTINGS)]
BenchDtype = Annotated[
    str, _option("bfloat16, float16 or float32.", "--dtype", panel=MACHINE,
                 complete=of("bfloat16", "float16", "float32"))
]  # fmt: skip
BenchOut = Annotated[Path | None, _option("Folder for bench.json and figures; goes on there.", "--out")]
