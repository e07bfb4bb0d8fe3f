"""The merge kernel compiled for GPUs that are not here: registers, shared memory, spills, and how wide it loads.

python benchmarks/gpu/ahead.py            a table for sm_80, sm_90 and sm_100; needs triton, and no GPU

Arguments get the hints (divisible by 16) that Triton's launcher would give them, taken from the very call that
`launch` prepares.
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

from lors_cli.models.packed.format import PADDING, Packed
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels import triton_merge
from lors_cli.tuning.kernels.rounding import Rounding

CAPABILITIES = (80, 90, 100)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MEMORY_ACCESS = re.compile(r"\s((?:LDG|STG|LDL|STL)\.[A-Z0-9.]+)")


@dataclass(frozen=True)
class Case:
    """One way to merge a (rows, columns) weight."""

    dtype: torch.dtype
    packed: bool
    rounding: Rounding
    rank: int = 16
    shape: tuple[int, int] = (4096, 14336)

    def __str__(self) -> str:
        kind = "packed" if self.packed else "plain"
        return f"{TYPES[self.dtype]} {kind} {self.rounding}, rank {self.rank}, {self.shape[0]}x{self.shape[1]}"

    def call(self, block: dict[str, int] = triton_merge.BLOCK) -> dict[str, Any]:
        """The kernel's arguments, tensors without memory."""
        rows, columns = self.shape

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        weight: Any = empty(rows, columns)
        if self.packed:
            words, starts = empty(rows, -(-columns // 32), dtype=torch.int32), empty(rows, dtype=torch.int64)
            weight = Packed(empty(rows * columns // 2 + PADDING), words, starts, columns, TWO_OF_FOUR)
        A, B = empty(self.rank, columns, dtype=torch.float32), empty(rows, self.rank, dtype=torch.float32)
        return triton_merge.launch(weight, A, B, 0.5, empty(rows, columns), self.rounding, block)[1]


def cases(rank: int = 16) -> list[Case]:
    """Every dtype, form and rounding; only bfloat16 is rounded in two ways."""
    ways: list[tuple[torch.dtype, Rounding]] = [
        (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "nearest"),
        (torch.float32, "nearest"),
    ]  # fmt: skip
    return [Case(dtype, packed, rounding, rank) for dtype, rounding in ways for packed in (False, True)]


def compiled(case: Case, capability: int, block: dict[str, int] = triton_merge.BLOCK) -> Any:
    """The kernel as Triton would compile it for the case on such a GPU."""
    target = GPUTarget("cuda", capability, 32)
    hints = make_backend(target)
    call = case.call(block)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(triton_merge._merge.params):
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
    options = {name: value for name, value in call.items() if name not in triton_merge._merge.arg_names}
    source = ASTSource(triton_merge._merge, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def resources(kernel: Any) -> dict[str, Any]:
    """Registers a thread, shared bytes a block, bytes spilled, instructions, and its accesses of memory by width."""
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
        "accesses": dict(Counter(MEMORY_ACCESS.findall(code))),
    }


def show(case: Case, capability: int, found: dict[str, Any]) -> str:
    """A line of the table."""
    accesses = "  ".join(f"{name} {count}" for name, count in sorted(found["accesses"].items()))
    return (f"sm_{capability:<3} {case!s:<55} registers {found['registers']:3}  shared {found['shared_bytes']:5}  "
            f"spilled {found['spilled_bytes']}  instructions {found['instructions']:4}  {accesses}")  # fmt: skip


def main() -> None:
    """Print the table."""
    for capability in CAPABILITIES:
        for case in [*cases(), *cases(64)]:
            print(show(case, capability, resources(compiled(case, capability))), flush=True)


if __name__ == "__main__":
    main()
