"""`lors prune`, `tune`, `eval`, `merge` and `pack`: one stage, its settings from a file, key=value and flags."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import typer

from lors_cli.cli import options as o
from lors_cli.cli.flags import given
from lors_cli.cli.framework import STAGES, command
from lors_cli.cli.labels import read_arguments
from lors_cli.cli.launch import together
from lors_cli.files import atomic
from lors_cli.machine import processes
from lors_cli.output import console, progress
from lors_cli.recipe.shipped import find

stages_app = typer.Typer()


@command(
    stages_app, STAGES, "lors prune HuggingFaceTB/SmolLM2-135M --out sparse",
    "lors prune MODEL --out sparse --method wanda --pattern 4:8 --calibration pydoc",
    "lors prune MODEL --out sparse --sparsity 0.6 refit=true --dry-run",
    sections=("prune", "model"),
)  # fmt: skip
def prune(
    model: o.PruneModel, out: o.Out, overrides: o.PruneSettings = None, config: o.PruneConfig = None, *,
    data_dir: o.DataDir = None, nproc: o.Nproc = None, dry_run: o.DryRun = False, **flags: Any,
) -> None:  # fmt: skip
    """Prune a dense causal LM to a sparse checkpoint."""
    from lors_cli.cli.views.runs import show_record

    has_pattern = any(override.partition("=")[0].strip() == "pattern" for override in overrides or [])
    if flags["sparsity"] is not None and flags["pattern"] is None and config is None and not has_pattern:
        flags["pattern"] = "unstructured"
    models = {"dense": _model(model, flags)}
    if _stage("prune", models, out, config, overrides, flags, data_dir, nproc, dry_run):
        show_record(out)


@command(
    stages_app, STAGES, "lors tune sparse --out tuned",
    "lors tune sparse --out tuned --dataset mine.jsonl --rank 32 --epochs 1",
    "lors tune sparse --out sqft --method sqft gradient_checkpointing=true",
    sections=("tune", "model"),
)  # fmt: skip
def tune(
    model: o.TuneModel, out: o.Out, overrides: o.TuneSettings = None, config: o.TuneConfig = None, *,
    data_dir: o.DataDir = None, nproc: o.Nproc = None, dry_run: o.DryRun = False, **flags: Any,
) -> None:  # fmt: skip
    """Tune a sparse causal LM with LoRS and merge, zeros kept."""
    from lors_cli.cli.views.runs import show_record

    models = {"pruned": _model(model, flags)}
    if _stage("tune", models, out, config, overrides, flags, data_dir, nproc, dry_run):
        show_record(out)


@command(
    stages_app, STAGES, "lors eval MODEL sparse tuned",
    "lors eval sparse tuned --tasks arc_easy,boolq --limit 200 --out scores",
    "lors eval base=org/model mine=tuned --tasks mmlu --num-fewshot 5",
    "lors eval tuned --tasks '' --perplexity wikitext2 perplexity_windows=20",
    name="eval", sections=("eval", "model"),
)  # fmt: skip
def evaluate(
    arguments: o.EvalArguments, out: o.EvalOut = None, config: o.EvalConfig = None, *,
    data_dir: o.DataDir = None, nproc: o.Nproc = None, dry_run: o.DryRun = False, **flags: Any,
) -> None:  # fmt: skip
    """Score models side by side, on tasks and by perplexity."""
    labels, overrides = read_arguments(arguments)
    overrides += [] if out else ["generations=false"]  # short texts are kept beside the results, for a report
    models = {label: _model(path, flags) for label, path in labels.items()}
    with tempfile.TemporaryDirectory(prefix="lors-eval-") as scratch:
        folder = out or Path(scratch) / "eval"
        if _stage("eval", models, folder, config, overrides, flags, data_dir, nproc, dry_run):
            _show_scores(folder, list(models), out)


@command(stages_app, STAGES, "lors merge sparse tuned/adapter --out merged", sections=("model",))
def merge(model: o.Base, adapter: o.Adapter, out: o.Out, **flags: Any) -> None:
    """Merge a LoRS adapter into its sparse base, zeros kept."""
    from lors_cli.pipeline.folders import claim, guard_out
    from lors_cli.tuning.merge import merge as merge_adapter

    base = _model(model, flags)
    guard_out(out, "merge", [model])
    if (adapter / "adapter" / "adapter_config.json").is_file():  # the folder of a tune stage
        adapter = adapter / "adapter"
    with claim(out):
        metrics = merge_adapter(model, adapter, out, dtype=base.dtype, device=base.device, revision=base.revision,
                                add_bos_token=base.add_bos_token)  # fmt: skip
    console.result(f"{metrics['layers_merged']} layers merged, {metrics['zeroed']} kept weights became zero")
    console.path("merged", out)
    console.document({"out": str(out), **metrics})


@command(
    stages_app, STAGES, "lors pack tuned --out packed", "lors pack packed --out plain --unpack", sections=("model",)
)
def pack(
    model: o.SparseModel, out: o.Out, *, unpack: o.Unpack = False, dry_run: o.DryRun = False, **flags: Any
) -> None:
    """Write a copy of a sparse model that is smaller and decodes faster."""
    from lors_cli.cli.views.runs import show_record
    from lors_cli.pipeline.folders import claim, guard_out

    source = _model(model, flags)
    if not unpack:
        if _stage("pack", {"tuned": source}, out, None, None, {}, None, None, dry_run):
            show_record(out)
        return
    from lors_cli.models.needs import RECORDS
    from lors_cli.models.packed.checkpoint import Checkpoint, unpack_model, unpacked_size
    from lors_cli.pipeline.resources import require_disk

    guard_out(out, "unpack", [model])
    packed = Checkpoint(source, packed=True)
    metrics = unpacked_size(packed)
    disk = metrics["bytes"] + RECORDS
    require_disk("unpack", out, disk)
    sizes = f"{console.gib(metrics['bytes_before'])} → {console.gib(metrics['bytes'])}"
    if dry_run:
        console.result(f"unpack {model} → {out} (dry run: nothing is written)")
        console.result(f"   makes   {sizes}; {console.counted(metrics['weights'], 'weight')} unpacked")
        console.result(f"   needs   about {console.gib(disk)} of disk")
        console.document({"out": str(out), "dry_run": True, **metrics, "disk_bytes": disk})
        return
    with claim(out):
        unpack_model(packed, out)
    console.result(f"{console.counted(metrics['weights'], 'weight')} unpacked: {sizes}")
    console.path("unpacked", out)
    console.document({"out": str(out), **metrics})


def _model(path: str, flags: dict[str, Any]) -> Any:
    """A ModelConfig from an argument and flags, checked as a recipe's would be."""
    from lors_cli.recipe.loading import load_model_config

    return load_model_config(path, **given("model", flags))


