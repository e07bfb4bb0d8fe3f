"""Plans, results and inspections as a person and as a program reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lors_cli.errors import shorten
from lors_cli.files import records
from lors_cli.output import console, progress
from lors_cli.pipeline.plans import StagePlan, describe, foresee, to_come
from lors_cli.pipeline.resources import try_estimate
from lors_cli.pipeline.stages import STAGES

if TYPE_CHECKING:
    from lors_cli.evaluation.significance import Comparison, TextComparison
    from lors_cli.pipeline.preflight import Trouble


def plan_document(name: str, out: Path, plans: list[StagePlan], found: Sequence[Trouble]) -> dict[str, Any]:
    """A dry run's JSON document: the plan, what is in its way, and the exit code that it would end with."""
    stages, missing = [], to_come(plans)
    for plan in plans:
        needs, why = try_estimate(plan)
        stages.append({
            "stage": plan.stage, "status": plan.status, "detail": plan.detail, "what": describe(plan),
            "folder": str(plan.folder), "fingerprint": plan.fingerprint,
            "models": {label: model.path for label, model in plan.models.items()},
            "peak_memory_bytes": needs.memory if needs else None, "disk_bytes": needs.disk if needs else None,
            "estimate": f"{needs}{_of_each(plan)}" if needs else why,
            **({"makes": made} if not found and (made := foresee(plan, missing)) else {}),
        })  # fmt: skip
    in_the_way = [{"stage": trouble.stage, "message": trouble.error.message, "hint": trouble.error.hint,
                   "exit_code": trouble.error.exit_code} for trouble in found]  # fmt: skip
    return {"name": name, "run": str(out), "dry_run": True, "stages": stages, "in_the_way": in_the_way,
            "exit_code": in_the_way[0]["exit_code"] if in_the_way else 0}  # fmt: skip


def _of_each(plan: StagePlan) -> str:
    """Whose memory an estimate is, where several processes share a stage."""
    if plan.num_processes == 1:
        return ""
    compared = "" if STAGES[plan.stage].shortage else ", not compared with what is free"
    return f"; memory for each of {plan.num_processes} processes{compared}"


def show_plan(document: dict[str, Any]) -> None:
    """A dry run on the terminal, and as JSON with --json.

    Raises:
        typer.Exit: with the code that the run would end with, where something is in its way.
    """
    console.result(f"{document['name']} → {document['run']} (dry run: nothing is written)")
    for number, stage in enumerate(document["stages"], 1):
        console.result(f"\n{number}. {stage['stage']}: {stage['what']}")
        console.result(f"   reads   {', '.join(stage['models'].values())}")
        console.result(f"   writes  {stage['folder']}")
        if "makes" in stage:
            console.result(f"   makes   {stage['makes']}")
        console.result(f"   needs   {stage['estimate']}")
    console.result("\nNothing is in its way." if not document["in_the_way"] else "")
    for trouble in document["in_the_way"]:
        console.error(f"{trouble['stage']}: {trouble['message']}", trouble["hint"])
    console.document(document)
    if document["exit_code"]:
        raise typer.Exit(document["exit_code"])


def show_results(results: dict[str, Any], comparisons: Sequence[Comparison | TextComparison] = ()) -> None:
    """The table of an evaluation, by label, in parts of at most 80 columns; a line a comparison."""
    from lors_cli.evaluation.summary import LOST_IN_ERROR, recovered
    from lors_cli.report.scores import INSIDE_ERROR, by_task

    if not results:
        return
    columns, rows = by_task(results)
    shares = recovered(results)
    if shares:  # the last column, said in words below
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    columns = ["Δ" if name.startswith("Δ") else shorten(name, 40) for name in columns]
    rows = [[_shorter_error(cell) for cell in row] for row in rows]
    console.tables(columns, rows)
    for name, share in shares.items():
        what = "average accuracy" if name == "accuracy" else name.replace("perplexity", "log-perplexity on", 1)
        won = INSIDE_ERROR if share is None else f"{100 * share:.1f} %"
        console.result(f"Tuning won back {won} of what pruning lost in {what}.")
    if None in shares.values():
        console.result(LOST_IN_ERROR)
    for comparison in comparisons:
        console.result(str(comparison))


def _shorter_error(cell: str) -> str:
    """`47.10 ± 1.23` as `47.10 ±1.2`."""
    return re.sub(r" ± (\d+\.\d+)$", lambda match: f" ±{float(match[1]):.1f}", cell)


def show_record(folder: Path) -> None:
    """What a stage made of a model, and where it is."""
    record = records.read_record(folder)
    assert record is not None
    metrics = record.metrics
    console.facts([*_facts(record), ("pattern", _zeros(metrics)), ("time", progress.duration(record.elapsed_s))])
    console.path(record.stage, folder)
    following = {"prune": f"tune {folder} --out DIR", "pack": f"generate {folder}"}
    usual = f"eval {record.inputs['path']} {folder}"
    console.info(f"next: lors {following.get(record.stage, usual)}")
    console.document({"out": str(folder), **asdict(record)})


