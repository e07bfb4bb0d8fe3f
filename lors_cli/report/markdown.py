"""What a run's report says, block by block."""

from __future__ import annotations

from collections.abc import Collection

from lors_cli.models.card import versions
from lors_cli.output.markdown import Block, Code, Figure, escape, table
from lors_cli.output.progress import duration
from lors_cli.report.comparison import notes, results_table
from lors_cli.report.results import RunResults, models

_FIGURE_TEXTS = {
    "accuracy": "Zero-shot accuracy by task and model; lines are standard errors.",
    "perplexity": "Perplexity by text and model.",
    "loss": "Training loss by optimiser step.",
    "sparsity": "Sparsity of every pruned linear by decoder block.",
}


def run_blocks(results: RunResults, figures: Collection[str]) -> list[Block]:
    """The whole report, the same for the same results; a stage that was not run has no section.

    Args:
        results: of the run.
        figures: names of the drawn figures.
    """
    return [
        f"# {escape(results.recipe.get('name') or results.run.resolve().name)}",
        _summary(results),
        *_scores(results, figures),
        *_beside_the_paper(results),
        *_training(results, figures),
        *_sparsity(results, figures),
        *_settings(results),
        *_making(results),
        *_files(results),
    ]


def _summary(results: RunResults) -> str:
    """One line of what was done: method, pattern, sparsity, rank, base model."""
    words = []
    prune, tune = results.records.get("prune"), results.records.get("tune")
    if prune:
        share = (
            f" ({prune.metrics['sparsity']:.1%} of the pruned weights are zero)" if "sparsity" in prune.metrics else ""
        )
        words.append(f"pruned with {prune.config.get('method')} to {prune.config.get('pattern')}{share}")
    if tune:
        words.append(f"tuned with {tune.config.get('method')} at rank {tune.config.get('rank')}")
    if results.scores:
        words.append("evaluated")
    base = (results.recipe.get("model") or {}).get("path") or (prune.inputs.get("path") if prune else None)
    return f"{escape(base or 'A model')}: {escape(', '.join(words) or 'nothing has been run yet')}."


def _scores(results: RunResults, figures: Collection[str]) -> list[Block]:
    from lors_cli.evaluation.summary import recovered, summary_table

    if not results.scores:
        return []
    columns, rows = summary_table(results.scores)
    rows = [[cells[0].replace("  ", "↳ ", 1), *cells[1:]] for cells in rows]  # Markdown drops leading spaces
    parts: list[Block] = ["## Results", table(columns, rows)]
    shares = [f"{escape(name)} {share:.1%}" for name, share in recovered(results.scores).items()]
    if shares:
        parts.append(f"Share of the loss through pruning that tuning won back: {', '.join(shares)}.")
    return [*parts, *_figures(("accuracy", "perplexity"), figures), *_significance(results)]


def _significance(results: RunResults) -> list[Block]:
    """The models two by two: difference of accuracy in points, and whether it may be chance."""
    from lors_cli.evaluation.significance import compare_models, p_text

    found = compare_models(results.run / "eval", results.scores)
    if not found:
        return []
    rows = [
        [name, *(f"{100 * pair.tasks[name].difference:+.2f}, {p_text(pair.tasks[name].p_value)}" for pair in found)]
        for name in found[0].tasks
    ]
    whole = [
        f"{100 * pair.difference:+.2f} ({100 * pair.low:+.2f} … {100 * pair.high:+.2f}), {p_text(pair.p_value)}"
        for pair in found
    ]
    note = (
        "Points of accuracy on the same documents. p is McNemar's exact test, in the last row over all documents; the "
        "interval there (95 %) is a paired bootstrap of the average over tasks. Of many p some are small by chance."
    )
    columns = ["task", *(f"{pair.first} − {pair.second}" for pair in found)]
    return ["### Significance", table(columns, [*rows, ["average", *whole]]), note]


def _beside_the_paper(results: RunResults) -> list[Block]:
    """The scores in the layout of the LoRS paper, for a model and methods that are in it."""
    group = models(results)
    if not any(model.scores and model.paper for model in group.models):
        return []
    return ["## Beside the paper", results_table([group]), *notes([group])]


def _training(results: RunResults, figures: Collection[str]) -> list[Block]:
    record = results.records.get("tune")
    if record is None and not results.log:
        return []
    metrics = record.metrics if record else {}
    parts: list[Block] = ["## Tuning"]
    first, last = metrics.get("first_loss"), metrics.get("last_loss")
    if first is None and results.log:
        first, last = results.log[0]["loss"], results.log[-1]["loss"]
    if first is not None and last is not None:
        steps = metrics.get("steps", results.log[-1]["step"] if results.log else None)
        end = " (mean of the last tenth of the steps)" if "last_loss" in metrics else ""
        parts.append(f"Loss {first:.4f} at the first step, {last:.4f} at the end{end}; {steps} optimiser steps.")
    if metrics.get("tokens_per_s"):
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens per second (median).")
    if record is None:
        parts.append("The tuning is not finished.")
    return [*parts, *_figures(("loss",), figures)]


def _sparsity(results: RunResults, figures: Collection[str]) -> list[Block]:
    rows = []
    for stage, label in (("prune", "pruned"), ("tune", "tuned")):
        record = results.records.get(stage)
        if record and "sparsity" in record.metrics:
            metrics = record.metrics
            shares = [layer["sparsity"] for layer in metrics.get("layers", [])] or [metrics["sparsity"]]
            spread = f"{min(shares):.4f} to {max(shares):.4f}"
            pattern, violations = metrics.get("pattern", "-"), metrics.get("violations", "-")
            rows.append([label, str(pattern), f"{metrics['sparsity']:.4f}", spread, str(violations)])
    if not rows:
        return []
    columns = ["model", "pattern", "sparsity", "layers", "violations"]
    return ["## Sparsity", table(columns, rows), *_figures(("sparsity",), figures)]


def _settings(results: RunResults) -> list[Block]:
    if not results.recipe_text:
        return []
    return ["## Settings", Code(results.recipe_text, "yaml")]


def _making(results: RunResults) -> list[Block]:
    """Time, seed, versions and machine of each stage."""
    if not results.records:
        return []
    rows = []
    for stage, record in results.records.items():
        config, environment = record.config, record.environment
        seed = config.get("seed", (config.get("calibration") or {}).get("seed", "-"))
        cells = [stage, duration(record.elapsed_s), str(seed), record.fingerprint[:12]]
        rows.append([*cells, str(environment.get("platform", "-"))])
    parts: list[Block] = ["## How it was made", table(["stage", "time", "seed", "fingerprint", "machine"], rows)]
    seen: dict[str, list[str]] = {}
    for stage, record in results.records.items():
        seen.setdefault(versions(record.environment), []).append(stage)
    parts += [f"{', '.join(stages)}: {text}." for text, stages in seen.items() if text]
    return parts


def _files(results: RunResults) -> list[Block]:
    rows = [
        [f"{stage}/{name}", digest[:16]]
        for stage, record in results.records.items()
        for name, digest in record.files.items()
        if not name.startswith("samples/")
    ]
    return ["## Files", table(["file", "SHA-256 (first 16 digits)"], rows)] if rows else []


def _figures(names: tuple[str, ...], drawn: Collection[str]) -> list[Block]:
    return [Figure(name, _FIGURE_TEXTS[name]) for name in names if name in drawn]
