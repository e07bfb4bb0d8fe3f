"""The divergence from the likeliest tokens: against the plain formulas and autograd, and its bound."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lors_cli.tuning.divergence import AllTokens, TopTokens

EVERY = slice(None)


def _logits(seed: int, rows: int = 7, vocabulary: int = 23) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _full(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    logs = [F.log_softmax(logits / temperature, 1) for logits in (student, teacher)]
    return temperature**2 * F.kl_div(*logs, log_target=True, reduction="sum")


def _by_events(student: torch.Tensor, teacher: torch.Tensor, top_k: int, temperature: float) -> torch.Tensor:
    """Token by token: k events and one more, each side's flattened by the temperature."""
    total = torch.zeros((), dtype=torch.float64)
    for q, p in zip(F.softmax(student, 1), F.softmax(teacher, 1), strict=True):
        kept = sorted(range(len(p)), key=lambda token: -float(p[token]))[:top_k]
        others = [token for token in range(len(p)) if token not in kept]
        sides = []
        for side in (p, q):
            events = [side[token] for token in kept] + ([sum(side[token] for token in others)] if others else [])
            flat = [event ** (1 / temperature) for event in events]  # type: ignore[union-attr, operator]
            sides.append([event / sum(flat) for event in flat])
        for ours, theirs in zip(*sides, strict=True):
            total = total + temperature**2 * ours * (torch.log(ours) - torch.log(theirs))  # type: ignore[arg-type]
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 4, 22, 23])
def test_value_and_gradient_are_those_of_the_events(top_k: int, temperature: float) -> None:
    student, teacher = _logits(0).requires_grad_(True), _logits(1)
    expected = _by_events(student, teacher, top_k, temperature)
    expected.backward()
    found, slope = TopTokens.of(teacher.clone(), top_k).divergence(EVERY, student.detach().clone(), temperature)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, student.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_the_whole_vocabulary_is_the_divergence_of_all_tokens(temperature: float) -> None:
    student, teacher = _logits(2), _logits(3)
    all_tokens = AllTokens(teacher, torch.eye(23, dtype=torch.float64), None)
    top = TopTokens.of(teacher.clone(), 23)
    expected = [_full(student, teacher, temperature), *all_tokens.divergence(EVERY, student.clone(), temperature)]
    found, slope = top.divergence(EVERY, student.clone(), temperature)
    torch.testing.assert_close(found, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected[1], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, expected[2], rtol=1e-8, atol=1e-10)


def test_fewer_tokens_never_tell_more() -> None:
    """The divergence of k + 1 events grows with k, up to that of all tokens."""
    for seed in range(20):
        student, teacher = _logits(2 * seed), _logits(2 * seed + 1)
        found = [float(TopTokens.of(teacher.clone(), k).divergence(EVERY, student.clone(), 1.0)[0])
                 for k in range(1, 24)]  # fmt: skip
        assert all(few <= more + 1e-9 for few, more in pairwise(found))
        assert 0 < found[0] < found[-1] == pytest.approx(float(_full(student, teacher, 1.0)))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    logits = _logits(4)
    found, slope = TopTokens.of(logits.clone(), 5).divergence(EVERY, logits.clone(), 1.5)
    assert float(found) == pytest.approx(0, abs=1e-12)
    assert float(slope.abs().max()) < 1e-12


def test_a_probability_that_float16_cannot_hold_does_no_harm() -> None:
    """A teacher that is sure: what it all but rules out is kept as -inf or far below, and neither is NaN."""
    teacher = torch.full((1, 6), -200.0)
    teacher[0, 2] = 200.0
    kept = TopTokens.of(teacher, 6)
    stored = TopTokens(kept.ids, kept.log_p.half(), kept.log_rest)
    found, slope = stored.divergence(EVERY, torch.zeros(1, 6), 1.0)
    assert float(found) == pytest.approx(float(torch.tensor(6.0).log()), rel=1e-5)
    assert torch.isfinite(slope).all()
