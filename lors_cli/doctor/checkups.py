"""What `lors doctor` looks at apart from the processors: packages, memory, disk, the hub, local data."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from lors_cli import __version__
from lors_cli.errors import LorsError, first_line
from lors_cli.machine.memory import container_memory
from lors_cli.output.console import gib

GIB = 1 << 30
Status = Literal["ok", "warn", "fail"]

NEEDED = {
    "torch": ("torch", "2.8"),
    "transformers": ("transformers", "5.17"),
    "datasets": ("datasets", "4.0"),
    "lm-eval": ("lm_eval", "0.4.13"),
    "peft": ("peft", "0.17"),
    "accelerate": ("accelerate", "1.10"),
    "safetensors": ("safetensors", "0.5"),
    "gguf": ("gguf", "0.17"),
    "greenlet": ("greenlet", "3.0"),
    "numpy": ("numpy", "1.26"),
    "scipy": ("scipy", "1.11"),
    "matplotlib": ("matplotlib", "3.8"),
    "psutil": ("psutil", "5.9"),
    "pydantic": ("pydantic", "2.7"),
    "pyyaml": ("yaml", "6.0"),
    "rich": ("rich", "13.8"),
    "typer": ("typer", "0.16"),
    "zstandard": ("zstandard", "0.22"),
}
"""Distribution to the name it is imported by and the oldest version that will do."""
BELOW = {"transformers": "6", "lm-eval": "0.4.14"}
"""Distribution to the first version that is not known to work."""
OPTIONAL = {
    "triton": "the fused merge on NVIDIA GPUs (it comes with torch's CUDA builds on Linux)",
    **{name: f"tune.report_to=[{name}]" for name in ("wandb", "tensorboard", "mlflow", "trackio")},
}
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
HUB_TIMEOUT_S = 4.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what to do about it unless it is ok.

    warn: it works, but something could be better; fail: lors cannot work so.
    """

    name: str
    status: Status
    text: str
    advice: str | None = None


def packages() -> Iterator[Finding]:
    """Python and every package: there, importable, of a version that is known to work."""
    yield Finding("lors", "ok", f"{__version__}, from {Path(__file__).parents[1]}")
    numbers = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{numbers}, {sys.executable}")
    for name in NEEDED:
        yield _needed(name)
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "ok", f"not installed; only for {purpose}")


def _needed(name: str) -> Finding:
    module, oldest = NEEDED[name]
    limit = BELOW.get(name)
    requirement = f"'{name}>={oldest}{f',<{limit}' if limit else ''}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "fail", "not installed", f"pip install {requirement}")
    if _numbers(found) < _numbers(oldest):
        return Finding(name, "fail", f"{found} is too old", f"pip install {requirement}")
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises
        text = f"{found} is broken: {type(error).__name__}: {first_line(error)}"
        return Finding(name, "fail", text, f"pip install --force-reinstall {requirement}")
    if limit and _numbers(found) >= _numbers(limit):
        text = f"{found} is newer than what lors was tested with"
        return Finding(name, "warn", text, f"If something fails: pip install {requirement}")
    return Finding(name, "ok", found)


def _numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def memory() -> Iterator[Finding]:
    """Memory of the machine, and what a container may take of it."""
    import psutil

    found = psutil.virtual_memory()
    free, total = found.available, found.total
    text = f"{gib(free)} free of {gib(total)}"
    for limit, used in container_memory():
        if limit - used < free:
            free = limit - used
            text += f"; this container may take {gib(limit)} and has taken {gib(used)}"
    if free < 2 * GIB:
        yield Finding("memory", "warn", text, "End other programs: the libraries alone take half a GiB.")
    else:
        yield Finding("memory", "ok", text)


