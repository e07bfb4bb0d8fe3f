"""The model card: README.md of a checkpoint, with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.data.prompts import TEMPLATES
from lors_cli.models.origins import TAG, Fields, looks_like_hub_id, portable
from lors_cli.models.quantised import PACKED
from lors_cli.models.sources import settings_in, short_name
from lors_cli.output.console import gib
from lors_cli.output.markdown import Block, Code, Table, escape, table, to_markdown
from lors_cli.recipe.loading import without_none
from lors_cli.recipe.tuning import data_name
from lors_cli.recipe.yaml12 import write

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_SHOWN = (
    "loss_before", "loss_after", "loss_samples", "loss_held_out", "val_loss_best", "val_loss_last", "val_samples",
    "model_step", "moved", "steps", "num_samples", "violations", "trainable_parameters",
)  # fmt: skip
"""A stage's numbers that a card has."""
LOADS_PACKED = "import lors_cli  # knows packed weights; pip install lors-cli\n"
_QUESTION = "Name three colours."


@dataclass(frozen=True)
class CardScores:
    """What an evaluation says of a checkpoint, and of the model that it was made from."""

    table: Table
    note: str
    results: list[EvalResult]
    settings: dict[str, Any]
    """The eval stage's."""


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed checkpoint and of the plain one, and what was measured of its speed, in a sentence.

    Args:
        bits: of the codes in place of values, None where values are kept.
    """

    num_bytes: int
    plain_bytes: int
    speed: str = ""
    bits: int | None = None

    def __str__(self) -> str:
        share = self.num_bytes / self.plain_bytes
        return f"{gib(self.num_bytes)} instead of {gib(self.plain_bytes)} ({share:.1%})"


def model_card(
    *, base_model: str, prune: dict[str, Any] | None, tune: dict[str, Any] | None, metrics: dict[str, Any],
    environment: dict[str, Any], fields: Fields, fingerprint: str = "", name: str = ".",
    scores: CardScores | None = None, packed: PackedSize | None = None,
) -> str:  # fmt: skip
    """README.md for a checkpoint.

    Args:
        base_model: what the pipeline started from: hub id, folder or file.
        prune: the prune stage's config, None when the model was not pruned here; `tune` likewise.
        metrics: of the stage that wrote the checkpoint.
        fields: what is known of its origin, as `origins.inherited` gives it.
        fingerprint: of `base_model`, which says its settings.
        name: what to load it by: a hub id, or "." for the folder it lies in.
        packed: of a packed checkpoint; None for plain weights.
    """
    base = fields.get("base_model") or short_name(base_model)
    pattern = metrics.get("pattern") or (prune or {}).get("pattern")
    steps = (("pruned", prune), ("tuned", tune), ("packed", packed))
    done = [word for word, step in steps if step] or ["pruned"]
    is_whole = "data" in (tune or {})  # of a merge only what the adapter does is known
    settings = {"prune": prune, "tune": tune if is_whole else None, "pack": {} if packed else None,
                "eval": scores.settings if scores else None}  # fmt: skip
    blocks: list[Block] = [
        f"# {escape(short_name(base))}, {' and '.join([', '.join(done[:-1]), done[-1]] if done[1:] else done)}",
        _description(base, prune, tune, metrics, pattern),
        *_scores(scores),
        *_prompt(metrics.get("prompt")),
        "## Use", *_usage(name, pattern, metrics.get("prompt"), packed),
        "## How it was made", Code(recipe_text(base, settings, fingerprint), "yaml"),
        *_results(metrics),
        "## Licence", "The licence and the terms of use are those of the base model.",
        f"Made with lors: {versions(environment)}.",
    ]  # fmt: skip
    results = scores.results if scores else []
    front = _front_matter(name, fields, prune, tune, pattern, metrics, results, packed)
    return f"---\n{front}---\n\n{to_markdown(blocks)}"


def _front_matter(
    name: str, fields: Fields, prune: dict[str, Any] | None, tune: dict[str, Any] | None, pattern: Any,
    metrics: dict[str, Any], results: Sequence[EvalResult], packed: PackedSize | None,
) -> str:  # fmt: skip
    """The YAML that the hub reads, as its own library arranges it."""
    from huggingface_hub import ModelCardData

    methods = [str(stage["method"]) for stage in (prune, tune) if stage and stage.get("method")]
    named = [str(pattern)] if pattern and pattern != "dense" else []
    bits = [f"{metrics['quantize']['bits']}-bit"] if "quantize" in metrics else []
    sparse = [] if pattern == "dense" else ["sparse"]
    tags = [*sparse, TAG, *(["pruned"] if prune else []), *methods, *named, *bits, *([PACKED] if packed else [])]
    data = ModelCardData(
        **fields, library_name="transformers", pipeline_tag="text-generation", tags=tags,
        model_name=short_name(name) if results else None, eval_results=list(results) or None,
    )  # fmt: skip
    return write(data.to_dict())


def versions(environment: dict[str, Any]) -> str:
    """`Python 3.11.2, torch 2.8.0, …` of a record's environment, packages that are absent left out."""
    found = [f"Python {environment['python']}"] if "python" in environment else []
    packages = environment.get("packages") or {}
    found += [f"{name} {version}" for name, version in packages.items() if version != "absent"]
    gpu = environment.get("gpu")
    return escape(", ".join([*found, str(gpu)] if gpu else found))


