"""A server of forked `lors` processes, and a folder to run them in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chains import Server, serving, write_workplace


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def bench(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `start`, where nothing was run yet."""
    folder = tmp_path_factory.mktemp("faults")
    write_workplace(folder / "start", shared_dir / "data")
    return folder
