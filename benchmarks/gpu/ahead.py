"""Our kernels compiled for GPUs that are not here: registers, shared memory, spills, and how wide they load.

python benchmarks/gpu/ahead.py            a table for sm_80, sm_90 and sm_100; needs triton, and no GPU

Arguments get the hints (divisible by 16) that Triton's launcher would give them, taken from the very call that
the launchers prepare.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.format import PADDING, Packed
from lors_cli.models.packed.kernels import triton_linear
from lors_cli.sparsity import TWO_OF_FOUR, Pattern
from lors_cli.tuning.kernels import triton_merge
from lors_cli.tuning.kernels.rounding import Rounding

CAPABILITIES = (80, 90, 100)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MEMORY_ACCESS = re.compile(r"\s((?:LDG|STG|LDL|STL)\.[A-Z0-9.]+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Case:
    """One way to merge a (rows, columns) weight."""

    dtype: torch.dtype
    packed: bool
    rounding: Rounding
    rank: int = 16
    shape: tuple[int, int] = (4096, 14336)
    spec: GridSpec | None = None

    def __str__(self) -> str:
        kind = ("packed" if self.packed else "plain") + (f" {self.spec.bits}-bit" if self.spec else "")
        return f"{TYPES[self.dtype]} {kind} {self.rounding}, rank {self.rank}, {self.shape[0]}x{self.shape[1]}"

    @property
    def kernel(self) -> Any:
        """The kernel."""
        return triton_merge._merge

    def call(self, block: dict[str, int] = triton_merge.BLOCK) -> dict[str, Any]:
        """The kernel's arguments, tensors without memory."""
        rows, columns = self.shape
        weight: Any = empty(self.dtype, rows, columns)
        if self.packed:
            weight = empty_packed(self.dtype, self.shape, TWO_OF_FOUR)
        A, B = empty(torch.float32, self.rank, columns), empty(torch.float32, rows, self.rank)
        out, grid = empty(self.dtype, rows, columns), None
        if self.spec is not None:
            groups = (rows, self.spec.num_groups(columns))
            zeros = None if self.spec.symmetric else empty(torch.uint8, *groups)
            grid = Grid(self.spec, empty(self.dtype, *groups), zeros)
        return triton_merge.launch(weight, A, B, 0.5, out, self.rounding, block, grid)[1]


@dataclass(frozen=True)
class PackedCase:
    """One way to multiply with a packed (rows, columns) weight; with no tokens, to unpack it."""

    dtype: torch.dtype
    pattern: Pattern | None
    tokens: int
    shape: tuple[int, int] = (4096, 14336)

    def __str__(self) -> str:
        what = f"times {self.tokens}" if self.tokens else "unpacked"
        return f"{TYPES[self.dtype]} {self.pattern or 'unstructured'} {what}, {self.shape[0]}x{self.shape[1]}"

    @property
    def kernel(self) -> Any:
        """The kernel."""
        return triton_linear._linear if self.tokens else triton_linear._unpack

    def call(self, block: dict[str, int] | None = None) -> dict[str, Any]:
        """The kernel's arguments, tensors without memory."""
        packed = empty_packed(self.dtype, self.shape, self.pattern)
        if not self.tokens:
            return triton_linear.launch_unpack(packed, empty(self.dtype, *self.shape), block)[1]
        x, y = (empty(self.dtype, self.tokens, features) for features in reversed(self.shape))
        return triton_linear.launch_linear(x, packed, None, y, block)[1]


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_packed(dtype: torch.dtype, shape: tuple[int, int], pattern: Pattern | None) -> Packed:
    """A weight packed at one half, without memory."""
    rows, columns = shape
    words, starts = empty(torch.int32, rows, -(-columns // 32)), empty(torch.int64, rows)
    return Packed(empty(dtype, rows * columns // 2 + PADDING), words, starts, columns, pattern)


def cases(rank: int = 16) -> list[Case]:
    """Every dtype, form and rounding; only bfloat16 is rounded in two ways."""
    ways: list[tuple[torch.dtype, Rounding]] = [
        (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "nearest"),
        (torch.float32, "nearest"),
    ]  # fmt: skip
    return [Case(dtype, packed, rounding, rank) for dtype, rounding in ways for packed in (False, True)]


def packed_cases() -> list[PackedCase]:
    """A pattern of each kind, in bfloat16 with one token and with many, and unpacked; then other dtypes."""
    patterns = (TWO_OF_FOUR, Pattern.parse("4:8"), None)
    return [
        *(PackedCase(torch.bfloat16, pattern, tokens) for pattern in patterns for tokens in (1, 2, 4, 8, 0)),
        PackedCase(torch.float16, TWO_OF_FOUR, 1),
        *(PackedCase(torch.float32, pattern, tokens) for pattern in (TWO_OF_FOUR, None) for tokens in (1, 8)),
    ]


def compiled(case: Case | PackedCase, capability: int) -> Any:
    """The kernel as Triton would compile it for the case on such a GPU."""
    target = GPUTarget("cuda", capability, 32)
    hints = make_backend(target)
    call = case.call()
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(case.kernel.params):
        value = call[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            hint = hints.get_tensor_specialization(value, align=True)
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            hint = hints.get_int_specialization(value, align=True) if isinstance(value, int) else ""
        if hint:
            attributes[(index,)] = hints.parse_attr(hint)
    options = {name: value for name, value in call.items() if name not in case.kernel.arg_names}
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def resources(kernel: Any) -> dict[str, Any]:
    """Registers a thread, shared bytes a block, bytes spilled, instructions (and of the longest loop), accesses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "shared_bytes": kernel.metadata.shared,
        "spilled_bytes": int(found[2]),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z]", code)),
        "in_loop": sum(in_loop(code).values()),
        "accesses": dict(Counter(MEMORY_ACCESS.findall(code))),
    }


def in_loop(code: str) -> Counter[str]:
    """How often each instruction stands in the body of the longest loop; a loop ends in a jump back."""
    listed = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(code)]
    jumps = [(int(target[1], 16), at) for at, name, rest in listed
             if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest))]  # fmt: skip
    first, last = max(((to, at) for to, at in jumps if to < at), key=lambda loop: loop[1] - loop[0], default=(1, 0))
    return Counter(name.partition(".")[0] for at, name, _ in listed if first <= at <= last)


def show(case: Case | PackedCase, capability: int, found: dict[str, Any]) -> str:
    """A line of the table."""
    accesses = "  ".join(f"{name} {count}" for name, count in sorted(found["accesses"].items()))
    return (f"sm_{capability:<3} {case!s:<55} registers {found['registers']:3}  shared {found['shared_bytes']:5}  "
            f"spilled {found['spilled_bytes']}  instructions {found['instructions']:4}  "
            f"in the loop {found['in_loop']:4}  {accesses}")  # fmt: skip


def main() -> None:
    """Print the table."""
    for capability in CAPABILITIES:
        for case in [*cases(), *cases(64), *packed_cases()]:
            print(show(case, capability, resources(compiled(case, capability))), flush=True)


if __name__ == "__main__":
    main()
