"""Patterns, masks and their counts, against loops."""

from __future__ import annotations

import pytest
import torch

from lors_cli.bench.live_memory import LiveBytes
from lors_cli.errors import UsageError
from lors_cli.recipe.schema import PruneConfig
from lors_cli.sparsity import (
    LayerSparsity,
    Pattern,
    keep_largest,
    mask_digest,
    measure,
    missing_zeros,
    num_violations,
    summarise,
)

TWO_OF_FOUR = Pattern(2, 4, 0.5)


def unstructured(sparsity: float) -> Pattern:
    return Pattern.parse("unstructured", sparsity)


@pytest.mark.parametrize(
    ("text", "n", "m", "sparsity"),
    [("2:4", 2, 4, 0.5), ("1:4", 1, 4, 0.75), ("4:8", 4, 8, 0.5), ("16:32", 16, 32, 0.5)],
)
def test_parse_n_of_m(text: str, n: int, m: int, sparsity: float) -> None:
    assert Pattern.parse(text) == Pattern(n, m, sparsity)
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(text).structured


def test_parse_unstructured() -> None:
    pattern = Pattern.parse("unstructured", 0.3)
    assert (pattern.n, pattern.m, pattern.sparsity, str(pattern)) == (None, None, 0.3, "unstructured")
    assert not pattern.structured


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:2", "4:4", "0:4", "2:4:8", "-2:4", "2.0:4", "a:b", "2/4", "²:4"]
)
def test_parse_refuses_what_is_no_pattern(text: str) -> None:
    with pytest.raises(UsageError, match="no sparsity pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize("sparsity", [None, 0.0, 1.0, -0.1, 1.5, float("nan")])
def test_parse_refuses_an_impossible_share(sparsity: float | None) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        Pattern.parse("unstructured", sparsity)


def test_of_reads_a_prune_config() -> None:
    assert Pattern.of(PruneConfig(pattern="1:4")) == Pattern(1, 4, 0.75)
    assert Pattern.of(PruneConfig(pattern="unstructured", sparsity=0.7)) == Pattern(None, None, 0.7)


def test_check_shape_names_the_weight() -> None:
    TWO_OF_FOUR.check_shape("fine", (3, 8))
    unstructured(0.5).check_shape("fine", (3, 7))
    with pytest.raises(UsageError, match=r"layers\.0\.up \(3 × 10\) cannot be 2:4"):
        TWO_OF_FOUR.check_shape("layers.0.up", (3, 10))


class OnGpu(torch.Tensor):
    """A CPU's, which says that it lies on a GPU, and what deterministic algorithms refuse there."""

    is_cuda = True

    def kthvalue(self, *_: object, **__: object) -> None:
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")


@pytest.mark.parametrize("per_row", [False, True])
def test_deterministic_algorithms_on_a_gpu_choose_the_same(per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(9, (6, 50), generator=torch.Generator().manual_seed(0)).float()
    expected = keep_largest(scores, unstructured(0.5), per_row=per_row)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch.equal(keep_largest(scores.as_subclass(OnGpu), unstructured(0.5), per_row=per_row), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_keep_largest_n_of_m(n: int, m: int) -> None:
    scores = torch.randn(6, 8 * m, generator=torch.Generator().manual_seed(0))
    mask = keep_largest(scores, Pattern(n, m, 1 - n / m), per_row=True)
    for row in range(6):
        for start in range(0, 8 * m, m):
            group = scores[row, start : start + m].tolist()
            best = sorted(range(m), key=lambda index: -group[index])[:n]
            assert mask[row, start : start + m].tolist() == [index in best for index in range(m)]


@pytest.mark.parametrize("sparsity", [0.5, 0.3, 0.77])
@pytest.mark.parametrize("per_row", [True, False])
def test_keep_largest_unstructured(sparsity: float, per_row: bool) -> None:
    scores = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    mask = keep_largest(scores, unstructured(sparsity), per_row=per_row)
    for row, kept in zip(scores if per_row else [scores.flatten()], mask if per_row else [mask.flatten()], strict=True):
        order = sorted(range(len(row)), key=lambda index: row[index].item())
        removed = order[: int(len(row) * sparsity)]
        assert kept.tolist() == [index not in removed for index in range(len(row))]


def test_ties_lose_their_later_inputs() -> None:
    ones = torch.ones(2, 8)
    assert keep_largest(ones, TWO_OF_FOUR, per_row=True).tolist() == [[True, True, False, False] * 2] * 2
    assert keep_largest(ones, unstructured(0.5), per_row=True).tolist() == [[True] * 4 + [False] * 4] * 2
    assert keep_largest(ones, unstructured(0.5), per_row=False).tolist() == [[True] * 8, [False] * 8]
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert keep_largest(scores, Pattern(3, 4, 0.25), per_row=True).tolist() == [[True, True, False, True]]


def test_equal_scores_take_no_more_memory_than_is_estimated() -> None:
    scores = torch.ones(64, 256)
    with LiveBytes([scores]) as live:
        keep_largest(scores, unstructured(0.5), per_row=False)
    assert live.peak < 12 * scores.numel()


@pytest.mark.parametrize(("share", "size", "removed"), [(0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.1, 9, 0)])
def test_removed_weights_are_rounded_down_but_not_by_the_floats_error(share: float, size: int, removed: int) -> None:
    mask = keep_largest(torch.randn(1, size), unstructured(share), per_row=True)
    assert int((~mask).sum()) == removed


def test_keep_largest_on_one_group_and_on_a_non_contiguous_score() -> None:
    assert keep_largest(torch.tensor([[3.0, 1, 2, 0]]), TWO_OF_FOUR, per_row=True).tolist() == [[1, 0, 1, 0]]
    scores = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for pattern in (TWO_OF_FOUR, unstructured(0.5)):
        for per_row in (True, False):
            mask = keep_largest(scores.T, pattern, per_row=per_row)
            assert torch.equal(mask, keep_largest(scores.T.contiguous(), pattern, per_row=per_row))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_num_violations_n_of_m(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 32, generator=generator) * (torch.rand(7, 32, generator=generator) < n / m)
    expected = 0
    for row in weight.tolist():
        for start in range(0, 32, m):
            expected += sum(value != 0 for value in row[start : start + m]) > n
    assert 0 < expected < 7 * 32 // m
    assert num_violations(weight, Pattern(n, m, 1 - n / m)) == expected


def test_num_violations_counts_negative_zero_as_zero_and_nan_as_kept() -> None:
    assert num_violations(torch.tensor([[-0.0, 1.0, 2.0, -0.0]]), TWO_OF_FOUR) == 0
    assert num_violations(torch.tensor([[float("nan"), 1.0, 2.0, 0.0]]), TWO_OF_FOUR) == 1


def test_num_violations_of_a_width_that_has_no_groups() -> None:
    assert num_violations(torch.zeros(2, 6), TWO_OF_FOUR) == 12


def test_num_violations_unstructured() -> None:
    weight = torch.ones(4, 10)
    weight[:, :5] = 0
    assert num_violations(weight, unstructured(0.5)) == 0
    weight[0, :3] = 1
    assert num_violations(weight, unstructured(0.5)) == 2  # 17 zeros; 20, less one for the rounding of a block
    assert num_violations(torch.ones(4, 10), unstructured(0.5)) == 19


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 200), (50, 3)])
def test_a_mask_of_a_share_has_no_violations(shape: tuple[int, int], per_row: bool) -> None:
    for sparsity in (0.3, 0.5, 0.57, 0.9):
        scores = torch.rand(shape) + 1
        assert num_violations(scores * keep_largest(scores, unstructured(sparsity), per_row=per_row),
                              unstructured(sparsity)) == 0  # fmt: skip


