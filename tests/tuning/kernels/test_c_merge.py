"""The merge in C: exact to the bit against plain loops, whatever the processor, threads and layout; close to torch."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from packed_cases import merged

from lors_cli.models.packed.format import Packed, pack
from lors_cli.models.packed.kernels import ops
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels import masked_merge as merging
from lors_cli.tuning.kernels.c_merge import LARGEST_RANK, masked_merge_in_c, why_not_in_c
from lors_cli.tuning.kernels.masked_merge import how_merged, masked_merge, masked_merge_formula
from lors_cli.tuning.kernels.rounding import PERIOD, thresholds

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("kernels_of_the_module")
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
NO_COMPILER = "there is no C compiler (cc, gcc, clang) on the PATH"
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=list(BITS), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_weight(dice: random.Random, rows: int, columns: int, rank: int, dtype: torch.dtype) -> Given:
    """W with zeros of both signs, A and B; all rounded to `dtype`."""
    torch.manual_seed(dice.randrange(1 << 30))
    weight = torch.randn(rows, columns).to(dtype)
    dropped = torch.rand(rows, columns)
    weight[dropped < dice.random()] = 0.0
    weight[dropped < 0.1] = -0.0
    return weight, torch.randn(rank, columns).to(dtype), torch.randn(rows, rank).mul(0.1).to(dtype)


def by_loops(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    table = thresholds(weight.shape[1], CPU) if weight.dtype == torch.bfloat16 else None
    A, B = A.float(), B.float()
    return merged(weight, A if len(A) == 1 else A * scale, B * scale if len(A) == 1 else B, table)


def by_torch(monkeypatch: pytest.MonkeyPatch, *given: object) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(merging, "why_not_in_c", lambda *_: NO_COMPILER)
        return masked_merge(*given, rounding="stochastic")  # type: ignore[arg-type]


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, about: object = None) -> None:
    kind = BITS[expected.dtype]
    wrong = found.contiguous().view(kind) != expected.contiguous().view(kind)
    assert not wrong.any(), f"{about}: {int(wrong.sum())} of {wrong.numel()} differ"


def test_any_shape_and_rank_against_plain_loops(target: str, dtype: torch.dtype) -> None:
    dice = random.Random(1)
    for _ in range(60):
        rows, columns, rank = dice.randint(1, 150), dice.randint(1, 200), dice.choice([1, 2, dice.randint(3, 80)])
        given = random_weight(dice, rows, columns, rank, dtype)
        scale = dice.choice([0.25, 1.0, 4.0, 0.3, -1.7])
        expected = by_loops(*given, scale)
        for weight in (given[0], pack(given[0])):
            found = masked_merge_in_c(weight, *given[1:], scale, torch.full_like(expected, 7), target)
            assert_same_bits(found, expected, (rows, columns, rank, scale, type(weight)))


def test_rows_wider_than_a_strip(target: str, dtype: torch.dtype) -> None:
    given = random_weight(random.Random(11), 37, 2110, 40, dtype)
    expected = by_loops(*given, 0.5)
    for weight in (given[0], pack(given[0])):
        assert_same_bits(masked_merge_in_c(weight, *given[1:], 0.5, torch.empty_like(expected), target), expected)


@pytest.mark.usefixtures("threads")
def test_torch_differs_by_the_rounding_of_its_sums_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most libraries and processors add in the same order; some do not, at least not at odd widths."""
    dice = random.Random(2)
    shapes = [(576, 576), (192, 1536), (PERIOD * 3 + 24, 511)]
    shapes += [(dice.randint(1, 4) * PERIOD + dice.choice([0, dice.randint(24, 63)]), dice.randint(16, 600))
               for _ in range(40)]  # fmt: skip
    for number, (rows, columns) in enumerate(shapes):
        rank = dice.choice([1, 2, 8, 16, 64, 80, LARGEST_RANK, dice.randint(3, 80)])
        weight, A, B = random_weight(dice, rows, columns, rank, dtype)
        scale = dice.choice([0.25, 2.0, 16 / rank**0.5])
        torch.set_num_threads(1 + number % 2)
        expected = by_torch(monkeypatch, weight, A, B, scale)
        found = masked_merge_in_c(weight, A, B, scale, torch.empty_like(expected))
        sums = weight.abs().double() + scale * B.abs().double() @ A.abs().double()
        slack = torch.finfo(torch.float32).eps * (rank + 1) * sums
        if dtype == torch.bfloat16:  # a sum that lies at its threshold is rounded to the one side or the other
            apart = found != expected
            assert apart.double().mean() <= 1e-3, (rows, columns, rank, scale)
            slack += apart * torch.finfo(dtype).eps * expected.abs()
        assert ((found.double() - expected.double()).abs() <= slack).all(), (rows, columns, rank, scale)


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_the_rows_around_change_a_bit(target: str, dtype: torch.dtype) -> None:
    weight, A, B = random_weight(random.Random(3), 1030, 515, 16, dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(masked_merge_in_c(weight, A, B, 0.5, torch.empty_like(weight), target))
    rows = [slice(start, start + PERIOD) for start in range(0, 1030, PERIOD)]
    parts = [masked_merge_in_c(weight[part], A, B[part], 0.5, torch.empty_like(weight[part]), target) for part in rows]
    for other in (*found[1:], torch.cat(parts)):
        assert_same_bits(other, found[0])


def test_infinities_and_nans_stay_and_zeros_lose_their_sign(target: str, dtype: torch.dtype) -> None:
    weight, A, B = random_weight(random.Random(4), 70, 99, 5, dtype)
    special = torch.rand(weight.shape)
    weight[special < 0.06] = float("-inf")
    weight[special < 0.04] = float("inf")
    weight[special < 0.02] = float("nan")
    found = masked_merge_in_c(weight, A, B, 0.5, torch.empty_like(weight), target)
    assert torch.equal(found.isnan(), weight.isnan())
    assert torch.equal(found[weight.isinf()], weight[weight.isinf()])
    assert not bool(found[weight == 0].signbit().any())
    assert_same_bits(found.nan_to_num(7), by_loops(weight, A, B, 0.5).nan_to_num(7))
    A[2, 3] = float("inf")
    found = masked_merge_in_c(weight, A, B, 0.5, torch.empty_like(weight), target)
    assert torch.equal(found.isfinite()[:, 3], weight[:, 3] == 0)


def test_into_a_slice_and_out_of_one(target: str, dtype: torch.dtype) -> None:
    weight, A, B = random_weight(random.Random(5), 80, 77, 4, dtype)
    expected = by_loops(weight, A, B, 2.0)
    wide, out = torch.zeros(80, 100, dtype=dtype), torch.full((90, 100), 7, dtype=dtype)
    wide[:, 9:86] = weight
    assert_same_bits(masked_merge_in_c(wide[:, 9:86], A, B, 2.0, out[3:83, 5:82], target), expected)
    out[3:83, 5:82] = 7
    assert bool((out == 7).all())


def test_columns_that_lie_apart_go_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = random_weight(random.Random(6), 64, 32, 4, torch.bfloat16)
    expected = masked_merge_formula(weight, A, B, 2.0, torch.bfloat16, "stochastic")
    monkeypatch.setattr(merging, "masked_merge_in_c", None)
    apart = weight.T.contiguous().T
    assert torch.equal(masked_merge(apart, A, B, 2.0, rounding="stochastic"), expected)
    out = torch.empty(32, 64, dtype=torch.bfloat16).T
    assert torch.equal(masked_merge(weight, A, B, 2.0, rounding="stochastic", out=out), expected)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None])