def _zeros(metrics: dict[str, Any]) -> str:
    broken = f", {metrics['violations']} violations" if metrics["violations"] else ""
    zeros = f"{100 * metrics['sparsity']:.2f} % zeros in {len(metrics['layers'])} linears"
    return f"{metrics['pattern']}, {zeros}{broken}{_apart(metrics)}{_quantised(metrics)}"


def _apart(metrics: dict[str, Any]) -> str:
    """The layers that were skipped, which are in no sum."""
    dense, frozen = (len(metrics.get(key, ())) for key in ("dense_layers", "skipped_layers"))
    return (f"; {dense} skipped and dense" if dense else "") + (f"; {frozen} without an adapter" if frozen else "")


def _quantised(metrics: dict[str, Any]) -> str:
    """What a quantised model's weights take."""
    if "quantize" not in metrics:
        return ""
    packed = f", {metrics['bits_a_weight']:.2f} a weight once packed" if "bits_a_weight" in metrics else ""
    return f"; {metrics['quantize']['bits']} bits{packed}"


def _facts(record: records.StageRecord) -> list[tuple[str, str]]:
    """What is particular to a stage."""
    from lors_cli.tuning.training.step_log import loss_text

    config, metrics = record.config, record.metrics
    if record.stage == "prune":
        seen = metrics.get("calibration")
        data = f", calibrated on {seen['tokens']:,} tokens of {config['calibration']['dataset']}" if seen else ""
        return [("method", f"{config['method']}{data}")]
    if record.stage == "pack":
        sizes = [console.gib(metrics[key]) for key in ("bytes_before", "bytes")]
        return [("size", f"{sizes[0]} → {sizes[1]}, {metrics['bytes'] / metrics['bytes_before']:.1%}")]
    return [
        ("method", f"{config['method']} rank {config['rank']}, {metrics['trainable_parameters']:,} parameters trained"),
        ("loss", f"{loss_text(metrics)}; {console.counted(metrics['steps'], 'step')}"),
    ]


def show_run(summary: dict[str, Any]) -> None:
    """What `lors run` did: the results and where they are."""
    show_results(summary["results"], [*summary["comparisons"], *summary["texts_compared"]])
    skipped = [stage["stage"] for stage in summary["stages"] if stage["status"] == "skipped"]
    if len(skipped) == len(summary["stages"]):
        console.result("Every stage was finished already: nothing was done.")
    for stage in summary["stages"]:
        note = " (finished earlier)" if stage["status"] == "skipped" else ""
        console.path(f"{stage['stage']:6}", stage["folder"], note)
    console.path("report", summary["report"])
    if "repeat" in summary:
        console.result(f"\nAgainst {summary['repeat']['manifest']}:")
        for stage, names in summary["repeat"]["different_files"].items():
            console.result(f"{stage:6} {'other bits: ' + ', '.join(names) if names else 'the same bits'}")
    console.document(summary)


def show_inspection(path: str, document: dict[str, Any]) -> None:
    """Sparsity by layer, and what breaks the pattern."""
    rows = [[layer["name"], "×".join(map(str, layer["shape"])), f"{100 * layer['sparsity']:.2f} %"]
            for layer in document["layers"]]  # fmt: skip
    if console.verbosity() < 1 and len(rows) > 24:
        hidden = len(rows) - 16
        rows = [*rows[:8], [f"… {hidden} more, shown with -v", "", ""], *rows[-8:]]
    console.table(["linear", "shape", "zeros"], rows)
    console.result(
        f"{path}: {document['pattern']}, {100 * document['sparsity']:.2f} % zeros in {len(document['layers'])} "
        f"linears, {document['violations']} violations{_apart(document)}"
    )
    if "quantize" in document:
        off = document["off_grid"]
        packed = f", {document['bits_a_weight']:.2f} bits a weight once packed" if "bits_a_weight" in document else ""
        console.result(f"grids: {document['quantize']['bits']} bits in groups of {document['quantize']['group_size']}"
                       f"{packed}, {off} values off them")  # fmt: skip
    if "packed" in document:
        sizes = document["packed"]
        share = f"{sizes['bytes'] / sizes['bytes_plain']:.1%}"
        console.result(f"packed: {console.gib(sizes['bytes'])} instead of {console.gib(sizes['bytes_plain'])}, {share}")
    prompt = document["prompt"]
    console.result(f"prompt: {prompt['format']} ({prompt['from']})" if prompt["format"] else "prompt: no chat template")
    console.document(document)
