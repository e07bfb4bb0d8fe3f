"""`lors run --from-manifest`: a run again from its manifest.json alone, and whether the same came out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.data.known import DATA_DIR_VARIABLE, resolve_data_dir
from lors_cli.errors import MissingError, UsageError
from lors_cli.files import atomic, records
from lors_cli.machine import environment
from lors_cli.output import console, progress
from lors_cli.pipeline.manifest import MANIFEST_NAME, is_whole, results

if TYPE_CHECKING:
    from lors_cli.recipe.schema import Recipe

MAY_DIFFER = (
    "name", "data_dir", "model.path", "model.device", "prune.calibration.dataset", "tune.data.dataset",
    "tune.distill.teacher",
)  # fmt: skip
"""Settings that say where things are. What they name is compared by content, so they may be given anew."""


@dataclass(frozen=True)
class Repeat:
    """A manifest and the recipe that comes out of it.

    Args:
        path: of the manifest.
        content: what it holds.
        recipe: its own, with what was given anew.
    """

    path: Path
    content: dict[str, Any]
    recipe: Recipe

    @property
    def last(self) -> str:
        """The last stage that the run had finished."""
        return self.content["stages"][-1]["stage"]

    def check(self, out: Path, *, allow_changed_inputs: bool) -> list[str]:
        """Say what differs here from the run that is repeated.

        Args:
            out: where the repeat goes.
            allow_changed_inputs: other models or texts are a warning, not an error.

        Returns:
            The differences, a line each.

        Raises:
            UsageError: a model or text is another one, or `out` is the run's own folder.
            MissingError: it is not there.
        """
        if out.resolve() == self.path.parent.resolve():
            raise UsageError(f"{out} is the run that is to be repeated.", "Choose another --out.")
        here, there = Path.cwd(), self.content.get("working_directory")
        try:
            changed = list(self._changed_inputs(resolve_data_dir(self.recipe.data_dir)))
        except MissingError as error:
            hint = f"The run was started in {there}, and paths are relative to that." if there != str(here) else ""
            give = f"What lies elsewhere now is given as KEY=VALUE: {', '.join(MAY_DIFFER)}."
            raise MissingError(error.message, f"{hint} {give}".strip()) from error
        if changed and not allow_changed_inputs:
            raise UsageError(
                "\n".join(["what the run reads has changed:", *(f"  {line}" for line in changed)]),
                "Give the original files, or --allow-changed-inputs to run on what is there now.",
            )
        found = [*changed, *self._changed_environment()]
        for line in found:
            console.warn(line)
        return found

    def _changed_inputs(self, data_dir: Path | None) -> Iterator[str]:
        from lors_cli.pipeline.manifest import inputs

        before, now = self.content["inputs"], inputs(self.recipe, data_dir)
        if len(before) != len(now):
            yield f"the run read {len(before)} models and texts, and this version would read {len(now)}"
        for old, new in zip(before, now, strict=False):
            if old["fingerprint"] != new["fingerprint"]:
                yield f"{old['used_by']}: {new['name']} was {old['fingerprint']}, is {new['fingerprint']}"
            elif None not in (old["revision"], new["revision"]) and old["revision"] != new["revision"]:
                yield f"{old['used_by']}: {new['name']} was at {old['revision']} on the hub, is at {new['revision']}"

    def _changed_environment(self) -> list[str]:
        with progress.busy("looking at this machine"):
            import torch  # noqa: F401 - what it says of threads and GPUs is part of the environment
        here = {**environment.environment(), "deterministic": self.recipe.deterministic}
        lines: dict[str, list[str]] = {}
        for stage in self.content["stages"]:
            for line in differences(stage["environment"], here):
                lines.setdefault(line, []).append(stage["stage"])
        return [f"{', '.join(stages)}: {line}" for line, stages in lines.items()]

    def compare(self, out: Path, stages: Collection[str]) -> dict[str, list[str]]:
        """By stage, the files of results in `out` that are not those of the run that is repeated.

        Args:
            out: the repeat's folder.
            stages: that were asked for.
        """
        different: dict[str, list[str]] = {}
        for entry in self.content["stages"]:
            stage, wanted = entry["stage"], entry["results"]
            if stage not in stages:
                continue
            found = results(out, stage) if records.read_record(out / stage) else {}
            different[stage] = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        return different


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What of an environment is not as it was; what only one of them tells is passed over.

    Args:
        then: of a stage's record.
        now: of this process.
        prefix: of the names.
    """
    lines = []
    for key in then.keys() & now.keys() - {"memory_gib", "dirty"}:
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            lines += differences(then[key], now[key], f"{key} ")
        elif then[key] != now[key]:
            lines.append(f"{prefix}{key} was {then[key]}, is {now[key]}")
    for name, value in (("then", then.get("dirty")), ("now", now.get("dirty"))):
        if value:
            lines.append(f"the code's files differed from its commit {name}")
    return sorted(lines)


def open_repeat(path: Path, overrides: Sequence[str]) -> Repeat:
    """The repeat of a run.

    Args:
        path: its folder or its manifest.
        overrides: `data_dir=…` and the others of `MAY_DIFFER`.

    Raises:
        MissingError: there is no manifest.
        UsageError: it is not whole, from a version that noted too little, or an override is of another key.
    """
    from lors_cli.recipe.loading import resolve_recipe
    from lors_cli.recipe.settings import Place, Settings

    file = path / MANIFEST_NAME if path.is_dir() else path
    if not file.is_file():
        raise MissingError(f"No manifest at {file}.", "Give a finished run's folder, or its manifest.json.")
    content: Any = atomic.read_json(file)
    if not is_whole(content):
        raise UsageError(
            f"{file} does not say enough to repeat the run.",
            "Run its recipe.yaml once more: that notes what is missing.",
        )
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in MAY_DIFFER:
            raise UsageError(
                f"{key}: a repeat keeps its manifest's settings.",
                f"It takes only {', '.join(MAY_DIFFER)}. For other settings run the recipe itself.",
            )
    settings = Settings(content["recipe"], {(): Place(str(file), (0, 0))})
    if content.get("data_dir") and not os.environ.get(DATA_DIR_VARIABLE):
        settings.data.setdefault("data_dir", content["data_dir"])
    return Repeat(file, content, resolve_recipe(settings, list(overrides)))