def _stage(
    stage: Literal["prune", "tune", "pack", "eval"], models: dict[str, Any], out: Path, config: str | None,
    overrides: list[str] | None, flags: dict[str, Any], data_dir: Path | None, nproc: int | None, dry_run: bool,
) -> bool:  # fmt: skip
    """Plan and run one stage; whether there are results to show, by this process and not after a dry run."""
    from lors_cli.cli.views.runs import plan_document, show_plan
    from lors_cli.data.sources import resolve_data_dir
    from lors_cli.pipeline.folders import guard_out
    from lors_cli.pipeline.plans import plan_single
    from lors_cli.pipeline.preflight import refuse, troubles
    from lors_cli.pipeline.running import run_single
    from lors_cli.recipe.loading import load_stage

    together(None if dry_run else nproc)
    settings = load_stage(stage, find("config", config) if config else None, overrides or [], given(stage, flags))
    data = resolve_data_dir(str(data_dir) if data_dir else None)

    def make_plan() -> Any:
        guard_out(out, stage, [model.path for model in models.values()])
        with progress.busy("looking at what is done"):
            plan = plan_single(stage, settings, models, out, data)
        return replace(plan, num_processes=nproc or plan.num_processes)

    with processes.joined():
        plan = processes.from_main(make_plan)
        found = processes.from_main(lambda: troubles([plan], data))
        if dry_run:
            show_plan(plan_document(stage, out, [plan], found))
            return False
        refuse(found)
        run_single(plan, data)
    return processes.is_main()


def _show_scores(folder: Path, labels: list[str], kept: Path | None) -> None:
    """The result of eval: its table, what is sure of it, and where it is kept, if anywhere."""
    from lors_cli.cli.views.runs import show_results
    from lors_cli.evaluation.significance import compare_models

    found: dict[str, Any] = {label: atomic.read_json(folder / f"{label}.json") for label in labels}
    compared = compare_models(folder, found)
    show_results(found, [*compared["comparisons"], *compared["texts_compared"]])
    if kept:
        console.path("results", kept)
    else:
        console.result("The results are not kept; give --out to keep them.")
    console.document({"results": found, **compared, "out": str(kept) if kept else None})
