"""The model card: README.md of a pruned or tuned checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lors_cli.models.sources import short_name
from lors_cli.output.markdown import escape, markdown_table, table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")


def model_card(
    *,
    base_model: str,
    prune: dict[str, Any] | None,
    tune: dict[str, Any] | None,
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """README.md for a checkpoint folder, with the hub's front matter.

    Args:
        base_model: what the pipeline started from: hub id, folder or file.
        prune: the prune stage's config, None when the model was not pruned here; `tune` likewise.
        metrics: of the stage that wrote the checkpoint.
    """
    pattern = metrics.get("pattern") or (prune or {}).get("pattern")
    done = [word for word, stage in (("pruned", prune), ("tuned", tune)) if stage] or ["pruned"]
    parts = [
        _front_matter(base_model, prune, tune, pattern),
        f"# {escape(short_name(base_model))}, {' and '.join(done)}",
        _description(base_model, prune, tune, metrics, pattern),
        "## Settings\n\n" + markdown_table(table(["setting", "value"], _settings(prune, tune, metrics))),
        _usage(pattern),
        "## Licence\n\nThe licence and the terms of use are those of the base model.",
        f"Made with lors: {versions(environment)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base_model: str, prune: dict[str, Any] | None, tune: dict[str, Any] | None, pattern: Any) -> str:
    """The YAML block between `---` lines that the hub reads; it names a base model that looks like a hub id."""
    from lors_cli.recipe.yaml12 import write

    methods = [str(stage["method"]) for stage in (prune, tune) if stage and stage.get("method")]
    named = [str(pattern)] if pattern and pattern != "dense" else []
    tags = ["sparsity", "lors", *(["pruning"] if prune else []), *methods, *named]
    fields: dict[str, Any] = {"base_model": base_model} if looks_like_hub_id(base_model) else {}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(dict.fromkeys(tags))}
    return f"---\n{write(fields)}---"


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/model` on the hub rather than a folder or a file here."""
    return (
        bool(_HUB_ID.fullmatch(name))
        and len(name) <= 96
        and not name.endswith(_FILE_ENDINGS)
        and "--" not in name
        and ".." not in name
        and not Path(name).exists()
    )


def versions(environment: dict[str, Any]) -> str:
    """`Python 3.11.2, torch 2.8.0, …` of a record's environment, packages that are absent left out."""
    found = [f"Python {environment['python']}"] if "python" in environment else []
    packages = environment.get("packages") or {}
    found += [f"{name} {version}" for name, version in packages.items() if version != "absent"]
    gpu = environment.get("gpu")
    return escape(", ".join([*found, str(gpu)] if gpu else found))


def _description(
    base_model: str, prune: dict[str, Any] | None, tune: dict[str, Any] | None, metrics: dict[str, Any], pattern: Any
) -> str:
    sentences = [f"A sparse version of {escape(base_model)}."]
    sparsity, dense = metrics.get("sparsity"), metrics.get("dense_layers")
    if sparsity is not None:
        linears = "pruned linear layers" if dense else "decoder blocks' linear layers"
        sentences.append(
            f"{sparsity:.2%} of the weights in the {linears} are zero"
            f"{f' (pattern {escape(pattern)})' if pattern else ''}; "
            f"{f'{len(dense)} linear layers, ' if dense else ''}embeddings and output head are dense."
        )
    if prune:
        calibration = prune.get("calibration") or {}
        data = f", calibrated on {escape(calibration['dataset'])}" if "calibration" in metrics and calibration else ""
        sentences.append(f"It was pruned with {escape(prune.get('method'))}{data}.")
    if tune:
        data = escape((tune.get("data") or {}).get("dataset", "text"))
        keeps = ", which keeps every zero" if tune.get("method") != "lora" else ""
        sentences.append(
            f"It was then tuned on {data} with {escape(tune.get('method'))} at rank {tune.get('rank')}{keeps}; "
            "the adapter is merged into these weights."
        )
    return " ".join(sentences)


def _settings(prune: dict[str, Any] | None, tune: dict[str, Any] | None, metrics: dict[str, Any]) -> list[list[str]]:
    """Config values by dotted key, then the stage's plain numbers."""
    rows = []
    for stage, config in (("prune", prune), ("tune", tune)):
        rows += [[f"{stage}.{key}", value] for key, value in _flat(config or {})]
    shown = (
        "loss_before", "loss_after", "loss_samples", "loss_held_out", "moved", "steps", "num_samples", "violations",
        "trainable_parameters",
    )  # fmt: skip
    rows += [[f"result: {key}", str(metrics[key])] for key in shown if key in metrics]
    return rows


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _usage(pattern: Any) -> str:
    is_n_of_m = bool(re.fullmatch(r"\d+:\d+", str(pattern)))
    kind = f"The {pattern} zeros" if is_n_of_m else "The zeros"
    return (
        "## Use\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or the repository it was uploaded to\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "```\n\n"
        f"{kind} are stored as ordinary dense tensors. Loading the model in transformers or vLLM makes it neither "
        "faster nor smaller by itself: that needs kernels or a format made for sparse weights."
    )
