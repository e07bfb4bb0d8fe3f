"""Products with packed weights on a CPU, as operations of torch.

Legend: R rows, C columns; `values` (K + 32), the K kept ones row by row, columns ascending, then 32 zeros; `mask`
(R, ⌈C/32⌉) int32, bit j of word c is column 32·c + j, bits past C are 0; `offsets` (R) int64, where each row's values
begin. Of a quantised weight `values` are bytes of codes (uint8) and 32 zeros: with 4 bits two a byte, the lower half
first, those of each word of the mask from a byte on; `offsets` count bytes. `scales` (R, G) and, where it is not
symmetric, `zeros` (R, G) are of its grid; `half`: each whole word of the mask keeps 16 columns, as of 2:4. What they
hold is checked where a checkpoint is loaded: here wrong offsets or bits read foreign memory.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.format import wrong_spec
from lors_cli.models.packed.kernels.build import NATIVE, NoKernels, library

PREFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
"""Of the functions in C."""
SIZED_LIKE = {torch.float16: "bf16", **PREFIXES}
"""To restore a weight, only the size of its values counts."""
PLAIN = "plain C"
LARGEST_BATCH = {
    ("AVX-512 with BF16", torch.bfloat16): 256, ("AVX-512 with BF16", torch.float32): 256, ("AVX2", torch.float32): 16,
    ("NEON", torch.bfloat16): 16, ("NEON", torch.float32): 16,
}  # fmt: skip
"""Inputs above which torch's own product with the restored weight is faster: measured on Zen 4, for NEON assumed."""
LARGEST_BATCH_BESIDE_AMX = 16
"""The same for bfloat16 where torch multiplies in tiles."""


def available(dtype: torch.dtype, grid: GridSpec | None = None) -> str | None:
    """Why there is no kernel for packed weights of this dtype on this machine, None if there is one.

    Args:
        grid: of a quantised weight.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in SIZED_LIKE:
        return f"there is none for {name}"
    if grid is not None:
        if dtype not in PREFIXES:
            return f"there is none for codes whose scales are {name}"
        if wrong := why_not_this_grid(grid):
            return wrong
    return _why_no_library()


def why_not_this_grid(grid: GridSpec) -> str:
    """Why the kernels cannot read codes of such a grid, empty if they can."""
    if wrong_spec(grid):
        symmetric = "symmetric" if grid.symmetric else "asymmetric"
        return f"there is none for {symmetric} grids of {grid.bits} bits in groups of {grid.group_size}"
    return ""


@cache
def _why_no_library() -> str | None:
    try:
        found = instructions()
    except NoKernels as error:
        return str(error)
    return f"this processor has neither AVX2 nor NEON, and {found} is slower than torch" if found == PLAIN else None


def instructions(target: str = NATIVE) -> str:
    """What the kernels use of the processor, in words."""
    return library(target).instructions().decode()


@torch.library.custom_op("lors::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bits: int = 0,
    group_size: int = 0,
    half: bool = False,
) -> torch.Tensor:
    """x (…, C) times a packed weight (R, C), and the bias (R) where there is one: (…, R), summed in float32."""
    return product(x, values, mask, offsets, bias, _grid(scales, zeros, bits, group_size), half)


@torch.library.custom_op("lors::unpack", mutates_args=(), device_types="cpu")
def unpack(
    values: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    columns: int,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bits: int = 0,
    group_size: int = 0,
) -> torch.Tensor:
    """The packed weight (R, C) as a plain one."""
    out = (values if scales is None else scales).new_empty(len(mask), columns)
    return restore(values, mask, offsets, out, _grid(scales, zeros, bits, group_size))


def _grid(scales: torch.Tensor | None, zeros: torch.Tensor | None, bits: int, group_size: int) -> Grid | None:
    """The grid of an operation's arguments, which has none where nothing is quantised."""
    return None if scales is None else Grid(GridSpec(bits, group_size, zeros is None), scales, zeros)


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    grid: Grid | None = None,
    half: bool = False,
) -> torch.Tensor:
    """`packed_linear`, past torch's dispatcher where neither autograd nor a compiler needs to see it: 10 µs less."""
    plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    if plain and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return product(x, values, mask, offsets, bias, grid, half)
    codes = () if grid is None else (grid.scales, grid.zeros, grid.spec.bits, grid.spec.group_size, half)
    return packed_linear(x, values, mask, offsets, bias, *codes)


def product(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    grid: Grid | None = None,
    half: bool = False,
    target: str = NATIVE,
) -> torch.Tensor:
    """`packed_linear` of plain tensors, unseen by autograd."""
    rows, columns, dtype = mask.shape[0], x.shape[-1], x.dtype
    check(values, mask, offsets, columns, grid)
    held = values.dtype if grid is None else grid.scales.dtype
    if dtype != held or (bias is not None and (bias.dtype != dtype or bias.shape != (rows,))):
        raise ValueError(f"a packed weight of {rows} rows in {held} needs inputs and a bias that fit it")
    batch = x.numel() // columns
    if batch > _largest_batch(dtype, target):
        return F.linear(x, restore(values, mask, offsets, _scratch(dtype, rows, columns), grid, target), bias)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    if batch and _function("linear", dtype, target)(
        values.data_ptr(), mask.data_ptr(), offsets.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(),
        out.data_ptr(), rows, columns, batch, *in_c(grid), half,
    ):  # fmt: skip
        raise MemoryError(f"no memory for a batch of {batch} × {columns}")
    return out


