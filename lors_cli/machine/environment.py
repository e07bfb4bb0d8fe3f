"""Where a result comes from: the machine, the code's commit, the models and the texts that went in."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.machine.devices import processor, usable_processors

if TYPE_CHECKING:
    from lors_cli.recipe.schema import Recipe

GIT_TIMEOUT_S = 20


def hardware() -> dict[str, Any]:
    """Processor, cores and threads; GPUs and their libraries where torch is loaded already."""
    found: dict[str, Any] = {"processor": processor(), "processors": os.cpu_count()}
    found["usable_processors"] = usable_processors()
    torch = sys.modules.get("torch")  # a look at the GPU is not worth importing it
    if torch is None:
        return found
    found["threads"] = torch.get_num_threads()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


@cache
def code_version(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the checkout that the code runs from, None where it is installed without one or git is absent.

    Args:
        folder: the package's; default: this one's.

    Returns:
        {"commit", "dirty"}: the commit's hash, None before the first one; whether the package's files differ from it.
    """
    folder = folder or Path(__file__).parents[1]
    if not (folder.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--", "."],
            capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.splitlines()
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid"))
    changed = any(not line.startswith("#") for line in lines)
    return {"commit": None if commit == "(initial)" else commit, "dirty": changed}


def inputs(recipe: Recipe, data_dir: Path | None) -> list[dict[str, Any]]:
    """Every model and text that a recipe reads, in a fixed order.

    Args:
        recipe: with defaults filled in.
        data_dir: local datasets.

    Returns:
        {"used_by", "name", "fingerprint", "revision"}: local files by the SHA-256 of their content, what is on the
        hub by name and, once it is in this machine's cache, by commit.
    """
    from lors_cli.data.sources import Split, fingerprint_source
    from lors_cli.evaluation.tasks import task_fingerprint
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.pruning.methods import statistics_kind
    from lors_cli.tuning.teacher import teacher_model

    found: list[dict[str, Any]] = []

    def add(used_by: str, name: str, fingerprint: str) -> None:
        found.append(
            {"used_by": used_by, "name": name, "fingerprint": fingerprint, "revision": hub_commit(fingerprint)}
        )

    def text(used_by: str, name: str, split: Split) -> None:
        add(used_by, name, fingerprint_source(name, split=split, data_dir=data_dir))

    add("model", recipe.model.path, model_fingerprint(recipe.model))
    if recipe.prune and statistics_kind(recipe.prune) != "none":
        text("prune", recipe.prune.calibration.dataset, "train")
    if recipe.tune:
        text("tune", recipe.tune.data.dataset, "train")
        if recipe.tune.distill and recipe.tune.distill.teacher:
            add("tune.distill", recipe.tune.distill.teacher, model_fingerprint(teacher_model(recipe.tune.distill)))
    if recipe.eval:
        for name in recipe.eval.tasks:
            add("eval", name, task_fingerprint(name, data_dir))
        for name in recipe.eval.perplexity:
            text("eval", name, "validation")
    return found


def hub_commit(fingerprint: str) -> str | None:
    """The commit that this machine's hub cache has of a model or dataset, None for what is no hub's or not cached.

    Args:
        fingerprint: `hub:<repo>@<revision>:<dtype>` of a model, `hub:<owner>/<name>/<config>/<split>` of a dataset.
    """
    kind, _, place = fingerprint.partition(":")
    if kind != "hub":
        return None
    from lors_cli.models.revisions import cache_folder, cached_reference

    repo, at, rest = place.partition("@")
    revision = rest.rpartition(":")[0] if at else "main"
    repo = repo if at else "/".join(repo.split("/")[:2])
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = cache_folder("model" if at else "dataset", repo)
    found = cached_reference(folder, revision)
    if found is not None:
        return found
    if (folder / "snapshots" / revision).is_dir():
        return revision
    snapshots = list((folder / "snapshots").glob("*"))
    return snapshots[0].name if len(snapshots) == 1 else None


def environment() -> dict[str, Any]:
    """Versions and hardware that a result was made with."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    versions = {}
    for name in ("lors-cli", "torch", "transformers", "accelerate", "datasets", "lm-eval", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **hardware(),
        "packages": versions,
        "code": code_version(),
    }
