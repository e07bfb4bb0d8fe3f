"""What tests of scoring mean by the same results."""

from __future__ import annotations

import pytest


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]], tolerance: float = 1e-4) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=tolerance)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
