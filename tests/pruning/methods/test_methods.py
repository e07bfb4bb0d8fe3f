"""The pruning methods against loops written from the papers; statistics against NumPy in float64.

Legend: W (R, C) weight, X (tokens, C) inputs, H (C, C) Hessian, R out_features, C in_features.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from lors_cli.errors import UsageError
from lors_cli.output import console
from lors_cli.pruning.methods import prune_group
from lors_cli.pruning.methods.magnitude import magnitude
from lors_cli.pruning.methods.ria import ria
from lors_cli.pruning.methods.sparsegpt import inverse_factor, sparsegpt
from lors_cli.pruning.methods.statistics import InputStatistics
from lors_cli.pruning.methods.wanda import wanda
from lors_cli.sparsity import Pattern, num_violations

PATTERNS = [Pattern.parse("2:4"), Pattern.parse("1:4"), Pattern.parse("4:8"),
            Pattern.parse("unstructured", 0.5), Pattern.parse("unstructured", 0.3)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def describe(value: Any) -> str:
    return f"{value}-{value.sparsity:g}" if isinstance(value, Pattern) else str(value)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, channels: int, seed: int = 1) -> torch.Tensor:
    """Correlated inputs, with channels of different size."""
    mixing = normal(channels, channels, seed=seed + 100) / math.sqrt(channels) + torch.eye(channels)
    return normal(tokens, channels, seed=seed) @ mixing * torch.linspace(0.5, 2, channels)


def statistics_of(X: torch.Tensor, kind: Any) -> InputStatistics:
    statistics = InputStatistics(kind)
    statistics.update(X)
    return statistics


def naive(W: torch.Tensor, scores: list[list[float]], pattern: Pattern, per_row: bool) -> list[list[float]]:
    """Sets the lowest scores to zero, one group of places after the other."""
    result = [list(row) for row in W.tolist()]
    R, C = W.shape
    if pattern.m is not None:
        groups = [[(i, j + k) for k in range(pattern.m)] for i in range(R) for j in range(0, C, pattern.m)]
    elif per_row:
        groups = [[(i, j) for j in range(C)] for i in range(R)]
    else:
        groups = [[(i, j) for i in range(R) for j in range(C)]]
    for places in groups:
        removed = pattern.m - pattern.n if pattern.m and pattern.n else math.floor(len(places) * pattern.sparsity)
        for i, j in sorted(places, key=lambda place: scores[place[0]][place[1]])[:removed]:
            result[i][j] = 0.0
    return result


def expected_zeros(pattern: Pattern, R: int, C: int, per_row: bool) -> int:
    if pattern.m is not None and pattern.n is not None:
        return R * (C // pattern.m) * (pattern.m - pattern.n)
    return R * math.floor(C * pattern.sparsity) if per_row else math.floor(R * C * pattern.sparsity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=describe)
class TestAgainstLoops:
    R, C = 7, 40

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        # distinct sizes in bfloat16 too, so that no tie decides
        steps = torch.randperm(self.R * self.C, generator=torch.Generator().manual_seed(0)).float()
        signs = normal(self.R, self.C, seed=3).sign()
        weight = (2 ** (steps / 40)).reshape(self.R, self.C) * signs
        return weight.to(dtype)

    def check(self, pruned: torch.Tensor, W: torch.Tensor, expected: list[list[float]], zeros: int) -> None:
        assert pruned.dtype == W.dtype
        assert pruned.tolist() == expected
        assert int((pruned == 0).sum()) == zeros

    def test_magnitude(self, pattern: Pattern, dtype: torch.dtype) -> None:
        W = self.weight(dtype)
        before = W.clone()
        scores = [[abs(value) for value in row] for row in W.tolist()]
        pruned = magnitude(W, pattern)
        self.check(pruned, W, naive(W, scores, pattern, False), expected_zeros(pattern, self.R, self.C, False))
        assert torch.equal(W, before)

    def test_wanda(self, pattern: Pattern, dtype: torch.dtype) -> None:
        W, X = self.weight(dtype), inputs(50, self.C)
        before = W.clone()
        norms = [math.sqrt(sum(x * x for x in column)) for column in X.T.tolist()]
        scores = [[abs(value) * norms[j] for j, value in enumerate(row)] for row in W.tolist()]
        pruned = wanda(W, statistics_of(X, "norm"), pattern)
        self.check(pruned, W, naive(W, scores, pattern, True), expected_zeros(pattern, self.R, self.C, True))
        assert torch.equal(W, before)

    def test_ria(self, pattern: Pattern, dtype: torch.dtype) -> None:
        W, X = self.weight(dtype), inputs(50, self.C)
        before = W.clone()
        norms = [math.sqrt(sum(x * x for x in column)) for column in X.T.tolist()]
        size = [[abs(value) for value in row] for row in W.tolist()]
        row_sums = [sum(row) for row in size]
        column_sums = [sum(row[j] for row in size) for j in range(self.C)]
        scores = [[(size[i][j] / column_sums[j] + size[i][j] / row_sums[i]) * norms[j] ** 0.5 for j in range(self.C)]
                  for i in range(self.R)]  # fmt: skip
        pruned = ria(W, statistics_of(X, "norm"), pattern)
        self.check(pruned, W, naive(W, scores, pattern, False), expected_zeros(pattern, self.R, self.C, False))
        assert torch.equal(W, before)


def test_ria_of_a_zero_row_and_column() -> None:
    W = normal(4, 8)
    W[1], W[:, 2] = 0, 0
    pruned = ria(W, statistics_of(inputs(20, 8), "norm"), PATTERNS[0])
    assert bool(pruned.isfinite().all())
    assert num_violations(pruned, PATTERNS[0]) == 0


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_inputs_are_refused(method: str, broken: float) -> None:
    X = inputs(30, 16)
    X[3, 5] = broken
    statistics = statistics_of(X, "hessian" if method == "sparsegpt" else "norm")
    with pytest.raises(UsageError, match="NaN or Inf"):
        prune_group(method, [normal(4, 16)], statistics, PATTERNS[0])


class TestStatistics:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_several_batches(self, dtype: torch.dtype) -> None:
        batches = [normal(4, 9, 12, seed=1).to(dtype), normal(4, 9, 12, seed=2).to(dtype),
                   normal(3, 9, 12, seed=3).to(dtype)]  # fmt: skip
        copies = [batch.clone() for batch in batches]
        X = np.concatenate([batch.double().reshape(-1, 12).numpy() for batch in batches])
        norm, hessian = InputStatistics("norm"), InputStatistics("hessian")
        for batch in batches:
            norm.update(batch)
            hessian.update(batch)
        assert (norm.num_samples, norm.num_tokens) == (hessian.num_samples, hessian.num_tokens) == (11, 99)
        for statistics in (norm, hessian):
            got = statistics.input_norms()
            assert got.dtype == torch.float32
            np.testing.assert_allclose(got.numpy(), np.sqrt((X**2).sum(0)), rtol=1e-5)
        got = hessian.hessian()
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), 2 * X.T @ X / 11, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))

    def test_two_dimensions_are_one_sample(self) -> None:
        statistics = statistics_of(normal(9, 12), "norm")
        assert (statistics.num_samples, statistics.num_tokens) == (1, 9)

    @pytest.mark.parametrize("width", [4, 127, 128, 129, 300])
    def test_the_hessian_is_whole_and_kept(self, width: int) -> None:
        x = normal(2, 9, width)
        statistics = statistics_of(x, "hessian")
        norms = statistics.input_norms()
        X = x.double().reshape(-1, width)
        H = statistics.hessian()
        torch.testing.assert_close(H.double(), X.T @ X, rtol=1e-5, atol=1e-5)  # 2 samples: 2·XᵀX / 2
        assert torch.equal(H, H.T)
        assert statistics.hessian() is H
        torch.testing.assert_close(statistics.input_norms(), norms)
        with pytest.raises(AssertionError, match="after the Hessian"):
            statistics.update(x)

    @pytest.mark.parametrize("kind", ["norm", "hessian"])
    def test_permuted_inputs_have_permuted_statistics(self, kind: Any) -> None:
        x, order = normal(2, 9, 6), torch.tensor([3, 0, 5, 1, 4, 2])
        statistics, expected = statistics_of(x, kind), statistics_of(x[..., order], kind)
        statistics.permute(order)
        torch.testing.assert_close(statistics.input_norms(), expected.input_norms())
        if kind == "hessian":
            torch.testing.assert_close(statistics.hessian(), expected.hessian())

    def test_none_sums_nothing(self) -> None:
        statistics = statistics_of(normal(2, 9, 4), "none")
        assert (statistics.total, statistics.num_tokens) == (None, 18)


def reference_sparsegpt(W: np.ndarray, H: np.ndarray, pattern: Pattern, damping: float = 0.01) -> np.ndarray:
    """SparseGPT column by column in float64, from the definition.

    At column j the inverse of the remaining Hessian H[j:, j:] is formed explicitly; a pruned weight w makes the
    optimal-brain-surgeon update −w / [H⁻¹]₀₀ · H⁻¹₀ over the columns j… of its row. Saliency w² / [H⁻¹]₀₀; it
    picks the mask at the start of every 128 columns (whole weight) or of every M columns (within a row).
    """
    W, H = W.astype(np.float64).copy(), H.astype(np.float64).copy()
    R, C = W.shape
    dead = np.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    H += damping * np.mean(np.diag(H)) * np.eye(C)
    first_rows = [np.linalg.inv(H[j:, j:])[0] for j in range(C)]
    step = pattern.m or 128
    for start in range(0, C, step):
        columns = range(start, min(start + step, C))
        saliency = np.array([W[:, j] ** 2 / first_rows[j][0] for j in columns]).T
        prune = np.zeros(saliency.shape, dtype=bool)
        if pattern.m is not None and pattern.n is not None:
            for i in range(R):
                prune[i, np.argsort(saliency[i], kind="stable")[: pattern.m - pattern.n]] = True
        else:
            removed = math.floor(saliency.size * pattern.sparsity)
            prune.flat[np.argsort(saliency, axis=None, kind="stable")[:removed]] = True
        for place, j in enumerate(columns):
            for i in range(R):
                if prune[i, place]:
                    W[i, j:] -= W[i, j] / first_rows[j][0] * first_rows[j]
                    W[i, j] = 0.0
    return W


class TestSparseGpt:
    def compare(self, weights: list[torch.Tensor], X: torch.Tensor, pattern: Pattern, rtol: float = 1e-3) -> None:
        statistics = statistics_of(X.unsqueeze(0), "hessian")
        H = 2 * X.double().numpy().T @ X.double().numpy()
        before = [weight.clone() for weight in weights]
        pruned = sparsegpt(weights, statistics, pattern)
        for weight, got, original in zip(weights, pruned, before, strict=True):
            expected = reference_sparsegpt(weight.double().numpy(), H, pattern)
            assert torch.equal(weight, original)
            np.testing.assert_array_equal((got == 0).numpy(), expected == 0)
            np.testing.assert_allclose(got.double().numpy(), expected, rtol=rtol, atol=rtol)
            assert num_violations(got, pattern) == 0

    @pytest.mark.parametrize("pattern", PATTERNS, ids=describe)
    def test_several_blocks_of_columns(self, pattern: Pattern) -> None:
        self.compare([normal(6, 320)], inputs(700, 320), pattern)

    @pytest.mark.parametrize("text", ["3:5", "8:16", "100:200"])
    def test_groups_that_do_not_divide_128(self, text: str) -> None:
        self.compare([normal(3, 400)], inputs(900, 400), Pattern.parse(text))

    @pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[4]], ids=describe)
    def test_stacked_weights_keep_their_own_share(self, pattern: Pattern) -> None:
        weights = [normal(6, 160, seed=1), 10 * normal(3, 160, seed=2), 0.1 * normal(4, 160, seed=3)]
        self.compare(weights, inputs(400, 160), pattern, rtol=2e-3)

    @pytest.mark.parametrize("size", [1.0, 0.01])  # where inputs are small, the pinned ones count in the damping
    @pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3]], ids=describe)
    def test_dead_inputs(self, pattern: Pattern, size: float) -> None:
        X = size * inputs(400, 160)
        X[:, [0, 5, 6, 7, 130, 159]] = 0
        self.compare([normal(5, 160)], X, pattern)
        (pruned,) = sparsegpt([normal(5, 160)], statistics_of(X, "hessian"), pattern)
        assert int(pruned[:, [0, 5, 6, 7, 130, 159]].count_nonzero()) == 0

    def test_inputs_that_are_all_dead(self) -> None:
        (pruned,) = sparsegpt([normal(5, 16)], statistics_of(torch.zeros(9, 16), "hessian"), PATTERNS[0])
        assert int(pruned.count_nonzero()) == 0

    @pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3]], ids=describe)
    def test_fewer_tokens_than_inputs(self, pattern: Pattern) -> None:
        X = inputs(24, 160)
        assert torch.linalg.matrix_rank(X) == 24
        self.compare([normal(4, 160)], X, pattern, rtol=5e-3)

    def test_dtype_is_kept_and_the_sweep_runs_in_float32(self) -> None:
        W, X = normal(4, 64).bfloat16(), inputs(200, 64)
        (pruned,) = sparsegpt([W], statistics_of(X, "hessian"), PATTERNS[0])
        (exact,) = sparsegpt([W.float()], statistics_of(X, "hessian"), PATTERNS[0])
        assert pruned.dtype == torch.bfloat16
        assert torch.equal(pruned, exact.bfloat16())

    def test_it_beats_masking_alone(self) -> None:
        W, X = normal(16, 128), inputs(600, 128)
        (pruned,) = sparsegpt([W], statistics_of(X, "hessian"), PATTERNS[0])
        masked = wanda(W, statistics_of(X, "norm"), PATTERNS[0])
        assert (X @ (pruned - W).T).norm() < 0.9 * (X @ (masked - W).T).norm()


class TestInverseFactor:
    @pytest.fixture
    def messages(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        heard: list[str] = []
        monkeypatch.setattr(console, "warn", heard.append)
        monkeypatch.setattr(console, "info", heard.append)
        return heard

    def test_plain(self, messages: list[str]) -> None:
        X = inputs(300, 48).double()
        H = X.T @ X
        U = inverse_factor(H.float())
        assert U.dtype == torch.float32
        assert torch.equal(U, U.triu())
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(48, dtype=torch.float64)
        torch.testing.assert_close((U.T @ U).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-8)
        assert messages == []

    def test_float64_before_more_damping(self, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            importlib.import_module("lors_cli.pruning.methods.sweep"), "FLOAT64_COLUMNS", 0
        )  # as for a wide matrix
        near = np.float32(1.01)  # 9.5e-9 below 1.01, lost in float32
        U = inverse_factor(torch.tensor([[1.0, near], [near, 1.0]]))
        assert bool(U.isfinite().all())
        assert ["float64" in message for message in messages] == [True]
        damped = np.array([[1.01, near], [near, 1.01]], dtype=np.float64)
        np.testing.assert_allclose((U.T @ U).double().numpy(), np.linalg.inv(damped), rtol=1e-3)

    def test_indefinite_matrix_raises_the_damping(self, messages: list[str]) -> None:
        H = torch.tensor([[1.0, 1.5, 0.0], [1.5, 1.0, 0.2], [0.0, 0.2, 1.0]])  # lowest eigenvalue below −0.5
        assert torch.linalg.eigvalsh(H)[0] < -0.5
        U = inverse_factor(H)
        torch.testing.assert_close(U.T @ U, torch.linalg.inv(H + torch.eye(3)), rtol=1e-4, atol=1e-5)
        assert [message for message in messages if "damping raised" in message] == [
            "Hessian not positive definite: damping raised to 0.1 × its mean diagonal",
            "Hessian not positive definite: damping raised to 1 × its mean diagonal",
        ]

    def test_nan_is_an_error(self) -> None:
        H = torch.eye(4)
        H[1, 2] = H[2, 1] = float("nan")
        with pytest.raises(UsageError, match="NaN or Inf"):
            inverse_factor(H)
