"""Products with packed weights: against float64, for every instruction set, however they are called."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packed_cases import DTYPES, Case, check, merged, pack, random_case, random_code_case
from torch.nn import functional as F

from lors_cli.models.packed.kernels import build, ops
from lors_cli.tuning.kernels.rounding import thresholds

X86 = platform.machine() == "x86_64"
pytestmark = pytest.mark.usefixtures("kernels_of_the_module")


def test_each_target_uses_its_own_instructions(target: str) -> None:
    if not X86:
        assert ops.instructions(target) == "NEON"
    elif target == "native":
        capabilities = torch.cpu.get_capabilities()
        assert (ops.instructions() == "AVX-512 with BF16") == bool(capabilities.get("avx512_bf16"))
    else:
        assert ops.instructions(target) == {"x86-64-v3": "AVX2", "x86-64": "plain C"}[target]


def test_two_hundred_random_shapes_against_float64(target: str, dtype: torch.dtype) -> None:
    dice = random.Random(5)
    for _ in range(200):
        case = random_case(dice, dtype)
        check(case, ops.product(case.x, *case.packed, case.bias, target=target))
        restored = ops.restore(*case.packed, torch.full_like(case.weight, 7), target=target)
        assert torch.equal(restored, case.weight)


@pytest.mark.parametrize("batch", [8, 9, 13, 17, 40, 300])
def test_larger_batches_of_more_rows_than_a_panel_holds(target: str, dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(batch)
    kept = torch.rand(131, 203) < 0.5
    weight = torch.randn(131, 203).mul(kept).to(dtype)
    case = Case(weight, *pack(weight, kept), torch.randn(batch, 203).to(dtype), torch.randn(131).to(dtype))
    check(case, ops.product(case.x, *case.packed, case.bias, target=target))


def test_an_input_s_result_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_largest_batch", lambda *_: 1000)
    torch.manual_seed(1)
    kept = torch.rand(1030, 515) < 0.5
    weight = torch.randn(1030, 515).mul(kept).to(dtype)
    values = torch.cat([weight[kept], torch.zeros(32, dtype=dtype)])
    offsets = F.pad(kept.sum(1).cumsum(0), (1, -1))
    words = F.pad(kept, (0, -515 % 32)).view(1030, -1, 32).long() << torch.arange(32)
    mask = words.sum(-1).where(words.sum(-1) < 1 << 31, words.sum(-1) - (1 << 32)).int()
    x = torch.randn(70, 515).to(dtype)
    threads = torch.get_num_threads()
    alone = torch.cat([ops.product(item, values, mask, offsets, None, target=target) for item in x.split(1)])
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for size in (1, 3, 8, 70):
                found = torch.cat(
                    [ops.product(item, values, mask, offsets, None, target=target) for item in x.split(size)]
                )
                assert torch.equal(found, alone), (count, size)
    finally:
        torch.set_num_threads(threads)
    assert (alone.double() - x.double() @ weight.double().T).abs().max() < 1


def test_errors_against_float64_are_as_small_as_torch_s(dtype: torch.dtype) -> None:
    """Whose last digits depend on the processor."""
    torch.manual_seed(2)
    kept = torch.rand(96, 2048) < 0.5
    weight = torch.randn(96, 2048).mul(kept).to(dtype)
    packed = pack(weight, kept)
    for batch in (1, 4, 9):
        x = torch.randn(batch, 2048).to(dtype)
        exact = x.double() @ weight.double().T
        ours, torch_s = ((found.double() - exact).square().mean().sqrt() for found in
                         (ops.product(x, *packed, None), F.linear(x, weight)))  # fmt: skip
        assert 0 < ours <= torch_s * 1.05


def test_infinities_and_nans_come_out_as_of_a_plain_weight(target: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0]]).to(dtype)
    x = torch.tensor([[1.0, float("inf"), 1.0, 1.0], [float("nan"), 1.0, 1.0, 1.0], [3e38, 3e38, 3e38, 0.0]]).to(dtype)
    expected = (x.float() @ weight.float().T).to(dtype)
    found = ops.product(x, *pack(weight, weight != 0), None, target=target)
    assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_float16_is_restored_and_multiplied_by_torch() -> None:
    dice = random.Random(3)
    for _ in range(20):
        case = random_case(dice, torch.float16)
        assert torch.equal(ops.product(case.x, *case.packed, case.bias), F.linear(case.x, case.weight, case.bias))


def test_beyond_the_largest_batch_torch_multiplies_the_restored_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_largest_batch", lambda *_: 4)
    dice = random.Random(4)
    for _ in range(5):  # of growing and shrinking sizes: the scratch memory is shared
        case = random_case(dice, dtype, batch=5)
        assert torch.equal(ops.product(case.x, *case.packed, case.bias), F.linear(case.x, case.weight, case.bias))


def test_inputs_of_any_rank_and_layout(dtype: torch.dtype) -> None:
    case = random_case(random.Random(8), dtype, batch=6)
    expected = ops.product(case.x, *case.packed, case.bias)
    columns = case.x.shape[1]
    assert torch.equal(ops.linear(case.x.view(2, 3, columns), *case.packed, case.bias), expected.view(2, 3, -1))
    assert torch.equal(ops.linear(case.x[0], *case.packed, case.bias), expected[0])
    spread = torch.full((6, 2 * columns), 9.0).to(dtype)
    spread[:, ::2] = case.x
    assert torch.equal(ops.linear(spread[:, ::2], *case.packed, case.bias), expected)
    assert torch.equal(ops.linear(case.x.T.contiguous().T, *case.packed, case.bias), expected)
    empty = ops.linear(case.x.new_empty(2, 0, columns), *case.packed, case.bias)
    assert empty.shape == (2, 0, len(case.weight))


def test_what_does_not_fit_is_refused() -> None:
    case = random_case(random.Random(9), torch.float32)
    values, mask, offsets = case.packed
    with pytest.raises(ValueError, match="no packed weight"):
        ops.linear(F.pad(case.x, (0, 32)), values, mask, offsets)
    with pytest.raises(ValueError, match="no packed weight"):
        ops.linear(case.x, values, mask, offsets.int())
    with pytest.raises(ValueError, match=r"in torch\.float32 needs"):
        ops.linear(case.x.bfloat16(), values, mask, offsets)
    with pytest.raises(ValueError, match="a bias that fit"):
        ops.linear(case.x, values, mask, offsets, torch.zeros(len(mask) + 1))


def test_the_operations_keep_torch_s_contracts(dtype: torch.dtype) -> None:
    case = random_case(random.Random(6), dtype)
    for bias in (None, torch.randn(len(case.weight)).to(dtype)):
        torch.library.opcheck(ops.packed_linear, (case.x.clone().requires_grad_(), *case.packed, bias))
    torch.library.opcheck(ops.unpack, (*case.packed, case.weight.shape[1]))


def test_gradients_are_those_of_the_plain_weight() -> None:
    case = random_case(random.Random(7), torch.float32, batch=4)
    bias = torch.randn(len(case.weight), requires_grad=True)
    x = case.x.view(2, 2, -1).clone().requires_grad_()
    direction = torch.randn(2, 2, len(case.weight))
    packed = torch.autograd.grad((ops.linear(x, *case.packed, bias) * direction).sum(), (x, bias))
    plain = torch.autograd.grad((F.linear(x, case.weight, bias) * direction).sum(), (x, bias))
    for found, expected in zip(packed, plain, strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        ops.packed_linear(x, case.values.clone().requires_grad_(), case.mask, case.offsets, None).sum().backward()


def test_it_compiles_as_one_graph_with_its_gradient() -> None:
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    case = random_case(random.Random(11), torch.float32, batch=3)

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.relu(ops.linear(x, *case.packed, case.bias)) * 2

    x = case.x.clone().requires_grad_()
    found = torch.compile(block, fullgraph=True)(x)
    expected = F.relu(F.linear(case.x, case.weight, case.bias)) * 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], 2 * (expected > 0).float() @ case.weight)


def table_for(case: Case) -> torch.Tensor | None:
    return thresholds(case.weight.shape[1], torch.device("cpu")) if case.weight.dtype == torch.bfloat16 else None


NEON = ("aarch64-linux-gnu-gcc", ["-Wall", "-Wextra", "-Werror", "-static"], ["qemu-aarch64"])
SANITISED = ("gcc", ["-march=native", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], [])


@pytest.mark.parametrize(("compiler", "flags", "emulator"), [NEON, SANITISED], ids=["neon", "sanitised"])
def test_neon_in_an_emulator_and_memory_under_a_sanitiser(
    compiler: str, flags: list[str], emulator: list[str], tmp_path: Path
) -> None:
    if not all(shutil.which(name) for name in (compiler, *emulator)):
        pytest.skip(f"needs {compiler} {emulator} (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    program, source = tmp_path / "program", Path(build.__file__).with_name("packed.c")
    subprocess.run(
        [compiler, "-std=gnu11", "-O3", *flags, f'-DSOURCE="{source}"',
         str(Path(__file__).with_name("on_stdin.c")), "-o", str(program)], check=True,
    )  # fmt: skip
    dice = random.Random(12)
    batches = (*[None] * 100, 12, 40)
    cases = [
        make(dice, dtype, batch) for make in (random_case, random_code_case) for dtype in DTYPES for batch in batches
    ]
    answer = subprocess.run([*emulator, str(program)], input=b"".join(map(as_input, cases)), stdout=subprocess.PIPE,
                            check=True).stdout  # fmt: skip
    found, place = bytearray(answer), 0
    for case in cases:
        parts = []
        for shape in ((len(case.x), len(case.weight)), *[case.weight.shape] * (3 if case.grid is None else 1)):
            count = shape[0] * shape[1]
            parts.append(torch.frombuffer(found, dtype=case.x.dtype, count=count, offset=place).view(shape))
            place += count * case.x.element_size()
        check(case, parts[0])
        assert torch.equal(parts[1], case.weight)
        if case.grid is None:
            expected = merged(case.weight, case.x.float(), parts[0].T.float(), table_for(case))
            assert torch.equal(parts[2], expected)
            assert torch.equal(parts[3], expected)
    assert place == len(answer)


def as_input(case: Case) -> bytes:
    """What `on_stdin.c` reads of a case."""
    grid = case.grid
    scales, zeros = (None, None) if grid is None else (grid.scales, grid.zeros)
    kind = (0, 0) if grid is None else (grid.spec.bits, grid.spec.group_size)
    sizes = (case.x.element_size(), *case.weight.shape, len(case.x), case.values.nbytes, case.bias is not None, *kind,
             zeros is not None)  # fmt: skip
    parts = [torch.tensor(sizes, dtype=torch.int64), case.offsets, case.mask, case.values, case.x, case.bias]
    parts += [scales, zeros] if grid is not None else [table_for(case)]
    return b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts if part is not None)
