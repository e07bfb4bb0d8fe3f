"""The C kernels as a library: compiled by the system's compiler at first use, kept per user, source and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from lors_cli.files.atomic import sync_file, sync_folder
from lors_cli.files.remembered import user_cache
from lors_cli.machine.devices import processor, processor_features

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 300
DIGEST_BYTES = 32
NATIVE = "native"


class NoKernels(Exception):
    """Why there are none on this machine, in words."""


@cache
def library(target: str = NATIVE, *defines: str) -> ctypes.CDLL:
    """The kernels, built if this user has not built them yet; torch's own threads do the work.

    Args:
        target: what the compiler may assume of the processor: this one, or a level of its family such as x86-64-v3.
        defines: of the preprocessor, as NAME=VALUE.

    Raises:
        NoKernels: there is no compiler, it failed, or what it made cannot be kept or loaded.
    """
    try:
        path = _built(target, defines)
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(f"the kernels cannot be kept or loaded: {error}") from error
    found.use_threads_of.argtypes, found.use_threads_of.restype = [ctypes.c_void_p], None
    found.use_threads_of(_torch_threads())
    found.instructions.restype = ctypes.c_char_p
    for prefix in ("f32", "bf16"):
        linear, unpack = getattr(found, f"{prefix}_linear"), getattr(found, f"{prefix}_unpack")
        codes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
        linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [*codes, ctypes.c_int64]
        merge = getattr(found, f"{prefix}_merge")
        merge.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5 + [*codes, *[ctypes.c_int64] * 2]
        unpack.argtypes, unpack.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + codes, None
    return found


def _torch_threads() -> int:
    """The address of torch's parallel loop for C."""
    import torch

    name = "libtorch_cpu.dylib" if platform.system() == "Darwin" else "libtorch_cpu.so"
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        found = ctypes.cast(torch_library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        found = None
    if found is None:
        raise NoKernels(f"torch {torch.__version__} does not lend its threads; 2.10 and later do")
    return found


def _built(target: str, defines: tuple[str, ...]) -> Path:
    """The library's file, which is ours and whole."""
    folder = _own_folder()
    is_arm = platform.machine() in ("aarch64", "arm64")
    flags = (*FLAGS, f"-mcpu={target}" if is_arm else f"-march={target}", *(f"-D{define}" for define in defines))
    path = folder / f"packed-{_key(flags)}.so"
    if not _is_whole(path):
        _compile(path, flags)
    return path


def _own_folder() -> Path:
    """Where libraries are kept: nobody else may put one there."""
    folder = user_cache() / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_ours(folder)
    return folder


def _check_ours(path: Path) -> None:
    stat = path.stat()
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise NoKernels(f"others may write {path}; remove it, or set XDG_CACHE_HOME to a folder of yours")


def _key(flags: tuple[str, ...]) -> str:
    """What the library was built from and for."""
    digest = hashlib.sha256()
    for part in (processor(), processor_features(), platform.machine(), *flags):
        digest.update(part.encode() + b"\0")
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _is_whole(path: Path) -> bool:
    """Whether a library is there and as it was written: its last bytes are the hash of all others."""
    if not path.exists():
        return False
    _check_ours(path)
    content = path.read_bytes()
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(path: Path, flags: tuple[str, ...]) -> None:
    """Build the library under another name and put it in place whole: several processes may do so at once."""
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as building:
        made = Path(building) / path.name
        command = [*compiler, *flags, str(SOURCES[0].with_name("packed.c")), "-o", str(made)]
        try:
            subprocess.run(
                [*command], check=True, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            raise NoKernels(f"{shlex.join(command[:-2])} failed: {_first_error(error)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoKernels(f"{compiler[0]} failed: {error}") from error
        with open(made, "ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.chmod(0o700)  # whatever the umask is
        sync_file(made)
        os.replace(made, path)
        sync_folder(path.parent)


def _compiler() -> list[str]:
    """The command of $CC, or the first of the usual ones."""
    if chosen := os.environ.get("CC", "").strip():
        return shlex.split(chosen)
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise NoKernels(f"there is no C compiler ({', '.join(COMPILERS)}) on the PATH")
    return [found]


def _first_error(error: subprocess.CalledProcessError) -> str:
    lines = [line for line in error.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {error.returncode}")