def disk() -> Iterator[Finding]:
    """Free space, and whether it may be used, where results, downloads and temporary files go."""
    places = {
        "run folders": Path("runs").absolute(),
        "hub cache": hub_cache(),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        text = f"{gib(free)} free at {place}"
        if not os.access(there, os.W_OK):
            yield Finding(name, "warn", f"{place} cannot be written", _OTHER_PLACE[name])
        elif free < 5 * GIB:
            yield Finding(name, "warn", text, f"Free some space. {_OTHER_PLACE[name]}")
        else:
            yield Finding(name, "ok", text)


_OTHER_PLACE = {
    "run folders": "Start lors in another folder, or give --out.",
    "hub cache": "Set HF_HOME to a folder on another disk.",
    "temporary": "Set TMPDIR to a folder on another disk.",
}


def hub_cache() -> Path:
    """Where models from the hub are kept."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")).absolute()


def hub() -> Iterator[Finding]:
    """Whether models and datasets can come from the hub."""
    set_here = [f"{name}={os.environ[name]}" for name in OFFLINE_VARIABLES
                if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]  # fmt: skip
    if set_here:
        yield Finding("access", "warn", f"off by {', '.join(set_here)}: only what is local or cached is used",
                      f"To download: unset {' '.join(part.partition('=')[0] for part in set_here)}")  # fmt: skip
    else:
        yield _reach(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    yield _token()


def _reach(endpoint: str) -> Finding:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    endpoint = re.sub(r"^(\w+://)?[^/@]*@", r"\1", endpoint)  # a name and password are neither shown nor sent
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except HTTPError as error:
        if error.code >= 500:
            return Finding("access", "warn", f"{endpoint} answers with {error.code}", "Try again later.")
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return Finding("access", "warn", f"{endpoint} cannot be reached: {reason}",
                       "Check network and proxy (HTTPS_PROXY), or work offline (docs/how-to.md).")  # fmt: skip
    return Finding("access", "ok", f"{endpoint} can be reached")


def _token() -> Finding:
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Finding("token", "warn", "not known: huggingface_hub is missing", "pip install huggingface_hub")
    if get_token():
        return Finding("token", "ok", "there is one (it is not shown, and not checked)")
    return Finding("token", "ok", "none; gated models such as Llama need one: hf auth login")


def data() -> Iterator[Finding]:
    """Which of the named texts and tasks $LORS_DATA_DIR holds."""
    from lors_cli.data.known import DATA_DIR_VARIABLE, SOURCES, resolve_data_dir
    from lors_cli.recipe.schema import SEVEN_TASKS

    try:
        folder = resolve_data_dir(None)
    except LorsError as error:
        yield Finding("folder", "warn", error.message, f"Correct ${DATA_DIR_VARIABLE} or unset it.")
        return
    if folder is None:
        yield Finding("folder", "ok", f"${DATA_DIR_VARIABLE} is not set: datasets come from the hub")
        return
    yield Finding("folder", "ok", f"{folder} (${DATA_DIR_VARIABLE}); what is missing there is not downloaded")
    from lors_cli.evaluation.tasks import check_tasks
    from lors_cli.recipe.schema import EvalConfig

    texts = [name for name in SOURCES if name not in ("pydoc", "wikitext2-lines")]  # which are no files of their own
    yield from _there("texts", texts, lambda name: _open_text(name, folder), "(pydoc needs no file)")
    yield from _there(
        "tasks", SEVEN_TASKS, lambda task: check_tasks(EvalConfig(tasks=(task,)), folder), f"of {len(SEVEN_TASKS)}"
    )


def _there(what: str, names: Iterable[str], look: Callable[[str], object], more: str) -> Iterator[Finding]:
    """Which of these names `look` finds, and why the others are missing."""
    there, missing = [], []
    for name in names:
        try:
            look(name)
            there.append(name)
        except LorsError as error:
            missing.append(Finding(name, "warn", error.message, error.hint))
    yield Finding(what, "ok", f"{', '.join(there) or 'none'} {more}")
    yield from missing


def _open_text(name: str, folder: Path) -> None:
    from lors_cli.data.sources import open_source

    open_source(name, split="validation" if name == "wikitext2" else "train", data_dir=folder)
