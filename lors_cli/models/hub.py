"""A model on the hub, brought here: its files at one commit, in the hub's own cache, then a folder like any other."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import MissingError, UsageError, offline_hint, translate
from lors_cli.files.revisions import Listing, known_commit, listing_of
from lors_cli.models.checks import PICKLE_HINT, safetensors_files
from lors_cli.models.grids import GRIDS_NAME
from lors_cli.models.sources import ModelSource, check_folder, locate
from lors_cli.output import console, progress

if TYPE_CHECKING:
    from lors_cli.recipe.schema import ModelConfig

SETTINGS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken")
WEIGHTS = ("model*.safetensors", GRIDS_NAME)
MIB = 1 << 20
SHOWN_FROM = MIB // 2
"""Bytes of a download that is worth a line."""


def here(config: ModelConfig, *, weights: bool = False) -> ModelSource:
    """Where a model lies on this machine; what is on the hub is downloaded, its settings, or its weights too.

    Whatever is checked of a folder is so checked of a hub id.

    Raises:
        MissingError: not on the hub, not given by it, or not reachable.
        UsageError: no model that is loaded, such as an adapter, or pickled weights.
    """
    source = locate(config.path)
    if source.repo is None:
        assert source.folder is not None
        if config.revision not in ("main", *source.folder.parts):  # a snapshot in the hub's cache is its commit's
            _say_without_effect(config.path, config.revision)
        return source
    commit = known_commit(source.repo, config.revision)
    listing = listing_of(source.repo, config.revision)
    if listing and listing.files:
        _refuse(sorted(listing.files), config.path)
    folder = _snapshot(source.repo, commit, SETTINGS, listing)
    check_folder(folder, config.path)
    if weights:
        folder = _snapshot(source.repo, commit, (*SETTINGS, *WEIGHTS), listing)
        check_weights(config, folder)
    return ModelSource(folder=folder)


@cache
def _say_without_effect(path: str, revision: str) -> None:
    console.warn(f"revision: {revision} has no effect: {path} is read as it lies here, not from the hub.")


def check_weights(config: ModelConfig, folder: Path) -> None:
    """Refuse a model, here in `folder`, that has not all its weights; of a hub that can be asked they are to be had.

    Raises:
        MissingError: the hub cannot be reached, and they are not in its cache.
        UsageError: there are none in a folder that is no cache, or not all.
    """
    repo = locate(config.path).repo
    if repo is None:
        safetensors_files(folder, config.path)
    elif listing_of(repo, config.revision) is None and not is_whole(folder):
        raise MissingError(
            f"{repo}: its weights are not all in the hub's cache here, and the hub cannot be reached.", offline_hint()
        )


def is_whole(folder: Path) -> bool:
    """Whether a folder has weights, all that its index names."""
    try:
        return bool(safetensors_files(folder, str(folder)))
    except UsageError:
        return False


def _refuse(files: list[str], path: str) -> None:
    """Refuse by its list of files a repository that holds no model that could be loaded."""
    if "adapter_config.json" in files and "config.json" not in files:
        raise UsageError(
            f"{path} is an adapter on the hub, not a model.", "Give the model that it was made for, or a merged one."
        )
    if "config.json" not in files:
        packed = [file for file in files if file.lower().endswith(".gguf")]
        hint = f"Download {packed[0]} and give its path." if packed else "Is it a model for transformers?"
        raise MissingError(f"{path} on the hub is no checkpoint: it has no config.json.", hint)
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth")) and "/" not in file]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise UsageError(f"{path} on the hub has no safetensors, only pickled weights: {pickled[0]}.",
                         PICKLE_HINT.replace("FOLDER)", f"{path!r})", 1))  # fmt: skip


def _snapshot(repo: str, commit: str, patterns: Sequence[str], listing: Listing | None) -> Path:
    """The folder of the hub's cache with a repository's files at a commit, downloaded as far as they are not there; a
    hub that could not be asked for its `listing` is not asked again, which takes minutes."""
    from huggingface_hub import snapshot_download

    try:
        with _shown(repo, commit, patterns, listing.files if listing else {}) as bar:
            return Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns), tqdm_class=bar,
                                          local_files_only=listing is None))  # fmt: skip
    except Exception as error:
        known = translate(error)
        if isinstance(known, MissingError):
            raise MissingError(f"{repo}: no such folder here, and: {known.message}", known.hint) from error
        raise


@contextmanager
def _shown(repo: str, commit: str, patterns: Sequence[str], files: dict[str, int]) -> Iterator[Any]:
    """Show a download as one of our own steps, with a line in the log where it is not a small one.

    Args:
        files: their bytes, as far as the hub could be asked.

    Returns:
        What huggingface_hub makes its bars of; the one that counts bytes moves ours.
    """
    from huggingface_hub import try_to_load_from_cache
    from tqdm.std import tqdm

    wanted = {name: size for name, size in files.items()
              if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
              and not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)}  # fmt: skip
    total = sum(wanted.values())
    tasks: list[progress.Task] = []

    class Bar(tqdm):
        monitor_interval = 0  # its thread waits for ever where, as it starts, another bar is collected

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            self.in_bytes = options.get("unit") == "B"
            super().__init__(*arguments, **{**options, "disable": False, "file": io.StringIO(), "leave": False})

        def update(self, amount: float | None = 1) -> bool | None:
            moved = super().update(amount)
            for task in tasks if self.in_bytes else ():
                task.update(max(task.completed, round(self.n / MIB)))
            return moved

    if total < SHOWN_FROM:
        yield Bar
        return
    console.info(f"  downloading {repo} at {commit[:8]}: {len(wanted)} files, {console.gib(total)}")
    with progress.progress(f"download {repo.rpartition('/')[2]}", round(total / MIB), "MiB") as task:
        tasks.append(task)
        yield Bar
