"""What `eval.tasks` names: tasks, groups with their subtasks, and tags and wildcards, which stand for several tasks."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from lors_cli.errors import UsageError, did_you_mean, require_file
from lors_cli.evaluation.definitions import TaskNames, names_in, read_definition, tasks_folder
from lors_cli.recipe.schema import SEVEN_TASKS, EvalConfig

PYDOC_TASK = "pydoc_choice"
OWN_TASKS = (*SEVEN_TASKS, PYDOC_TASK)
"""Tasks that work without lm-eval's index of names."""
BUILT_IN = {
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "rte": ("glue/rte/default.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}  # lm-eval's definition, below its tasks folder, and the split that it scores
assert tuple(BUILT_IN) == SEVEN_TASKS

_PYDOC_YAML = Path(__file__).with_name("pydoc_choice.yaml")
_STRUCTURE = ("group", "group_alias", "task", "task_alias", "aggregate_metric_list", "metadata")
"""Keys of a group that say nothing of its tasks."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval as it is to be scored."""

    name: str
    definition: Path | None
    """Its YAML file; None where a group has all of it."""
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What a group says in place of the definition."""
    num_fewshot: int = 0
    is_own: bool = False
    """One of `OWN_TASKS`, and not one of the user's by such a name."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its definition, with what it includes and what a group says merged in."""
        return {**(read_definition(self.definition) if self.definition else {}), **self.overrides}


@dataclass(frozen=True)
class Aggregate:
    """A metric of a group, from its tasks'."""

    metric: str
    filters: tuple[str, ...] | None
    """None: all that the tasks have."""
    weight_by_size: bool


@dataclass(frozen=True)
class Group:
    """Tasks, and groups of them, that have a score together."""

    name: str
    members: tuple[Entry, ...]
    metrics: tuple[Aggregate, ...]


Entry: TypeAlias = "Task | Group"


def tasks_of(entries: Iterable[Entry]) -> list[Task]:
    """The tasks themselves, in order."""
    return [task for entry in entries for task in (tasks_of(entry.members) if isinstance(entry, Group) else [entry])]


def groups_of(entries: Iterable[Entry]) -> Iterator[Group]:
    """Every group, those within it after it."""
    for entry in entries:
        if isinstance(entry, Group):
            yield entry
            yield from groups_of(entry.members)


def _parts_of(entries: Sequence[Entry]) -> list[Entry]:
    return [*groups_of(entries), *tasks_of(entries)]


def resolve(config: EvalConfig) -> tuple[Entry, ...]:
    """What the tasks of an evaluation are, each with its number of examples.

    Raises:
        UsageError: names that nothing has, all of them in one message; a task that is named twice; a number of examples
            for what is not scored.
    """
    finder = _Finder(config.include_path)
    found = {name: finder.named(name) for name in config.tasks}
    if unknown := [name for name, entries in found.items() if not entries]:
        raise _unknown_tasks(unknown, finder)
    _refuse_twice(found)
    by_name = config.num_fewshot if isinstance(config.num_fewshot, dict) else {}
    known = {*found, *(part.name for entries in found.values() for part in _parts_of(entries))}
    if odd := [name for name in by_name if name not in known]:
        raise UsageError(f"eval.num_fewshot: {', '.join(odd)} is not among the tasks.", did_you_mean(odd[0], known))
    return tuple(
        entry
        for name, entries in found.items()
        for each in entries
        for entry in _opened(_with_shots(each, config.num_fewshot, [name]))
    )


def _opened(entry: Entry) -> Iterator[Entry]:
    """The entry itself, or the members of a group that lm-eval does not aggregate, and of those among them."""
    if isinstance(entry, Group) and not entry.metrics:
        for member in entry.members:
            yield from _opened(member)
    else:
        yield entry


def _refuse_twice(found: Mapping[str, Sequence[Entry]]) -> None:
    sources: dict[str, str] = {}
    for name, entries in found.items():
        for part in _parts_of(entries):
            if part.name in sources:
                both = f"by {sources[part.name]} and by {name}" if sources[part.name] != name else f"in {name}"
                raise UsageError(f"eval.tasks: {part.name} is named twice, {both}.")
            sources[part.name] = name


def _with_shots(entry: Entry, wanted: int | dict[str, int] | None, names: list[str]) -> Entry:
    """The entry with each task's number of examples; the innermost of the `names` above a task counts."""
    names = [*names, entry.name]
    if isinstance(entry, Group):
        return replace(entry, members=tuple(_with_shots(member, wanted, names) for member in entry.members))
    if isinstance(wanted, dict) and (by_name := [wanted[name] for name in names if name in wanted]):
        return replace(entry, num_fewshot=by_name[-1])
    own = entry.settings.get("num_fewshot")
    if isinstance(wanted, int) and own != 0:
        return replace(entry, num_fewshot=wanted)
    return replace(entry, num_fewshot=own or 0)


def shots_text(entries: Sequence[Entry]) -> str:
    """`gsm8k 5-shot, mmlu 0 to 5-shot`: of what is named, where it is not 0 throughout."""
    parts = []
    for entry in entries:
        numbers = sorted({task.num_fewshot for task in tasks_of([entry])})
        if numbers[-1]:
            parts.append(f"{entry.name} {' to '.join(dict.fromkeys(map(str, (numbers[0], numbers[-1]))))}-shot")
    return ", ".join(parts)


class _Finder:
    """Looks names up, in a folder of the user's first.

    Raises:
        MissingError: there is no such folder.
    """

    def __init__(self, include_path: str | None) -> None:
        self.own = TaskNames()
        if include_path is not None:
            if not Path(include_path).is_dir():
                require_file(Path(include_path), "folder of task definitions")
                raise UsageError(f"eval.include_path: {include_path} is a file, and must be a folder.")
            self.own = names_in(Path(include_path).resolve())

    def places(self) -> Iterator[TaskNames]:
        """Where names are looked up, the first place first."""
        yield self.own
        yield names_in(tasks_folder())

    def named(self, name: str) -> tuple[Entry, ...]:
        """What a name or a pattern stands for."""
        if any(character in name for character in "*?["):
            known = {*OWN_TASKS, *(task for place in self.places() for task in place.tasks)}
            return tuple(entry for task in sorted(fnmatch.filter(known, name)) for entry in self._find(task, {}, ()))
        return self._find(name, {}, ())

    def _find(self, name: str, overrides: Mapping[str, Any], above: tuple[str, ...]) -> tuple[Entry, ...]:
        if name in above:
            raise UsageError(f"The group {name} is a member of itself.")
        if name in OWN_TASKS and not self._is_overridden(name):
            path = _PYDOC_YAML if name == PYDOC_TASK else tasks_folder() / BUILT_IN[name][0]
            return (Task(name, path, overrides, is_own=True),)
        for place in self.places():
            if name in place.tasks:
                return (Task(name, place.tasks[name], overrides),)
            if name in place.groups:
                return (self._group(name, read_definition(place.groups[name]), overrides, above),)
            if name in place.tags:
                members = sorted(set(place.tags[name]))
                return tuple(entry for task in members for entry in self._find(task, overrides, (*above, name)))
        return ()

    def _is_overridden(self, name: str) -> bool:
        return any(name in kind for kind in (self.own.tasks, self.own.groups, self.own.tags))

    def _group(self, name: str, content: dict[str, Any], overrides: Mapping[str, Any], above: tuple[str, ...]) -> Group:
        above = (*above, name)
        overrides = {**_overrides(content), **overrides}
        members = content.get("task") or ()
        found: list[Entry] = []
        for member in [members] if isinstance(members, (str, dict)) else members:
            item: dict[str, Any] = {"task": member} if isinstance(member, str) else member
            inner, own = str(item.get("group") or item.get("task")), {**overrides, **_overrides(item)}
            entries = self._find(inner, own, above)
            if entries:
                found += [entry for entry in entries if entry not in found]  # lm-eval's mela names a task twice
            elif "group" in item:
                found.append(self._group(f"{name}::{inner}", item, overrides, above))
            else:
                found.append(Task(f"{name}::{inner}", None, own))
        if not found:
            raise UsageError(f"The group {name} has no tasks.")
        return Group(name, tuple(found), _metrics(content.get("aggregate_metric_list")))


def _overrides(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _STRUCTURE}


def _metrics(listed: Any) -> tuple[Aggregate, ...]:
    found = []
    for item in [listed] if isinstance(listed, dict) else listed or ():
        filters = item.get("filter_list")
        filters = (filters,) if isinstance(filters, str) else tuple(filters) if filters is not None else None
        found.append(Aggregate(item["metric"], filters, item.get("weight_by_size", True)))
    return tuple(found)


def _unknown_tasks(unknown: Sequence[str], finder: _Finder) -> UsageError:
    """One message for all of them, with the names that were perhaps meant."""
    known = [*OWN_TASKS]
    for place in finder.places():
        known += [*place.tasks, *place.groups, *place.tags]
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, known[: len(OWN_TASKS)], n=2)
        close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.75)
        parts.append(f"there is no task {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    hint = f"Tasks: {', '.join(SEVEN_TASKS)}, {PYDOC_TASK}, or any other that `lm-eval ls tasks` lists."
    return UsageError(f"eval.tasks: {' — '.join(parts)}", hint)