def _description(
    base: str, prune: dict[str, Any] | None, tune: dict[str, Any] | None, metrics: dict[str, Any], pattern: Any
) -> str:
    link = f"[{escape(base)}](https://huggingface.co/{base})" if looks_like_hub_id(base) else escape(base)
    filled = pattern == "dense"
    sentences = [f"A dense model, tuned from a pruned version of {link}." if filled else f"A sparse version of {link}."]
    sparsity, dense = metrics.get("sparsity"), metrics.get("dense_layers")
    if sparsity is not None and not filled:
        linears = "pruned linear layers" if dense else "decoder blocks' linear layers"
        sentences.append(
            f"{sparsity:.2%} of the weights in the {linears} are zero"
            f"{f' (pattern {escape(pattern)})' if pattern else ''}; "
            f"{f'{len(dense)} linear layers, ' if dense else ''}embeddings and output head are dense."
        )
    if prune:
        calibration = prune.get("calibration") or {}
        data = ""
        if "calibration" in metrics and calibration:
            data = f", calibrated on {escape(portable(calibration['dataset']))}"
        bits = (prune.get("quantize") or {}).get("bits")
        rounded = f", its kept weights rounded to {bits} bits" if bits else ""
        sentences.append(f"It was pruned with {escape(prune.get('method'))}{rounded}{data}.")
    if tune:
        dataset = data_name(portable(tune.get("data") or {}))
        data = f" on {escape(dataset)}" if dataset else ""
        keeps = "" if filled else ", which keeps every zero"
        sentences.append(
            f"It was then tuned{data} with {escape(tune.get('method'))} at rank {tune.get('rank')}{keeps}; "
            f"the adapter is merged into these weights{', whose zeros that filled' if filled else ''}."
        )
    if "quantize" in metrics:
        grid = metrics["quantize"]
        sentences.append(
            f"Its kept weights lie on grids of {grid['bits']} bits, with a scale for every {grid['group_size']} inputs "
            f"of a row{_bits(metrics)}."
        )
    return " ".join(sentences)


def _bits(metrics: dict[str, Any]) -> str:
    return f": {metrics['bits_a_weight']:.2f} bits a weight when they are packed" if "bits_a_weight" in metrics else ""


def _scores(scores: CardScores | None) -> list[Block]:
    return ["## Scores", scores.table, scores.note] if scores else []


def _prompt(prompt: Mapping[str, str] | None) -> list[Block]:
    """The format that instructions were learnt in, with an example."""
    if not prompt:
        return []
    name, end = prompt["format"], f"An answer ends in `{prompt['ends_with']}`."
    said = f"`tokenizer.apply_chat_template` writes it; it is in `chat_template.jinja`. {end}"
    if name not in TEMPLATES:
        return ["## Prompt format", f"The base model's own chat template. {said}"]
    return [
        "## Prompt format", f"{name}: one question and its answer, without a system prompt. {said}",
        Code(TEMPLATES[name].prompt(_QUESTION, "")),
    ]  # fmt: skip


def _usage(name: str, pattern: Any, prompt: Mapping[str, str] | None, packed: PackedSize | None) -> list[Block]:
    """How to load it, and what sparse weights do not do by themselves."""
    ask = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    if prompt:
        ask = (
            f'talk = [{{"role": "user", "content": "{_QUESTION}"}}]\n'
            'inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")\n'
        )
    code = (
        f"{LOADS_PACKED if packed else ''}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'name = "{name}"{"  # this folder" if name == "." else ""}\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")\n'
        f"{ask}"
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    if packed:
        return [Code(code, "python"), about_packed(packed)]
    if pattern == "dense":
        return [Code(code, "python")]
    is_n_of_m = bool(re.fullmatch(r"\d+:\d+", str(pattern)))
    return [
        Code(code, "python"),
        f"{f'The {pattern} zeros' if is_n_of_m else 'The zeros'} are stored as ordinary dense tensors. Loading the "
        "model in transformers or vLLM makes it neither faster nor smaller by itself: that needs kernels or a format "
        "made for sparse weights.",
    ]  # fmt: skip


def about_packed(packed: PackedSize) -> str:
    """What a packed checkpoint needs and gives."""
    held = f"a code of {packed.bits} bits for each that is kept" if packed.bits else "their kept values"
    return " ".join(filter(None, [
        f"The weights are packed, {held} and a bit a place: {packed}. `pip install lors-cli` and the line "
        "`import lors_cli` let transformers load them; without it the load fails. They are computed with as they are "
        "on a CPU, where a C compiler and torch 2.10 or later are there"
        f"{'' if packed.bits else ', and on an NVIDIA GPU from Ampere on, where Triton is'}; elsewhere they are "
        "unpacked while they are loaded, bit for bit what was packed, and are as fast as dense ones.",
        packed.speed,
    ]))  # fmt: skip


def recipe_text(base: str, settings: dict[str, dict[str, Any] | None], fingerprint: str) -> str:
    """The settings as a recipe, without what only this machine has.

    Args:
        fingerprint: of the model that the pipeline started from, which says its settings.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "-", short_name(base)).lstrip("._-") or "model"
    stages = {stage: without_none(portable(config)) for stage, config in settings.items() if config is not None}
    return write({"name": f"{name[:90]}-sparse", "model": {"path": portable(base), **settings_in(fingerprint)},
                  **stages})  # fmt: skip


def _results(metrics: dict[str, Any]) -> list[Block]:
    rows = [[key, str(metrics[key])] for key in _SHOWN if key in metrics]
    return [table(["result", "value"], rows)] if rows else []