def restore(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, grid: Grid | None = None,
    target: str = NATIVE,
) -> torch.Tensor:  # fmt: skip
    """`unpack` into `out` (R, C)."""
    rows, columns = out.shape
    check(values, mask, offsets, columns, grid)
    function = _function("unpack", out.dtype, target)
    function(values.data_ptr(), mask.data_ptr(), offsets.data_ptr(), out.data_ptr(), rows, columns, *in_c(grid))
    return out


def in_c(grid: Grid | None) -> tuple[int | None, int | None, int, int]:
    """The last arguments of a function in C."""
    if grid is None:
        return None, None, 0, 0
    zeros = None if grid.zeros is None else grid.zeros.data_ptr()
    return grid.scales.data_ptr(), zeros, grid.spec.bits, grid.spec.group_size


@cache
def _function(name: str, dtype: torch.dtype, target: str) -> Any:
    return getattr(library(target), f"{SIZED_LIKE[dtype]}_{name}")


def check(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, columns: int, grid: Grid | None = None
) -> None:
    """Hold the shapes of a packed weight against each other.

    Raises:
        ValueError: they do not fit.
    """
    if not (
        mask.shape == (len(offsets), (columns + 31) // 32)
        and mask.dtype is torch.int32 and offsets.dtype is torch.int64 and values.dim() == 1
        and values.is_contiguous() and mask.is_contiguous() and offsets.is_contiguous()
    ):  # fmt: skip
        raise ValueError(
            f"values {tuple(values.shape)}, mask {tuple(mask.shape)} and offsets {tuple(offsets.shape)} are no packed "
            f"weight of {columns} columns"
        )
    if grid is not None:
        _check_grid(values, grid, (len(mask), grid.spec.num_groups(columns)))


def _check_grid(values: torch.Tensor, grid: Grid, shape: tuple[int, int]) -> None:
    if wrong := why_not_this_grid(grid.spec):
        raise ValueError(wrong)
    scales, zeros = grid.scales, grid.zeros
    if not (
        values.dtype is torch.uint8 and scales.dtype in PREFIXES and scales.shape == shape and scales.is_contiguous()
        and (zeros is None) == grid.spec.symmetric
        and (zeros is None or (zeros.dtype is torch.uint8 and zeros.shape == shape and zeros.is_contiguous()))
    ):  # fmt: skip
        raise ValueError(f"scales {scales.dtype} {tuple(scales.shape)} and their zeros are no grid of {shape} groups")


_buffers: dict[tuple[torch.dtype, int], torch.Tensor] = {}


def _scratch(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Memory for one restored weight at a time, grown to the largest; each thread has its own."""
    key = (dtype, threading.get_ident())
    if key not in _buffers or _buffers[key].numel() < rows * columns:
        _buffers.pop(key, None)
        with torch.inference_mode(False):
            _buffers[key] = torch.empty(rows * columns, dtype=dtype)
    return _buffers[key][: rows * columns].view(rows, columns)


@cache
def _largest_batch(dtype: torch.dtype, target: str) -> float:
    """Inputs up to which the kernel beats torch's product with the restored weight."""
    if dtype not in PREFIXES:
        return 0
    if dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16"):
        return LARGEST_BATCH_BESIDE_AMX
    return LARGEST_BATCH.get((instructions(target), dtype), float("inf"))


@packed_linear.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, bias: Any, scales: Any = None,
    zeros: Any = None, bits: int = 0, group_size: int = 0, half: bool = False,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], mask.shape[0])


@unpack.register_fake
def _(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, columns: int, scales: torch.Tensor | None = None,
    zeros: Any = None, bits: int = 0, group_size: int = 0,
) -> torch.Tensor:  # fmt: skip
    return (values if scales is None else scales).new_empty(mask.shape[0], columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, mask, offsets, _, *codes = inputs  # defaults that are left out are not among them
    scales, zeros, *ctx.bits_and_group = codes[:4] or (None, None, 0, 0)
    ctx.save_for_backward(values, mask, offsets, scales, zeros)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_values, _, _, needs_bias, *of_codes = ctx.needs_input_grad
    if needs_values or any(of_codes):
        raise RuntimeError("packed weights cannot be trained: freeze them, or unpack the model first")
    values, mask, offsets, scales, zeros = ctx.saved_tensors
    weight = (values, mask, offsets, ctx.columns, scales, zeros, *ctx.bits_and_group)
    grad_x = grad @ unpack(*weight) if needs_x else None
    grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
    return grad_x, None, None, None, grad_bias, *[None] * len(of_codes)


packed_linear.register_autograd(_backward, setup_context=_remember)
