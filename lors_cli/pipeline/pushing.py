"""A checkpoint to the hub: which files go, with which card, and that they get there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import atomic, records
from lors_cli.models.checks import safetensors_files
from lors_cli.models.grids import GRIDS_NAME
from lors_cli.models.origins import portable, read_fields
from lors_cli.models.sources import locate
from lors_cli.output import console, progress
from lors_cli.pipeline.cards import RECIPE_NAME, made_card
from lors_cli.pipeline.standing import standing_stages

CHECKPOINT = (
    "*.safetensors", "*.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
)  # fmt: skip
FILES = (*CHECKPOINT, "LICENSE*", "NOTICE*", records.CARD_NAME)
"""What goes; the rest is of the run: records, logs, training checkpoints, with paths of the machine."""
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
INNER_FILES = (*ADAPTER_FILES, f"adapter/{GRIDS_NAME}", GRIDS_NAME)
"""What goes of folders within."""
_TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Push:
    """What is to go where."""

    folder: Path
    repo: str
    revision: str
    is_private: bool
    exists: bool
    files: dict[str, Path | bytes]
    """Path in the repository to a file here, or to its content."""
    left_out: list[str]
    removed: list[str]
    """What of the checkpoint that is in the repository now has no place in this one: transformers would read it."""
    card: dict[str, Any] = field(default_factory=dict)
    """Its front matter."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: source.stat().st_size if isinstance(source, Path) else len(source)
                for name, source in self.files.items()}  # fmt: skip


def chosen_checkpoint(folder: Path) -> Path:
    """The checkpoint that is meant by a folder: itself, or of a run's the tuned model, else the pruned one.

    Raises:
        MissingError: there is no checkpoint, or not all of it.
        UsageError: its weights are none that could be loaded.
    """
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        standing = standing_stages(folder)
        made = next((stage for stage in ("tune", "prune") if stage in standing), None)
        if made is None:
            raise MissingError(f"{folder} is a run without a finished model.", "lors run resumes it.")
        console.info(f"{folder} is a run: its {'tuned' if made == 'tune' else 'pruned'} model goes, {folder / made}.")
        folder = folder / made
    if not folder.is_dir():
        raise MissingError(f"No such folder: {folder}")
    locate(str(folder.resolve()))
    safetensors_files(folder, str(folder))
    return folder


def prepare(folder: Path, repo: str, *, private: bool, revision: str, scores: Path | None) -> Push:
    """What a push would do; asks the hub who the token belongs to and what is there.

    Args:
        folder: of `chosen_checkpoint`.
        repo: owner/name, or a name of the user's own.
        scores: an eval folder; default: that of the run.

    Raises:
        UsageError: no such name could be, or a public repository is to be private.
        MissingError: no token, one that is refused, no connection.
    """
    repo, is_private, there = _look(repo, private, revision)
    files, left_out = _files(folder)
    record = records.read_record(folder)
    if record is not None and records.is_finished(folder, record.fingerprint):
        files |= made_card(folder, record, repo, scores)
    elif scores is not None:
        raise UsageError(f"{folder} is not as a stage of lors left it, so no scores are known to be of it.")
    if isinstance(files.get(ADAPTER_FILES[0]), Path):
        content = portable(atomic.read_json(folder / ADAPTER_FILES[0]))
        files[ADAPTER_FILES[0]] = (json.dumps(content, indent=2) + "\n").encode()
    removed = sorted(name for name in set(there or ()) - files.keys() if _is_of_checkpoint(name))
    return Push(folder, repo, revision, is_private, there is not None, files, left_out, removed, _fields(folder, files))


def _is_of_checkpoint(name: str) -> bool:
    """Whether a file in a repository is one that a push puts there anew, a licence and the card apart."""
    if "/" in name:
        return name in INNER_FILES
    return name == RECIPE_NAME or any(fnmatch(name, each) for each in CHECKPOINT)


def _files(folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """The files that go, and the names of what is left out."""
    names = sorted(path.name for path in folder.iterdir())
    going = [name for name in names if (folder / name).is_file() and any(fnmatch(name, each) for each in FILES)]
    inner = [name for name in INNER_FILES if (folder / name).is_file()]
    left_out = [name for name in names if name not in {*going, *(Path(name).parts[0] for name in inner)}]
    return {name: folder / name for name in [*going, *inner]}, left_out


def _fields(folder: Path, files: dict[str, Path | bytes]) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    made = files.get(records.CARD_NAME)
    return ModelCard(made.decode()).data.to_dict() if isinstance(made, bytes) else read_fields(folder)


def _look(repo: str, private: bool, revision: str) -> tuple[str, bool, list[str] | None]:
    """The repository's whole name, whether it is or will be private, and its files, None where it is not there.

    A branch that is not there yet will begin with those of main.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name on the hub: {error}", "It is owner/name.") from error
    with _understood(repo):
        user = HfApi().whoami()["name"]
        repo = repo if "/" in repo else f"{user}/{repo}"
        try:
            info = at_revision = HfApi().model_info(repo)
            if revision != "main":
                with suppress(RevisionNotFoundError):
                    at_revision = HfApi().model_info(repo, revision=revision)
        except RepositoryNotFoundError:
            return repo, private, None
    if private and not info.private:
        raise UsageError(
            f"{repo} is on the hub already, and public: --private is for a new one.",
            "Make it private in its settings on the hub, or choose another name.",
        )
    return repo, bool(info.private), [file.rfilename for file in at_revision.siblings or []]


def push(plan: Push) -> tuple[str, str]:
    """Upload as one commit, which takes away what it leaves no place for; what the hub has already is not sent again,
    so a stopped push is gone on with.

    Returns:
        The commit, and its address.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    removed = [CommitOperationDelete(name) for name in plan.removed]
    added = [CommitOperationAdd(name, source) for name, source in plan.files.items()]
    total = console.gib(sum(plan.sizes().values()))
    with _understood(plan.repo), progress.busy(f"uploading {len(added)} files, {total}"):
        if not plan.exists:
            api.create_repo(plan.repo, private=plan.is_private)
        if plan.revision != "main":
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        done = api.create_commit(plan.repo, [*added, *removed], commit_message="Upload with lors",
                                 revision=plan.revision)  # fmt: skip
    return done.oid, done.commit_url


@contextmanager
def _understood(repo: str) -> Iterator[None]:
    """Give the hub's refusals their meaning for one who wants to write.

    Raises:
        MissingError: no token, or one that may not.
        UsageError: the hub does not take the card.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

    login = f"Make a token that may write at {_TOKENS}, then: hf auth login (or set HF_TOKEN)."
    try:
        with warnings.catch_warnings(record=True) as said:
            yield
        for warning in said:
            if not issubclass(warning.category, DeprecationWarning):  # for the library's authors
                console.warn(" ".join(str(warning.message).split()))
    except LocalTokenNotFoundError as error:
        raise MissingError("There is no token of the hub here, and one is needed to write.", login) from error
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        line = str(error).strip().splitlines()[-1]
        if status == 401:
            raise MissingError(f"The hub refuses the token: {line}", login) from error
        if status == 403:
            raise MissingError(f"This token may not write to {repo}: {line}", login) from error
        raise
    except ValueError as error:
        if "Invalid metadata in README.md" not in str(error):
            raise
        raise UsageError(f"The hub does not take the card: {' '.join(str(error).split())}",
                         "Mend the front matter of README.md.") from error  # fmt: skip
