"""Datasets on the hub, each at one commit, read through `datasets`: their first rows, a stream of them, or all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from lors_cli.data.layouts import Row
from lors_cli.errors import LorsError, MissingError, UsageError, innermost, offline_hint, translate
from lors_cli.files.remembered import Remembered
from lors_cli.files.revisions import known_commit
from lors_cli.output import console

FORM = "org/name, org/name:configuration or org/name:configuration@revision"
"""How a dataset on the hub is named."""
HELD_OUT = ("validation", "valid", "dev", "test")
"""Splits that perplexity is measured on: the first that there is."""
_datasets = Remembered("datasets", "datasets")
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.+-]+))?(?:@([\w./+-]+))?")
_PAGE = re.compile(r"(?:https?://huggingface\.co/datasets/|hf://datasets/|datasets/)([\w.-]+/[\w.-]+)")
_AVAILABLE = re.compile(r"(?:Available: |available configs: )\[(.*?)\]", re.DOTALL)
"""What `datasets` says of configurations."""


@dataclass(frozen=True)
class Place:
    """A dataset on the hub."""

    repo: str
    config: str | None = None
    revision: str = "main"
    instead: str = field(default="", compare=False)
    """What to say besides where it cannot be had."""

    @property
    def commit(self) -> str:
        """The commit that the revision stands for.

        Raises:
            MissingError: the hub has no such dataset or revision, or neither it nor the cache here can tell.
        """
        found = _asked(self.repo, self.revision)
        if isinstance(found, MissingError):
            raise _reason(found, self)
        return found

    def fingerprint(self, split: str) -> str:
        """What identifies the content of a split, without reading it.

        Where the commit cannot be had it names the revision: this process can then read nothing of it (`commit`), so no
        result is recorded without one, and a dry run tells of it beside all else that is in the way.
        """
        found = _asked(self.repo, self.revision)
        commit = self.revision if isinstance(found, MissingError) else found
        return f"hub:{self.repo}@{commit}/{self.config or 'default'}/{split}"


_commits: dict[tuple[str, str], str | MissingError] = {}
"""By repository and revision."""


def _asked(repo: str, revision: str) -> str | MissingError:
    """The commit of a revision, or why it is not known; the same for the whole process."""
    if (repo, revision) not in _commits:
        try:
            _commits[repo, revision] = known_commit(repo, revision, "dataset")
        except MissingError as error:
            _commits[repo, revision] = error
    return _commits[repo, revision]


def known_commits() -> list[tuple[str, str, str]]:
    """Repository, revision and commit of what this process reads, for another one to `keep_to`."""
    return [(*place, commit) for place, commit in _commits.items() if isinstance(commit, str)]


def keep_to(commits: Iterable[Sequence[str]]) -> None:
    """Read the commits that another process has told (`known_commits`), whatever was pushed meanwhile."""
    _commits.update({(repo, revision): commit for repo, revision, commit in commits})


def parse(name: str) -> Place | None:
    """The dataset that a name means, None where it is not of the form of one (`FORM`)."""
    found = _ID.fullmatch(name)
    if found is None:
        return None
    return Place(found[1], found[2], found[3] or "main", f"No file {name} is here either.")


def what_to_write(name: str) -> str:
    """A hint for a name that is of no form."""
    page = _PAGE.match(name)
    return f"For that dataset write {page[1]}." if page else f"A dataset on the hub is written {FORM}."


# ---- reading


def first_rows(place: Place, split: str, number: int) -> list[Row]:
    """The first rows of a split, without downloading the rest.

    Raises:
        MissingError, UsageError: as `all_rows`.
    """
    return list(islice(streamed_rows(place, split), number))


def streamed_rows(place: Place, split: str) -> Iterator[Row]:
    """The rows of a split, read from the hub (or its cache here, offline) as they are asked for."""
    yield from told(place, lambda: _streaming(place, split))


def all_rows(place: Place, split: str) -> Iterator[Row]:
    """The rows of a split, downloaded before to the cache of `datasets`.

    Raises:
        MissingError: it is not on the hub, gated, a script, or not here while the hub cannot be reached.
        UsageError: it has no such configuration or split, or its files are broken.
    """
    yield from told(place, lambda: _downloaded(place, split))


def open_stream(place: Place, split: str) -> Any | None:
    """A split as an IterableDataset that can be gone on from, None where it is read from the cache here."""
    return None if _is_copy(_builder(place)) else _explained(place, lambda: _streaming(place, split))


def find_split(place: Place, wanted: str | None) -> str:
    """The split that is wanted; None means one that is held out.

    Raises:
        UsageError: there is none; those there are are named.
    """
    builder = _builder(place)
    splits = [str(split) for split in builder.config.data_files or builder.info.splits or ()]
    if wanted is None:
        found = [*(split for split in HELD_OUT if split in splits), *(splits if len(splits) == 1 else ())][:1]
        what = "no held-out split to measure perplexity on"
    else:
        found, what = [wanted] if wanted in splits else [], f"no split {wanted}"
    if not found:
        hint = f"Write split: {splits[0]}." if wanted is not None and splits else "Name a local file with the text."
        raise UsageError(f"{place.repo} has {what}, only {', '.join(splits) or 'none'}.", hint)
    return found[0]


@cache
def _builder(place: Place) -> Any:
    """The builder of `datasets` for exactly the commit; one that it finds for another is refused."""
    from datasets import load_dataset_builder

    commit = place.commit
    builder = _explained(place, lambda: load_dataset_builder(place.repo, place.config, revision=commit))
    if builder.hash != commit:  # `datasets` takes the newest copy here for whatever it cannot have from the hub
        raise MissingError(
            f"The dataset {place.repo} cannot be had at {commit[:8]}; the copy here is of {builder.hash[:8]}.",
            f"{offline_hint()} Or write {place.repo}@{builder.hash} for that copy.",
        )
    return builder


def reads_lines(place: Place) -> bool:
    """Whether its files are plain text, of which `datasets` makes each line a row."""
    return getattr(_builder(place).config, "sample_by", None) == "line"


def _is_copy(builder: Any) -> bool:
    """Whether it reads what `datasets` has kept here, because the hub cannot be reached."""
    return type(builder).__name__ == "Cache"


def _streaming(place: Place, split: str) -> Any:
    return _builder(place).as_streaming_dataset(split=find_split(place, split))


def _downloaded(place: Place, split: str) -> Any:
    import datasets

    builder = _builder(place)
    find_split(place, split)
    if not Path(builder.cache_dir).exists():
        console.info(f"  downloading {place.repo} at {place.commit[:8]}")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    finally:
        if bars:
            datasets.enable_progress_bars()


def told(place: Place, open_rows: Callable[[], Any]) -> Iterator[Row]:
    """Rows, whatever ends their reading told as a user's error where it is one."""
    rows = iter(_explained(place, open_rows))
    while (row := _explained(place, lambda: next(rows, None))) is not None:
        yield row


