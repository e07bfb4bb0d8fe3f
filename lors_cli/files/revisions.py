"""Which commit a branch or tag of a hub repository stands for, so that a run keeps to one and records it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lors_cli.errors import MissingError, UsageError, is_connection_failure, is_passing, offline_hint, translate
from lors_cli.files import atomic
from lors_cli.output import console

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(/[\w+-][\w.+-]*)*")
_TIMEOUT_S = 10.0
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Between questions to a hub that cannot answer."""


Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Listing:
    """What the hub says of a repository at a revision: its commit, and of a model the bytes of each of its files and
    its card's fields."""

    commit: str
    files: dict[str, int]
    card: dict[str, Any] = field(default_factory=dict)


def pinned_revision(repo: str, revision: str) -> str:
    """The commit of a model's revision, or the revision itself where neither the hub nor its cache here knows it.

    Such a one cannot be loaded either (`known_commit`), so that no result is ever recorded without a commit.

    Raises:
        UsageError: no revision could be called so.
        MissingError: the hub has no such repository or revision, does not give it, or cannot answer.
    """
    return commit_of(repo, revision, "model") or revision


def known_commit(repo: str, revision: str, kind: Kind = "model") -> str:
    """The commit of a revision.

    Raises:
        UsageError, MissingError: as `pinned_revision`, and where it is not known.
    """
    commit = commit_of(repo, revision, kind)
    if commit is None:
        raise MissingError(f"{repo} is not in the hub's cache here, and the hub cannot be reached.", offline_hint())
    return commit


@cache
def commit_of(repo: str, revision: str, kind: Kind = "model") -> str | None:
    """The commit of a revision: what the hub says, else, if no connection can be made, what it said the last time.

    Asked once a process, so that all parts of a run read the same commit, whatever is pushed meanwhile; and written
    to the hub's cache, as huggingface_hub does it for what is downloaded by the name of a branch.

    Returns:
        40 hexadecimal digits, None where it is not known.

    Raises:
        UsageError, MissingError: as `pinned_revision`.
    """
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"revision: {revision!r} is no name of a branch, tag or commit.")
    if _COMMIT.fullmatch(revision):
        return revision
    folder = cache_folder(kind, repo)
    reference = folder / "refs" / revision
    listing = listing_of(repo, revision, kind)
    if listing is None:
        found = cached_reference(folder, revision)
        return found if found is not None and _COMMIT.fullmatch(found) else None
    try:
        atomic.write_text(reference, listing.commit)
    except OSError as error:
        console.detail(f"  {reference} cannot be written: offline, {revision} will not be known. {error}")
    return listing.commit


@cache
def listing_of(repo: str, revision: str, kind: Kind = "model") -> Listing | None:
    """What the hub says of a revision, None where no connection can be made; asked once a process.

    Raises:
        MissingError: the hub has no such repository or revision, does not give it, or cannot answer even after a while.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    for wait_s in (*_WAITS_S, None):
        try:
            info = _info(repo, revision, kind)
        except Exception as error:
            if is_connection_failure(error):
                console.detail(f"  the hub cannot be reached: {error}")
                return None
            known = translate(error)
            if wait_s is None or known is None or not is_passing(error):
                raise (known or error) from error
            console.info(f"  {known.message}; asked again in {wait_s:g} s")
            time.sleep(wait_s)
        else:
            assert info.sha is not None, repo
            files = {file.rfilename: file.size or 0 for file in info.siblings or []}
            return Listing(info.sha, files, info.card_data.to_dict() if info.card_data else {})
    raise AssertionError("the last question is answered or raises")


def _info(repo: str, revision: str, kind: Kind) -> Any:
    """What the hub tells of a repository; of a dataset, which may have 60,000 files, the commit alone."""
    from huggingface_hub import HfApi

    if kind == "dataset":
        return HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT_S, expand=["sha"])
    return HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)


def cache_folder(kind: Kind, repo: str) -> Path:
    """Where this machine's hub cache has a repository; it may be missing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}")


def cached_reference(folder: Path, revision: str) -> str | None:
    """What a branch or tag stood for when it was last cached, None where it was not."""
    reference = folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
