"""`lors inspect`: the sparsity of any checkpoint, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.data.saved_prompts import template_name
from lors_cli.errors import UsageError
from lors_cli.files import atomic, records
from lors_cli.grid import Grid, packed_metrics
from lors_cli.models.blocks import PrunableWeight, prunable_weights
from lors_cli.models.checks import safetensors_files
from lors_cli.models.grids import load_grids
from lors_cli.models.hub import here
from lors_cli.models.packed.format import grid_keys, mask_key, specs_of
from lors_cli.models.packed.inspection import measure_checkpoint, measure_packed, packed_facts, packed_settings
from lors_cli.models.sources import locate
from lors_cli.models.stored import open_tensors
from lors_cli.sparsity import CANDIDATES, DENSE_BELOW, LayerSparsity, Pattern, measure, num_violations, summarise

if TYPE_CHECKING:
    import torch

    from lors_cli.recipe.schema import ModelConfig

TOLERATED = 0.01
"""Share of groups that may break an N:M pattern for it still to be recognised (and its violations counted)."""


def inspect(model: ModelConfig, pattern: Pattern | None = None) -> dict[str, Any]:
    """Sparsity, pattern and violations over the decoder blocks' weights; embeddings, head and routers are left out.

    Args:
        pattern: what to hold it against; by default what its stage.json says, else what its zeros look like.

    Returns:
        The document of `lors inspect --json`: pattern, sparsity, violations, layers; `dense_layers`, by name, are those
        of a sparse model that are none of these; `packed`, of a packed one, its bytes and those of the plain one;
        `quantize`, `bits_a_weight` and `off_grid` of one on grids.
    """
    from lors_cli.models.loading import load_model

    folder = Path(model.path)
    record = records.read_record(folder)
    if record is not None and pattern is None:
        locate(model.path)
        found = _measure_recorded(folder, record)
        if found is not None:
            return found
    folder = here(model, weights=True).folder or folder  # with which grids come
    if packed_settings(folder) is not None:
        return _measure_packed(model, pattern)
    grids = load_grids(folder)
    if grids:  # in another number format the values would lie on none
        dtype = next(iter(grids.values())).scales.dtype
        model = replace(model, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    weights = prunable_weights(load_model(model))
    held_to = {} if pattern else layer_patterns(weights, record, TOLERATED)
    if pattern:
        held_to = dict.fromkeys((name for name in weights if name not in dense_layers(record)), pattern)
    patterns: dict[str, Pattern | None] = {**held_to} if held_to else dict.fromkeys(weights)
    layers = [measure(name, weights[name].matrix, held) for name, held in patterns.items()]
    dense = [name for name in weights if name not in patterns]
    found = _with_dense(summarise(layers, next(iter(patterns.values()), None)), dense)
    packable = [layer for layer in layers if weights[layer.name].is_linear]
    return found | _on_grids(grids, packable, patterns, lambda name: weights[name].matrix)


def _on_grids(
    grids: dict[str, Grid], layers: list[LayerSparsity], patterns: Mapping[str, Pattern | None],
    matrix: Callable[[str], torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    """What there is to say of a checkpoint with grids beside it; `layers` can be packed, `matrix` gives a weight."""
    grids = {name: grid for name, grid in grids.items() if name in patterns}
    if not grids:
        return {}
    grid = next(iter(grids.values()))
    off = 0
    for name, each in grids.items():
        weight = matrix(name)
        off += int((each.rounded(weight) != weight).sum())
    held = [layer.as_packed(patterns[layer.name]) for layer in layers]
    return {**packed_metrics(grid.spec, held, 8 * grid.scales.dtype.itemsize), "off_grid": off}


def _measure_packed(model: ModelConfig, pattern: Pattern | None) -> dict[str, Any]:
    """A packed checkpoint that no record describes, or held against another pattern: the network gives the shapes."""
    from lors_cli.models.packed.checkpoint import Checkpoint

    source = Checkpoint(model, packed=True)
    assert source.config is not None
    patterns = dict.fromkeys(source.config.modules, pattern) if pattern else None
    layers, held = measure_checkpoint(source, patterns)
    found = _with_dense(summarise(layers, held), source.plain)
    return found | packed_facts(source.tensors, source.keys, source.shapes, source.specs)


def dense_layers(record: records.StageRecord | None) -> list[str]:
    """The layers that pruning was told to skip, or packing left as they are, by the record of a sparse model."""
    metrics = record.metrics if record else {}
    return [*metrics.get("dense_layers", ()), *metrics.get("left_dense", ())]


def _with_dense(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {**found, "dense_layers": names} if names else found


def prompt_of(model: ModelConfig) -> dict[str, str | None]:
    """The prompt that a checkpoint's chat template writes: which format it is, and what says so.

    Returns:
        {"format", "from"}: one of ours, `chat` for any other template, None where there is no template.
    """
    source = here(model)
    if source.gguf_file is not None or source.folder is None:
        return {"format": None, "from": None}
    record, file = records.read_record(source.folder), source.folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else None
    if template is None:
        settings: Any = atomic.read_json(source.folder / "tokenizer_config.json")
        template = settings.get("chat_template") if isinstance(settings, dict) else None
        file = file.with_name("tokenizer_config.json")
    if template is None:
        return {"format": None, "from": None}
    name = template_name(template) if isinstance(template, str) else None
    tuned = bool(name or (record and record.metrics.get("prompt")))
    return {"format": name or "chat", "from": f"{file.name}, {'as it was tuned' if tuned else 'as the base has it'}"}


def _measure_recorded(folder: Path, record: records.StageRecord) -> dict[str, Any] | None:
    """What a stage here has made sparse, straight from its file: making the model takes longer than all the rest.

    Returns:
        None where the record names no pattern, or the weights do not lie there one by one as it says.
    """
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in record.metrics.get("layers", ())}
    if record.metrics.get("pattern") in (None, "dense") or not shapes:
        return None
    patterns, keys = _held_to(record, list(shapes)), {name: f"{name}.weight" for name in shapes}
    settings = packed_settings(folder)
    try:
        tensors = open_tensors(safetensors_files(folder, str(folder)), str(folder))
    except UsageError:  # loading the model says what is wrong with it
        return None
    if not tensors.keys() >= set(keys.values()):
        return None
    if settings is None:
        if any(tuple(tensors[keys[name]].get_shape()) != shape for name, shape in shapes.items()):
            return None
        layers = [measure(name, tensors[keys[name]][:], held) for name, held in patterns.items()]
        found = _with_dense(summarise(layers, patterns[layers[0].name]), dense_layers(record))
        return found | _on_grids(load_grids(folder), layers, patterns, lambda name: tensors[keys[name]][:])
    kept = settings.get("modules")
    if not (isinstance(kept, dict) and kept.keys() == shapes.keys() and all(type(n) is int for n in kept.values())):
        return None
    specs = specs_of(settings)
    if any(
        part not in tensors for name, key in keys.items() for part in (mask_key(key), *grid_keys(key, specs.get(name)))
    ):
        return None
    held = None if settings.get("pattern") == "unstructured" else Pattern.parse(str(settings.get("pattern")))
    layers = measure_packed(tensors, keys, shapes, kept, held, patterns, specs)
    found = _with_dense(summarise(layers, patterns[layers[0].name]), dense_layers(record))
    return found | packed_facts(tensors, keys, shapes, specs)


def _held_to(record: records.StageRecord, names: list[str]) -> dict[str, Pattern]:
    """What a record says that its weights keep to; unstructured, each to its own sparsity."""
    pattern = record.metrics["pattern"]
    if pattern != "unstructured":
        return dict.fromkeys(names, Pattern.parse(pattern))
    return {layer["name"]: Pattern(None, None, layer["sparsity"]) for layer in record.metrics["layers"]}


def layer_patterns(
    weights: dict[str, PrunableWeight], record: records.StageRecord | None, tolerated: float = 0.0
) -> dict[str, Pattern]:
    """What each pruned weight keeps to (none of a dense model), by the stage record beside a checkpoint or its zeros.

    Unstructured sparsity is held to by each weight on its own: it may differ from one to the next.

    Args:
        tolerated: share of groups that may break a pattern N:M that no record says; `lors inspect` counts them.

    Raises:
        UsageError: the record names a weight that the model lacks.
    """
    name = record.metrics.get("pattern") if record else None
    if record is not None and name not in (None, "dense"):
        shares = {layer["name"]: layer["sparsity"] for layer in record.metrics["layers"]}
        missing = [layer for layer in shares if layer not in weights]
        if missing:
            raise UsageError(f"stage.json names {missing[0]}, which the checkpoint does not have.")
        return _held_to(record, list(shares))
    found = detect_pattern(weights, tolerated)
    if found is None:
        return {}
    zeros = {layer: int((weight.matrix == 0).sum()) / weight.matrix.numel() for layer, weight in weights.items()}
    return {layer: found if found.structured else Pattern(None, None, share)
            for layer, share in zeros.items() if share >= DENSE_BELOW}  # fmt: skip


def detect_pattern(weights: dict[str, PrunableWeight], tolerated: float = TOLERATED) -> Pattern | None:
    """The pattern that the zeros of a model look like, but for a share of its groups; None when it is dense."""
    zeros = {name: int((weight.matrix == 0).sum()) for name, weight in weights.items()}
    if sum(zeros.values()) < DENSE_BELOW * sum(math.prod(weight.shape) for weight in weights.values()):
        return None
    shapes = {name: weight.shape for name, weight in weights.items()}
    sparse = [name for name, (rows, columns) in shapes.items() if zeros[name] >= DENSE_BELOW * rows * columns]
    total = sum(math.prod(shapes[name]) for name in sparse)
    sparsity = sum(zeros[name] for name in sparse) / max(total, 1)
    for n, m in CANDIDATES:
        candidate = Pattern(n, m, 1 - n / m)
        if sparsity < candidate.sparsity - tolerated or any(shapes[name][1] % m for name in sparse):
            continue
        if sum(num_violations(weights[name].matrix, candidate) for name in sparse) <= tolerated * total / m:
            return candidate
    return Pattern(None, None, sparsity)
