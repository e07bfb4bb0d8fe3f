"""Products with packed codes: their weights are bit for bit those of the grid, whatever computes with them."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from packed_cases import Case, check, pack_codes, random_case, random_code_case
from torch.nn import functional as F

from lors_cli.grid import Grid, GridSpec, fit_grid
from lors_cli.models.packed.format import Packed, pack
from lors_cli.models.packed.kernels import choice, ops
from lors_cli.models.packed.linear import PackedLinear
from lors_cli.sparsity import TWO_OF_FOUR, Pattern, keep_largest

pytestmark = pytest.mark.usefixtures("kernels_of_the_module")


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    """So that 0 and -0 differ."""
    return weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)


def restored(case: Case, target: str) -> torch.Tensor:
    return ops.restore(*case.packed, torch.full_like(case.weight, 7), case.grid, target)


def arguments(case: Case) -> tuple[torch.Tensor | int | None, ...]:
    """The last arguments of an operation."""
    assert case.grid is not None
    return case.grid.scales, case.grid.zeros, case.grid.spec.bits, case.grid.spec.group_size


def test_two_hundred_random_shapes_against_the_grid_and_float64(target: str, dtype: torch.dtype) -> None:
    dice = random.Random(5)
    for _ in range(200):
        case = random_code_case(dice, dtype)
        assert torch.equal(bits_of(restored(case, target)), bits_of(case.weight))
        check(case, ops.product(case.x, *case.packed, case.bias, case.grid, target=target))


def test_words_that_keep_half_their_columns(target: str, dtype: torch.dtype) -> None:
    """2:4 and its like, for which the kernel need not count; also 8:16, and a last word that is not full."""
    dice = random.Random(8)
    for n, m, columns in ((2, 4, 4), (2, 4, 36), (4, 8, 64), (2, 4, 100), (8, 16, 336), (2, 4, 160), (4, 8, 1000)):
        rows = dice.randint(1, 21)
        kept = torch.rand(rows, columns // m, m).argsort(-1).lt(n).view(rows, columns)
        for group_size, batch in ((32, 1), (32, 7), (64, 3), (128, 8), (128, 1), (128, 11)):
            spec = GridSpec(4, group_size, dice.random() < 0.5)
            shape = (rows, spec.num_groups(columns))
            zeros = None if spec.symmetric else torch.randint(0, 16, shape, dtype=torch.uint8)
            grid = Grid(spec, (torch.rand(shape) + 0.5).to(dtype), zeros)
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
            weight = grid.values(codes).masked_fill(~kept, 0)
            x = torch.randn(batch, columns).to(dtype)
            case = Case(weight, *pack_codes(codes, kept, 4), x, None, grid)
            found = ops.product(x, *case.packed, None, grid, True, target)
            check(case, found)
            assert torch.equal(found, ops.product(x, *case.packed, None, grid, False, target))


@pytest.mark.parametrize(
    ("pattern", "half"),
    [(None, False), ("2:4", True), ("4:8", True), ("8:16", True), ("16:32", True), ("1:4", False), ("3:6", False),
     ("32:64", False)],
)  # fmt: skip
def test_which_patterns_keep_half_of_each_word(pattern: str | None, half: bool) -> None:
    assert choice._keeps_half(None if pattern is None else Pattern.parse(pattern)) is half


@pytest.mark.parametrize("batch", [1, 8, 9, 13, 17, 40, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_larger_batches_of_more_rows_than_a_panel_holds(
    target: str, dtype: torch.dtype, bits: int, batch: int
) -> None:  # fmt: skip
    torch.manual_seed(batch)
    kept = torch.rand(131, 203) < 0.5
    grid = fit_grid(torch.randn(131, 203).to(dtype), kept, GridSpec(bits, 64))
    codes = torch.randint(0, 1 << bits, (131, 203), dtype=torch.uint8)
    x, bias = torch.randn(batch, 203).to(dtype), torch.randn(131).to(dtype)
    case = Case(grid.values(codes).masked_fill(~kept, 0), *pack_codes(codes, kept, bits), x, bias, grid)
    check(case, ops.product(x, *case.packed, bias, grid, target=target))


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_too_small_for_normal_numbers_and_too_large_for_any(
    target: str, dtype: torch.dtype, bits: int
) -> None:  # fmt: skip
    """vcvtneps2bf16 would make 0 of what is below 2^-126."""
    scales = torch.tensor([9.2e-41, 1e-39, 2.0**-127, 2.0**-126, 3.1e-38, 1e-30, 3e37, 3.3e38]).to(dtype).view(8, 1)
    for zero in (None, 0, 15) if bits == 4 else (None,):
        zeros = None if zero is None else torch.full((8, 1), zero, dtype=torch.uint8)
        grid = Grid(GridSpec(bits, 128, zero is None), scales, zeros)
        codes = torch.arange(128).mul(2).add(1).remainder(1 << bits).byte().repeat(8, 1)
        kept = torch.arange(128).remainder(3).ne(1).repeat(8, 1)
        weight = grid.values(codes).masked_fill(~kept, 0)
        assert 0 < weight[:3][kept[:3]].abs().min().item() < 2e-38 or zero == 15
        found = ops.restore(*pack_codes(codes, kept, bits), torch.empty_like(weight), grid, target=target)
        assert torch.equal(bits_of(found), bits_of(weight))


def test_an_input_s_result_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_largest_batch", lambda *_: 1000)
    torch.manual_seed(1)
    weight = torch.randn(1030, 547)
    kept = torch.rand(weight.shape) < 0.5
    threads = torch.get_num_threads()
    for spec in (GridSpec(4, 64, symmetric=False), GridSpec(8, 128)):
        grid = fit_grid(weight, kept, spec, dtype=dtype)
        on_grid = grid.rounded(weight).masked_fill(~kept, 0)
        packed = pack(on_grid, None, grid)
        x = torch.randn(70, 547).to(dtype)

        def product(x: torch.Tensor, packed: Packed = packed) -> torch.Tensor:
            return ops.product(x, packed.values, packed.mask, packed.starts, None, packed.grid, target=target)

        alone = torch.cat([product(item) for item in x.split(1)])
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                for size in (1, 2, 5, 8, 70):
                    found = torch.cat([product(item) for item in x.split(size)])
                    assert torch.equal(found, alone), (count, size)
        finally:
            torch.set_num_threads(threads)
        exact = x.double() @ on_grid.double().T
        assert (alone.double() - exact).abs().max() < 1


def test_errors_against_float64_are_as_small_as_torch_s(dtype: torch.dtype) -> None:
    """Whose last digits depend on the processor."""
    torch.manual_seed(2)
    weight = torch.randn(96, 2048)
    kept = keep_largest(weight.abs(), TWO_OF_FOUR, per_row=False)
    for spec in (GridSpec(4, 128), GridSpec(4, 32, symmetric=False), GridSpec(8, 64)):
        grid = fit_grid(weight, kept, spec, dtype=dtype)
        plain = grid.rounded(weight).masked_fill(~kept, 0)
        packed = pack(plain, TWO_OF_FOUR, grid)
        for batch in (1, 4, 9):
            x = torch.randn(batch, 2048).to(dtype)
            exact = x.double() @ plain.double().T
            ours, torch_s = ((found.double() - exact).square().mean().sqrt() for found in
                             (choice.linear(x, packed, None), F.linear(x, plain)))  # fmt: skip
            assert 0 < ours <= torch_s * 1.05


def test_inputs_of_another_width_are_refused_though_their_masks_are_as_wide() -> None:
    packed = pack(torch.eye(32), None)
    with pytest.raises(ValueError, match="of 32 columns needs inputs that fit it, not 30"):
        choice.linear(torch.ones(2, 30), packed, None)


def test_infinities_and_nans_come_out_as_of_a_plain_weight(target: str, dtype: torch.dtype) -> None:
    codes = torch.tensor([[9, 8, 10, 8], [8, 11, 8, 8]], dtype=torch.uint8)
    grid = Grid(GridSpec(4, 128), torch.ones(2, 1, dtype=dtype))
    weight = grid.values(codes)
    x = torch.tensor([[1.0, float("inf"), 1.0, 1.0], [float("nan"), 1.0, 1.0, 1.0], [3e38, 3e38, 3e38, 0.0]]).to(dtype)
    expected = (x.float() @ weight.float().T).to(dtype)
    found = ops.product(x, *pack_codes(codes, weight != 0, 4), None, grid, target=target)
    assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_a_packed_weight_is_multiplied_and_unpacked_by_the_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(24, 160)
    kept = torch.rand(weight.shape) < 0.5
    grid = fit_grid(weight, kept, GridSpec(4, 128), dtype=dtype)
    plain = grid.rounded(weight).masked_fill(~kept, 0)
    packed, x, bias = pack(plain, None, grid), torch.randn(2, 3, 160).to(dtype), torch.randn(24).to(dtype)
    monkeypatch.setattr(choice.by_torch, "unpack", None)  # is not called
    monkeypatch.setattr(choice.F, "linear", None)
    assert torch.equal(choice.unpack(packed), plain)
    assert torch.equal(choice.unpack(packed, torch.full_like(plain, 3)), plain)
    exact = (x.double() @ plain.double().T + bias.double()).float()
    torch.testing.assert_close(choice.linear(x, packed, bias).float(), exact, atol=0.05, rtol=0.01)


def test_float16_and_devices_without_a_kernel_are_unpacked_by_torch() -> None:
    weight = torch.randn(8, 96)
    grid = fit_grid(weight, weight > 0, GridSpec(4, 32), dtype=torch.float16)
    plain = grid.rounded(weight).masked_fill(weight <= 0, 0)
    packed, x = pack(plain, None, grid), torch.randn(3, 96).half()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choice.why_none(cpu, torch.float16, grid.spec) == "there is none for codes whose scales are float16"
    assert choice.why_none(gpu, torch.bfloat16, grid.spec) == "it does not know codes of few bits"
    assert choice.why_none(cpu, torch.bfloat16, GridSpec(3, 32)) == (
        "there is none for symmetric grids of 3 bits in groups of 32"
    )
    assert torch.equal(choice.unpack(packed), plain)
    assert torch.equal(choice.linear(x, packed, None), F.linear(x, plain))


def test_beyond_the_largest_batch_torch_multiplies_the_restored_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_largest_batch", lambda *_: 4)
    dice = random.Random(4)
    for make in (random_code_case, random_case, random_code_case):  # the scratch memory is shared
        case = make(dice, dtype, batch=5)
        found = ops.product(case.x, *case.packed, case.bias, case.grid)
        assert torch.equal(found, F.linear(case.x, case.weight, case.bias))


def test_what_does_not_fit_is_refused() -> None:
    case = random_code_case(random.Random(9), torch.float32)
    spec, scales, zeros = case.grid.spec, case.grid.scales, case.grid.zeros

    def product(values: torch.Tensor, grid: Grid | None, x: torch.Tensor = case.x) -> torch.Tensor:
        return ops.linear(x, values, case.mask, case.offsets, None, grid)

    for wrong in (Grid(spec, scales[:, :0], zeros), Grid(spec, scales.double(), zeros),
                  Grid(GridSpec(4, spec.group_size, not spec.symmetric), scales, zeros)):  # fmt: skip
        with pytest.raises(ValueError, match="are no grid of"):
            product(case.values, wrong)
    with pytest.raises(ValueError, match="are no grid of"):
        product(case.values.int(), case.grid)
    with pytest.raises(ValueError, match="symmetric grids of 4 bits in groups of 16"):
        product(case.values, Grid(GridSpec(4, 16), scales))
    with pytest.raises(ValueError, match="asymmetric grids of 8 bits"):
        product(case.values, Grid(GridSpec(8, 32, symmetric=False), scales, zeros))
    with pytest.raises(ValueError, match=r"in torch\.float32 needs"):
        product(case.values, case.grid, case.x.bfloat16())
    with pytest.raises(ValueError, match=r"in torch\.uint8 needs"):
        product(case.values, None)


def test_the_operations_keep_torch_s_contracts(dtype: torch.dtype) -> None:
    dice = random.Random(6)
    for _ in range(3):
        case = random_code_case(dice, dtype)
        x = case.x.clone().requires_grad_()
        torch.library.opcheck(ops.packed_linear, (x, *case.packed, case.bias, *arguments(case)))
        torch.library.opcheck(ops.unpack, (*case.packed, case.weight.shape[1], *arguments(case)))


def test_gradients_are_those_of_the_plain_weight() -> None:
    case = random_code_case(random.Random(7), torch.float32, batch=4)
    bias = torch.randn(len(case.weight), requires_grad=True)
    x = case.x.view(2, 2, -1).clone().requires_grad_()
    direction = torch.randn(2, 2, len(case.weight))
    packed = torch.autograd.grad((ops.linear(x, *case.packed, bias, case.grid) * direction).sum(), (x, bias))
    plain = torch.autograd.grad((F.linear(x, case.weight, bias) * direction).sum(), (x, bias))
    for found, expected in zip(packed, plain, strict=True):
        torch.testing.assert_close(found, expected)
    scales, *others = arguments(case)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        ops.packed_linear(x, *case.packed, None, scales.clone().requires_grad_(), *others).sum().backward()


def test_it_compiles_as_one_graph_with_its_gradient() -> None:
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    weight = torch.randn(24, 160)
    grid = fit_grid(weight, weight > 0, GridSpec(4, 64, symmetric=False))
    plain = grid.rounded(weight).masked_fill(weight <= 0, 0)
    bias = torch.randn(24)
    linear = PackedLinear.of(pack(plain, None, grid), bias)

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.relu(linear(x)) * 2

    x = torch.randn(3, 160, requires_grad=True)
    found = torch.compile(block, fullgraph=True)(x)
    expected = F.relu(F.linear(x, plain, bias)) * 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], 2 * (expected > 0).float() @ plain)
