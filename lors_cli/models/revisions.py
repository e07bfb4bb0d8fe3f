"""Which commit a branch or tag of a hub repository stands for, so that a run keeps to one and records it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal

from lors_cli.errors import MissingError, UsageError, translate

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(/[\w+-][\w.+-]*)*")
_TIMEOUT_S = 10.0


def pinned_revision(repo: str, revision: str) -> str:
    """The commit of a revision, or the revision itself where neither the hub nor its cache here knows it.

    Raises:
        UsageError: no revision could be called so.
    """
    return commit_of(repo, revision) or revision


@cache
def commit_of(repo: str, revision: str) -> str | None:
    """The commit of a revision: what the hub says, else what it said when the repository was last cached here.

    Asked once a process, so that all parts of a run read the same commit, whatever is pushed meanwhile.

    Returns:
        40 hexadecimal digits, None where it is not known.

    Raises:
        UsageError: no revision could be called so.
    """
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"revision: {revision!r} is no name of a branch, tag or commit.")
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S).sha
        except Exception as error:
            if not isinstance(translate(error), MissingError):
                raise
    found = cached_reference(cache_folder("model", repo), revision)
    return found if found is not None and _COMMIT.fullmatch(found) else None


def cache_folder(kind: Literal["model", "dataset"], repo: str) -> Path:
    """Where this machine's hub cache has a repository; it may be missing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}")


def cached_reference(folder: Path, revision: str) -> str | None:
    """What a branch or tag stood for when it was last cached, None where it was not."""
    reference = folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
