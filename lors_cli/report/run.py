"""The report of a run: what its stages did, its models beside each other, and how it was made."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lors_cli.evaluation.significance import compare_models
from lors_cli.evaluation.summary import LOST_IN_ERROR, recovered
from lors_cli.models.card import versions
from lors_cli.models.packed.measured import packed_size, unpackable
from lors_cli.output.console import counted, gib
from lors_cli.output.markdown import Block, Code, escape, table
from lors_cli.output.progress import duration
from lors_cli.report.differences import differences
from lors_cli.report.groups import run_group
from lors_cli.report.measures import Group
from lors_cli.report.output import FORMATS, assemble, pictures, table_of, write_files
from lors_cli.report.results import Cell, Results, read_run, read_stage
from lors_cli.report.samples import samples
from lors_cli.report.score_figures import accuracy_bars, perplexity_bars
from lors_cli.report.scores import by_model, by_task, notes, share_text
from lors_cli.report.stage_figures import loss_of_run, sparsity_by_kind
from lors_cli.tuning.training.step_log import loss_text

_OF_SCORES = {
    "accuracy": "Accuracy by task and model; lines are standard errors, dashes what guessing gives.",
    "perplexity": "Perplexity by text and model.",
}


def write_run_report(
    run: Path, finished: Collection[str], formats: Collection[str] = FORMATS, out: Path | None = None
) -> list[Path]:
    """Write a run's reports and `figures/*.png`; the same results give the same bytes.

    Args:
        run: a run folder; any stage may be missing.
        finished: the stages whose results belong to the recipe; what others left from earlier settings is not shown.
        out: where the reports go, None for the run folder.
    """
    return _write(run, read_run(run, finished), formats, out or run)


def write_stage_report(folder: Path, formats: Collection[str] = FORMATS, out: Path | None = None) -> list[Path]:
    """Write the reports of a single stage, as `lors prune`, `tune`, `merge`, `pack` or `eval` wrote it to --out.

    Raises:
        UsageError: its record is broken, or its scores have been changed.
    """
    return _write(folder, read_stage(folder), formats, out or folder)


def _write(root: Path, results: Results, formats: Collection[str], out: Path) -> list[Path]:
    (cell,) = results.cells
    group = run_group(results)
    figures = {
        "accuracy": lambda: accuracy_bars(group), "perplexity": lambda: perplexity_bars(group),
        "loss": lambda: loss_of_run(cell), "sparsity": lambda: sparsity_by_kind(cell),
    }  # fmt: skip
    return write_files(
        out, formats, figures=figures, blocks=lambda drawn: _blocks(root, results, group, drawn),
        groups=[group] if group.models else [], caption=f"{escape(group.title)}.",
    )  # fmt: skip


def _blocks(root: Path, results: Results, group: Group, drawn: Collection[str]) -> list[Block]:
    """The whole report, the same for the same results; a stage that was not run has no section."""
    (cell,) = results.cells
    has_paper = any(model.paper for model in group.models)
    return assemble(results.name, [summary(cell)], {
        "Models": table_of(["model", "path"], _named_models(group), prose=True),
        "Results": [*_scores(cell), *pictures(_OF_SCORES, drawn), *_significance(root, cell)],
        "Texts": samples(root, cell.scores),
        "Beside the paper": [by_model([group]), *notes([group])] if has_paper else [],
        "Tuning": [*_training(cell), *pictures({"loss": "Training loss by optimiser step."}, drawn)],
        "Packed": _packed(root, cell),
        "Sparsity": [*_sparsity(cell),
                     *pictures({"sparsity": "Sparsity of every pruned linear by decoder block."}, drawn)],
        "Settings": [Code(results.text, "yaml")] if results.text else [],
        "How it was made": _making(cell),
        "Files": _files(cell),
    })  # fmt: skip


def summary(cell: Cell) -> str:
    """One line of what was done: method, pattern, sparsity, rank, base model."""
    words = []
    if "prune" in cell.records:
        config, share = cell.config("prune"), cell.records["prune"].metrics.get("sparsity")
        zeros = f" ({share:.1%} of the pruned weights are zero)" if share is not None else ""
        words.append(f"pruned with {config.get('method')} to {config.get('pattern')}{zeros}")
    for stage, done in (("tune", "tuned with"), ("merge", "merged with an adapter of")):
        if stage in cell.records:
            config = cell.config("tune")
            words.append(f"{done} {config.get('method')} at rank {config.get('rank')}")
    if "pack" in cell.records:
        words.append("packed")
    if cell.scores:
        words.append("evaluated")
    if "eval" in cell.folders and len(cell.folders) == 1:
        return f"{escape(', '.join(cell.scores))}: evaluated."
    return f"{escape(cell.base or 'A model')}: {escape(', '.join(words) or 'nothing has been run yet')}."


def _scores(cell: Cell) -> list[Block]:
    scores = cell.evaluated()
    if not scores:
        return []
    columns, rows = by_task(scores)
    rows = [[cells[0].replace("  ", "↳ "), *cells[1:]] for cells in rows]  # Markdown drops leading spaces
    found = recovered(scores)
    shares = [f"{escape(name)} {share_text(share)}" for name, share in found.items()]
    said = f"Share of the loss through pruning that tuning won back: {', '.join(shares)}."
    said += f" {LOST_IN_ERROR}" if None in found.values() else ""
    return [table(columns, rows), *([said] if shares else [])]


def _named_models(group: Group) -> list[list[str]]:
    """Models that have only a name, with their paths."""
    return [[model.label, model.base] for model in group.models if not model.role]


def _significance(root: Path, cell: Cell) -> list[Block]:
    """The models two by two: differences of accuracy and perplexity, and whether they may be chance."""
    folder = next((root / scores.folder for scores in cell.scores.values()), root)
    found = differences(**compare_models(folder, cell.evaluated()))
    return ["### Significance", *found] if found else []


def _training(cell: Cell) -> list[Block]:
    record = cell.records.get("tune")
    if record is None and not cell.log:
        return []
    metrics = record.metrics if record else {}
    parts: list[Block] = []
    if "loss_before" in metrics:
        teacher = " (with the teacher's part)" if cell.config("tune").get("distill") else ""
        parts.append(f"Loss{teacher} {loss_text(metrics)}; {metrics['steps']} optimiser steps.")
    elif cell.log:
        first, last = cell.log[0]["loss"], cell.log[-1]["loss"]
        if first is not None and last is not None:
            parts.append(
                f"Loss {first:.4f} at the first step, {last:.4f} after {cell.log[-1]['step']} optimiser steps."
            )
    if metrics.get("val_loss_best") is not None:
        parts.append(
            f"Held-out loss of {counted(metrics['val_samples'], 'sample')}: {metrics['val_loss_first']:.4f} first, "
            f"{metrics['val_loss_best']:.4f} at best, after step {metrics['val_best_step']}, "
            f"{metrics['val_loss_last']:.4f} last. The model is that of step {metrics['model_step']}."
        )
    if "moved" in metrics:
        parts.append(f"{100 * metrics['moved']:.2f} % of the kept weights moved.")
    if metrics.get("tokens_per_s"):
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens per second (median).")
    return parts if record else [*parts, "The tuning is not finished."]


def _packed(root: Path, cell: Cell) -> list[Block]:
    """Bytes of the weights before and after, what stayed dense, and the speed where it was measured."""
    record = cell.records.get("pack")
    if record is None:
        return []
    metrics, size = record.metrics, packed_size(root / cell.folders["pack"], record)
    rows = [["plain", gib(size.plain_bytes), "100.0 %"],
            ["packed", gib(size.num_bytes), f"{100 * size.num_bytes / size.plain_bytes:.1f} %"]]  # fmt: skip
    dense = metrics.get("left_dense") or []
    kept = (
        f"{counted(len(dense), 'linear')} with too few zeros stayed dense, first {escape(dense[0])}." if dense else ""
    )
    plain = f"{escape(unpackable(metrics['left_plain']))}." if metrics.get("left_plain") else ""
    return [*table_of(["weights", "size", "share"], rows), *filter(None, [kept, plain, escape(size.speed)])]


def _sparsity(cell: Cell) -> list[Block]:
    rows = []
    for stage, label in (("prune", "pruned"), ("tune", "tuned"), ("merge", "merged"), ("pack", "packed")):
        metrics: dict[str, Any] = cell.records[stage].metrics if stage in cell.records else {}
        if "sparsity" in metrics:
            shares = [layer["sparsity"] for layer in metrics.get("layers", [])] or [metrics["sparsity"]]
            rows.append([label, str(metrics.get("pattern", "-")), f"{metrics['sparsity']:.4f}",
                         f"{min(shares):.4f} to {max(shares):.4f}", str(metrics.get("violations", "-")),
                         f"{metrics['bits_a_weight']:.2f}" if "bits_a_weight" in metrics else "-"])  # fmt: skip
    head = ["model", "pattern", "sparsity", "layers", "violations", "bits a weight"]
    has_grids = any(row[-1] != "-" for row in rows)
    return table_of(head if has_grids else head[:-1], rows if has_grids else [row[:-1] for row in rows])


def _making(cell: Cell) -> list[Block]:
    """Time, seed, versions and machine of each stage."""
    rows, seen = [], dict[str, list[str]]()
    for stage, record in cell.records.items():
        config, environment = record.config, record.environment
        seed = config.get("seed", (config.get("calibration") or {}).get("seed", "-"))
        rows.append([stage, duration(record.elapsed_s), str(seed), record.fingerprint[:12],
                     str(environment.get("platform", "-"))])  # fmt: skip
        seen.setdefault(versions(environment), []).append(stage)
    said = [f"{', '.join(stages)}: {text}." for text, stages in seen.items() if text]
    return [*table_of(["stage", "time", "seed", "fingerprint", "machine"], rows), *said]


def _files(cell: Cell) -> list[Block]:
    rows = [
        [str(Path(cell.folders[stage], name)), digest[:16]]
        for stage, record in cell.records.items()
        for name, digest in record.files.items()
        if not name.startswith("samples/")
    ]
    return table_of(["file", "SHA-256 (first 16 digits)"], rows)
