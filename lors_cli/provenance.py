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

if TYPE_CHECKING:
    from lors_cli.recipe import Recipe

GIT_TIMEOUT_S = 20


def hardware() -> dict[str, Any]:
    """Processor, cores and threads; GPUs and their libraries where torch is loaded already."""
    found: dict[str, Any] = {"processor": processor(), "processors": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        found["usable_processors"] = len(os.sched_getaffinity(0))
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
def processor() -> str:
    """The processor's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@cache
def code_version(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the checkout that the code runs from, None where it is installed without one.

    Args:
        folder: the package's; default: this one's.

    Returns:
        {"commit", "dirty"}: the commit's hash, None before the first one; whether the package's files differ from
        it, None where git cannot tell.
    """
    folder = folder or Path(__file__).parent
    git_dir = _git_dir(folder.parent / ".git")
    if git_dir is None:
        return None
    return {"commit": _commit(git_dir), "dirty": _is_dirty(folder)}


def _git_dir(path: Path) -> Path | None:
    """The repository's own folder; a worktree has a file that names it."""
    if path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    return path if (path / "HEAD").is_file() else None


def _commit(git_dir: Path) -> str | None:
    head = (git_dir / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    name = head.removeprefix("ref:").strip()
    shared = git_dir / "commondir"
    common = git_dir / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git_dir
    for place in (git_dir, common):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8").strip()
    packed = common / "packed-refs"
    for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else ():
        commit, _, ref = line.partition(" ")
        if ref == name:
            return commit
    return None


def _is_dirty(folder: Path) -> bool | None:
    settings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--", "."],
            capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False, env=settings,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return bool(found.stdout.strip()) if found.returncode == 0 else None


def inputs(recipe: Recipe, data_dir: Path | None) -> list[dict[str, Any]]:
    """Every model and text that a recipe reads, in a fixed order.

    Args:
        recipe: with defaults filled in.
        data_dir: local datasets.

    Returns:
        {"used_by", "name", "fingerprint", "revision"}: local files by the SHA-256 of their content, what is on the
        hub by name and, once it is in this machine's cache, by commit.
    """
    from lors_cli.evaluation.tasks import task_fingerprint
    from lors_cli.pruning import statistics_kind
    from lors_cli.sources import model_fingerprint
    from lors_cli.text import Split, fingerprint_source
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
    from lors_cli.revisions import cache_folder, cached_reference

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