def _explained(place: Place, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except LorsError:
        raise
    except Exception as error:
        raise _reason(error, place) from error


def _reason(error: Exception, place: Place) -> Exception:
    """What to raise where a dataset cannot be had or read; a bug stays itself."""
    known = translate(error)
    if isinstance(known, MissingError):
        hint = known.hint
        if "loading script" in known.message:
            hint = f"Try {place.repo}@refs/convert/parquet, the hub's own copy as Parquet, where it has made one."
        return MissingError(f"The dataset {place.repo} cannot be had: {known.message}", f"{hint} {place.instead}")
    if known is not None:
        return known
    configs = _AVAILABLE.search(str(error))
    if configs is not None:
        names = [name.strip(" '\"\n") for name in configs[1].split(",")]
        what = f"no configuration {place.config!r}, only" if place.config else "several configurations:"
        return UsageError(f"{place.repo} has {what} {', '.join(names)}.", f"Write {place.repo}:{names[0]} or another.")
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    if isinstance(error, (DatasetsError, ArrowException, ValueError)):
        return UsageError(
            f"The dataset {place.repo} cannot be read: {innermost(error)}",
            f"Look at its page on the hub; another revision is written {place.repo}@REVISION.",
        )
    return error


# ---- what is remembered of a dataset, so that a finished run is known again without the hub


def remembered(fingerprint: str) -> dict[str, str] | None:
    """What `remember` has kept, None where it has not; a fingerprint holds the commit, so it stays true."""
    found = _datasets.get(fingerprint)
    return found if isinstance(found, dict) else None


def remember(fingerprint: str, seen: dict[str, str]) -> None:
    """Keep what a look at a dataset has shown, among the last hundred."""
    _datasets.keep(fingerprint, seen)