def test_a_packed_base_needs_no_second_weight(
    pattern: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, A, B = random_weight(random.Random(7), 100, 96, 6, dtype)
    if pattern:
        weight.view(100, -1, 4)[..., 1:3] = 0
        weight[:9] = 0  # groups of fewer than two values, filled up with zeros
    packed = pack(weight, pattern)  # type: ignore[arg-type]
    monkeypatch.setattr(merging, "unpack", None)
    assert_same_bits(masked_merge(packed, A, B, 0.5, rounding="stochastic"), by_loops(weight, A, B, 0.5))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    weight, A, B = random_weight(random.Random(8), 10, 64, 2, torch.float32)
    packed = pack(weight)
    broken = Packed(packed.values, packed.mask[:, :1].contiguous(), packed.starts, 64)
    with pytest.raises(ValueError, match="no packed weight"):
        masked_merge(broken, A, B, 1.0)


def test_float32_adapters_are_rounded_to_the_weight_s_dtype_and_stay_as_they_are() -> None:
    weight, A, B = random_weight(random.Random(9), 64, 40, 3, torch.bfloat16)
    A, B = A.float() + 1e-4, B.float() + 1e-5
    before = A.clone(), B.clone()
    for rank in (3, 1):
        found = masked_merge(weight, A[:rank], B[:, :rank], 0.5, rounding="stochastic")
        assert_same_bits(found, by_loops(weight, A[:rank].bfloat16(), B[:, :rank].bfloat16(), 0.5))
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])


def test_what_it_is_for() -> None:
    assert why_not_in_c(CPU, torch.bfloat16, "stochastic", LARGEST_RANK) == ""
    assert why_not_in_c(CPU, torch.float32, "nearest") == ""
    for case, reason in (
        ((torch.device("cuda"), torch.float32, "nearest"), "for CPUs, not cuda"),
        ((CPU, torch.float16, "stochastic"), "does not know float16"),
        ((CPU, torch.bfloat16, "nearest"), "stochastically only"),
        ((CPU, torch.bfloat16, "stochastic", LARGEST_RANK + 1), f"rank {LARGEST_RANK + 1} is above"),
    ):
        assert reason in why_not_in_c(*case)  # type: ignore[arg-type]
    assert how_merged(CPU, torch.bfloat16, "stochastic") == f"one pass in C ({ops.instructions()})"
    assert f"rank {LARGEST_RANK + 1}" in how_merged(CPU, torch.float32, rank=LARGEST_RANK + 1)


def test_without_a_compiler_torch_merges_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = random_weight(random.Random(10), 64, 40, 3, torch.bfloat16)
    monkeypatch.setattr(ops, "_why_no_library", lambda: NO_COMPILER)
    monkeypatch.setattr(merging, "masked_merge_in_c", None)
    expected = masked_merge_formula(weight, A, B, 0.5, torch.bfloat16, "stochastic")
    for base in (weight, pack(weight)):
        assert torch.equal(masked_merge(base, A, B, 0.5, rounding="stochastic"), expected)
    told = how_merged(CPU, torch.bfloat16, "stochastic")
    assert told == f"float32 tiles, rounded stochastically (no C kernel: {NO_COMPILER})"
    assert how_merged(CPU, torch.float32).startswith("one addmm and a mask (no C kernel: there is no C compiler")
