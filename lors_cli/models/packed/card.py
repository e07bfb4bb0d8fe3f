"""The model card of a packed checkpoint: what its sparse model's says, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.files import hashes, records
from lors_cli.models.card import LOADS_PACKED, PackedSize, about_packed, model_card
from lors_cli.models.origins import inherited, made_from, read_fields
from lors_cli.models.packed.measured import size_said
from lors_cli.models.quantised import PACKED
from lors_cli.models.sources import model_fingerprint
from lors_cli.output.markdown import Code, to_markdown
from lors_cli.recipe.yaml12 import write

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig

_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\n---[ \t]*\r?\n", re.DOTALL)


def packed_card(model: ModelConfig, folder: Path, metrics: dict[str, Any], environment: dict[str, Any]) -> str:
    """README.md of a packed checkpoint.

    One that lors wrote is written anew from the records of its stages; anyone else's is kept, below how to load it.

    Args:
        model: the sparse model.
        folder: where it lies here.
        metrics: of the pack stage.
    """
    size, fields = size_said(metrics), inherited(model)
    card, record = folder / records.CARD_NAME, records.read_record(folder)
    if card.is_file() and (record is None or hashes.file_sha256(card) != record.files.get(records.CARD_NAME)):
        return _kept(folder, card.read_text(encoding="utf-8", errors="replace"), fields, size)
    base = (made_from(folder, record) or (None, None))[1] if record else None
    origin = base or record
    tune = None if record is None else record.config if record.stage == "tune" else record.metrics.get("adapter")
    said = record.metrics if record else {**metrics, "dense_layers": metrics["left_dense"]}
    return model_card(
        base_model=str(origin.inputs.get("path", model.path)) if origin else model.path,
        prune=next((made.config for made in (record, base) if made and made.stage == "prune"), None),
        tune=tune, metrics=said, environment=environment, fields=fields, packed=size,
        fingerprint=str(origin.inputs.get("model")) if origin else model_fingerprint(model),
    )  # fmt: skip


def _kept(folder: Path, text: str, fields: dict[str, Any], size: PackedSize) -> str:
    """Another's card, or one that was edited."""
    front = {**read_fields(folder), **fields}
    tags = front.get("tags") if isinstance(front.get("tags"), list) else []
    front["tags"] = list(dict.fromkeys([*(tags or []), PACKED]))
    code = (
        f"{LOADS_PACKED}from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # this folder'
    )
    packed = to_markdown(["# Packed", about_packed(size), Code(code, "python"), "What follows is of the plain model."])
    return f"---\n{write(front)}---\n\n{packed}\n{_FRONT_MATTER.sub('', text).lstrip()}"