def test_measure_and_summarise() -> None:
    sparse = measure("a", torch.tensor([[0.0, 1, 0, 2]]), TWO_OF_FOUR)
    dense = measure("b", torch.ones(2, 4), TWO_OF_FOUR)
    assert (sparse.num_zeros, sparse.sparsity, sparse.violations) == (2, 0.5, 0)
    assert (dense.shape, dense.sparsity, dense.violations) == ((2, 4), 0.0, 2)
    assert summarise([sparse, dense], TWO_OF_FOUR) == {
        "pattern": "2:4",
        "sparsity": round(2 / 12, 6),
        "violations": 2,
        "layers": [
            {"name": "a", "shape": [1, 4], "sparsity": 0.5},
            {"name": "b", "shape": [2, 4], "sparsity": 0.0},
        ],
    }
    assert summarise([], None) == {"pattern": "dense", "sparsity": 0.0, "violations": 0, "layers": []}
    assert measure("b", torch.ones(2, 4), None).violations == 0


def test_a_recorded_share_s_last_digit_makes_no_violation() -> None:
    """The zeros of the widest linears, were they pruned as a whole layer: 94 fewer than half, recorded as half."""
    layer = LayerSparsity("a", (28672, 8192), 28672 * 4096 - 94, 0)
    (recorded,) = summarise([layer], unstructured(0.4999996))["layers"]
    assert recorded["sparsity"] == 0.5
    assert missing_zeros(layer.shape, layer.num_zeros, unstructured(recorded["sparsity"])) == 0
    assert missing_zeros(layer.shape, layer.num_zeros - 200, unstructured(recorded["sparsity"])) > 0


def test_mask_digest_sees_the_mask_alone() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 4.0, 0.0]])
    digest = mask_digest([("a", weight), ("b", weight.T)])
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    same = [
        [("b", weight.T), ("a", weight)],
        [("a", weight * -7), ("b", weight.T * 0.5)],
        [("a", weight.bfloat16()), ("b", weight.T.contiguous())],
    ]
    for weights in same:
        assert mask_digest(weights) == digest
    moved = weight.clone()
    moved[0, 0], moved[0, 1] = 1.0, 0.0
    more = weight.clone()
    more[1, 2] = 0.0
    different = [
        [("a", moved), ("b", weight.T)],
        [("a", more), ("b", weight.T)],
        [("a", weight), ("c", weight.T)],
        [("a", weight.reshape(4, 2)), ("b", weight.T)],
        [("a", weight)],
        [("b", weight), ("a", weight.T)],
    ]
    assert len({digest, *map(mask_digest, different)}) == 1 + len(different)
