"""Where a checkpoint comes from, as its model card says it to the hub: base model, data sets, licence, language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lors_cli.data import hub
from lors_cli.data.text_files import FORMATS
from lors_cli.files.records import CARD_NAME, StageRecord, read_record
from lors_cli.files.revisions import listing_of
from lors_cli.models.sources import PACKAGE_SCHEME, ModelSource, hub_cache_id, is_known_as, locate, short_name
from lors_cli.output import console
from lors_cli.recipe.schema import ModelConfig

TAG = "lors"
"""In the card of every checkpoint that is made here."""
OF_THE_BASE = ("license", "license_name", "license_link", "language")
"""What a card takes over from the base model's."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_DATA = re.compile(r"hub:([\w.-]+/[\w.-]+?)[/@].*")
_WORDS = ("system_instruction",)
"""Settings that are no name of anything."""
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json", *FORMATS)

Fields = dict[str, Any]
"""A card's front matter."""


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/name` on the hub rather than a folder or a file here."""
    return (
        bool(_HUB_ID.fullmatch(name))
        and len(name) <= 96
        and not name.endswith(_FILE_ENDINGS)
        and "--" not in name
        and ".." not in name
        and not Path(name).exists()
    )


def read_fields(folder: Path) -> Fields:
    """The front matter of a folder's card; empty where there is none, or none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD_NAME) or {} if (folder / CARD_NAME).is_file() else {}
    except Exception as error:  # anyone may have written it, and YAML fails in many ways
        console.detail(f"  the front matter of {folder / CARD_NAME} cannot be read: {error}")
        return {}


def inherited(model: ModelConfig) -> Fields:
    """What a card takes over from the model that its own was made from; what is not known here is left out.

    Of a model that was made here the base and the data sets too: they are what it was made from.
    """
    source = locate(model.path)
    if source.repo is not None:
        listing = listing_of(source.repo, model.revision)
        about = {key: value for key in OF_THE_BASE if (value := (listing.card if listing else {}).get(key))}
        return {"base_model": source.repo, **about}
    return _of_folder(source)


def _of_folder(source: ModelSource) -> Fields:
    assert source.folder is not None
    known = read_fields(source.folder)
    made_here = TAG in (known.get("tags") or ())
    base = hub_cache_id(source.folder)
    wanted = (*OF_THE_BASE, "base_model", "datasets") if made_here and not base else OF_THE_BASE
    return ({"base_model": base} if base else {}) | {key: known[key] for key in wanted if key in known}


def made_from(folder: Path, record: StageRecord) -> tuple[Path, StageRecord] | None:
    """The checkpoint that one was made from, where it is still there as a stage of lors left it, with its record."""
    for place in (Path(str(record.inputs.get("path"))), folder.parent / "tune", folder.parent / "prune"):
        found = read_record(place)
        if found is not None and is_known_as(record.inputs.get("model"), place, found):
            return place, found
    return None


def with_dataset(fields: Fields, fingerprint: str) -> Fields:
    """A card's fields with a data set more, if its fingerprint (`fingerprint_source`) says that the hub gave it."""
    found = _HUB_DATA.fullmatch(fingerprint)
    datasets = [*fields.get("datasets", ()), *([found[1]] if found else ())]
    return {**fields, "datasets": list(dict.fromkeys(datasets))} if datasets else fields


def portable(value: Any) -> Any:
    """Settings without the paths of this machine: of a file or folder its name alone."""
    if isinstance(value, dict):
        return {key: item if key in _WORDS else portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if not isinstance(value, str) or value.startswith(PACKAGE_SCHEME):
        return value
    if (place := hub.parse(value)) and looks_like_hub_id(place.repo):
        return value
    return short_name(value) if "/" in value or "\\" in value else value
