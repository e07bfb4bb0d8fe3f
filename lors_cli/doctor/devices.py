"""What `lors doctor` says of processors and GPUs, and which fast paths this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lors_cli.doctor.checkups import Finding
from lors_cli.errors import first_line
from lors_cli.machine.devices import cpu_has_bfloat16, free_memory, processor, resolve_device, usable_cores
from lors_cli.output.console import gib

if TYPE_CHECKING:
    import torch

FAST_BFLOAT16 = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16", "arm_bf16": "Arm BF16",
                 "sve_bf16": "SVE BF16"}  # fmt: skip


def devices() -> Iterator[Finding]:
    """The processor with its cores and threads, and each GPU."""
    import torch

    yield Finding("processor", "ok", f"{processor()}, {_cores()}")
    yield _threads()
    yield _bfloat16()
    if torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "Apple GPU (--device mps); pruning and tuning are tested on CPU and CUDA")
    elif not torch.cuda.is_available():
        yield _no_gpu()
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _cores() -> str:
    import psutil

    logical, usable = psutil.cpu_count(), usable_cores()
    physical = psutil.cpu_count(logical=False) or logical  # not known everywhere
    text = f"{physical} cores" + (f" ({logical} threads)" if logical != physical else "")
    return text if usable == physical else f"{text}, {usable} of them for this process"


def _threads() -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    text = f"{threads} in use on {cores} core{'s' if cores > 1 else ''}"
    setting = os.environ.get("OMP_NUM_THREADS")
    if threads < cores:
        reason = f" (OMP_NUM_THREADS={setting})" if setting else ""
        return Finding("threads", "warn", text + reason, f"For all cores: export OMP_NUM_THREADS={cores}")
    if threads > cores:
        return Finding("threads", "warn", f"{text}: they get in each other's way",
                       f"export OMP_NUM_THREADS={cores}")  # fmt: skip
    return Finding("threads", "ok", text)


def _bfloat16() -> Finding:
    import torch

    if cpu_has_bfloat16():
        found = torch.cpu.get_capabilities()
        by = " and ".join(word for name, word in FAST_BFLOAT16.items() if found.get(name))
        return Finding("bfloat16", "ok", f"in this processor ({by})")
    return Finding("bfloat16", "warn", "not in this processor: dtype auto loads float32, twice the memory",
                   "A processor with AVX512-BF16, AMX or Arm BF16, or a GPU, takes half the memory.")  # fmt: skip


def _no_gpu() -> Finding:
    import torch

    if Path("/proc/driver/nvidia/version").is_file() and torch.version.cuda is None:
        text = f"there is an NVIDIA driver, but torch {torch.__version__} is a CPU build"
        return Finding("gpu", "warn", text, "Install a CUDA build: https://pytorch.org/get-started/locally/")
    return Finding("gpu", "ok", "none that torch can use; everything runs on the CPU")


def _gpu(index: int) -> Finding:
    import torch

    name = f"cuda:{index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
    except RuntimeError as error:
        return Finding(name, "warn", f"{torch.cuda.get_device_name(index)}: {first_line(error)}",
                       "Another process may hold it; choose another with --device.")  # fmt: skip
    text = f"{torch.cuda.get_device_name(index)}, {gib(free)} free of {gib(total)}, compute capability {major}.{minor}"
    if free < total / 2:
        return Finding(name, "warn", text, "Another process holds its memory (nvidia-smi).")
    return Finding(name, "ok", text)


def fast_paths() -> Iterator[Finding]:
    """What makes lors fast here, and why something does not."""
    import torch

    device = resolve_device("auto")
    fast = device.type != "cpu" or cpu_has_bfloat16()
    dtype = torch.bfloat16 if fast else torch.float32
    yield _merge(device, dtype)
    yield _packed(device, dtype)
    yield _packed_weights()
    yield _cache(device)
    yield _attention(device)
    yield _tokenizers()


def _merge(device: torch.device, dtype: torch.dtype) -> Finding:
    from lors_cli.models.packed.kernels.cuda import why_no_cuda_kernel
    from lors_cli.tuning.kernels.c_merge import why_not_in_c
    from lors_cli.tuning.kernels.masked_merge import how_merged

    text = f"{str(dtype).removeprefix('torch.')} on {device.type}: {how_merged(device, dtype, 'stochastic')}"
    if device.type == "cuda" and why_no_cuda_kernel(device, dtype):
        return Finding("LoRS merge", "warn", text, "pip install triton; it needs compute capability 8.0.")
    if device.type == "cpu" and why_not_in_c(device, dtype, "stochastic"):
        return Finding("LoRS merge", "warn", text, "A C compiler builds the kernel: install gcc or clang.")
    return Finding("LoRS merge", "ok", text)


def _packed(device: torch.device, dtype: torch.dtype) -> Finding:
    from lors_cli.models.packed.kernels.cuda import why_no_cuda_kernel
    from lors_cli.tuning.kernels.c_merge import why_not_in_c

    if not why_no_cuda_kernel(device, dtype):
        text = "tune.base=packed (2:4) saves memory at no cost: the CUDA kernel reads it as it is"
    elif not why_not_in_c(device, dtype, "stochastic"):
        text = "tune.base=packed saves memory at little cost: the C kernel reads it as it is"
    else:
        text = "tune.base=packed saves memory and costs time: each weight is unpacked for its merge"
    return Finding("packed base", "ok", text)


def _packed_weights() -> Finding:
    """What computes with the weights of `lors pack`, built now where it was not yet; or why they are unpacked."""
    import torch

    from lors_cli.models.packed.kernels import ops

    reason = ops.available(torch.bfloat16)
    if reason is None:
        return Finding("packed weights", "ok", f"computed with as they are on the CPU: C kernels, {ops.instructions()}")
    advice = "Nothing to do here: packed models are small on disk and as fast as dense ones."
    if "compiler" in reason or " failed: " in reason:
        advice = "Install a C compiler (apt install gcc, xcode-select --install), or name one that works with $CC."
    elif "threads" in reason:
        advice = "pip install 'torch>=2.10'"
    elif "XDG_CACHE_HOME" in reason or "cannot be kept" in reason:
        advice = "Set XDG_CACHE_HOME to a folder that you alone can write."
    return Finding("packed weights", "warn", f"unpacked when they are loaded, dense speed: {reason}", advice)


def _cache(device: torch.device) -> Finding:
    from lors_cli.tuning.kernels.cache import SHARE_OF_FREE

    most, share = gib(SHARE_OF_FREE * free_memory(str(device))), f"{SHARE_OF_FREE:.0%} of what is free"
    text = f"all merged weights are kept where they take at most {most}, {share}"
    return Finding("merged cache", "ok", text)


def _attention(device: torch.device) -> Finding:
    import torch

    if device.type != "cuda":
        return Finding("attention", "ok", "torch's scaled_dot_product_attention")
    on = [name for name, enabled in (("flash", torch.backends.cuda.flash_sdp_enabled()),
                                     ("memory-efficient", torch.backends.cuda.mem_efficient_sdp_enabled()),
                                     ("cuDNN", torch.backends.cuda.cudnn_sdp_enabled())) if enabled]  # fmt: skip
    return Finding("attention", "ok", f"torch's scaled_dot_product_attention ({', '.join(on)})")


def _tokenizers() -> Finding:
    from importlib.metadata import version

    setting = os.environ.get("TOKENIZERS_PARALLELISM", "true").lower()
    if setting in ("false", "0", "off", "no"):
        return Finding("tokenizers", "warn", f"one thread (TOKENIZERS_PARALLELISM={setting})",
                       "unset TOKENIZERS_PARALLELISM")  # fmt: skip
    return Finding("tokenizers", "ok", f"{version('tokenizers')}, in Rust, on all threads")
