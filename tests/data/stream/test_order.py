"""The order of packed samples: a function of seed and position."""

from __future__ import annotations

from lors_cli.data.stream.order import shuffled_block


def _blocks(count: int, **options: int | None) -> list[int]:
    settings = {"seed": 3, "buffer": 8, "num_blocks": None, **options}
    return [shuffled_block(position, **settings) for position in range(count)]  # type: ignore[arg-type]


def test_each_window_is_shuffled_by_itself() -> None:
    order = _blocks(40)
    windows = [order[first : first + 8] for first in range(0, 40, 8)]
    for index, window in enumerate(windows):
        assert sorted(window) == list(range(8 * index, 8 * index + 8))
    places = [[block % 8 for block in window] for window in windows]
    assert len({tuple(place) for place in places}) == 5
    assert order != _blocks(40, seed=4)


def test_each_pass_takes_every_block_once_and_in_another_order() -> None:
    order = _blocks(3 * 21, num_blocks=21)
    passes = [order[first : first + 21] for first in range(0, 63, 21)]
    assert all(sorted(one) == list(range(21)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert sorted(passes[2][16:]) == list(range(16, 21))  # the last window is shorter


def test_the_end_of_the_source_does_not_change_what_came_before_it() -> None:
    assert _blocks(40) == _blocks(40, num_blocks=43)


def test_a_position_needs_no_other_one_before_it() -> None:
    assert [shuffled_block(position, seed=3, buffer=8, num_blocks=21) for position in (60, 5, 33)] == [
        _blocks(63, num_blocks=21)[position] for position in (60, 5, 33)
    ]
