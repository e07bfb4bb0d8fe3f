"""A hub on loopback, servers of forked `lors` processes that know no other, and a folder to run them in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import Process, Server
from hub import Hub, Repo

Lors = Callable[..., Process]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_faults_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "hub" in request.fixturenames:
        served: Hub = request.getfixturevalue("hub")
        served.faults.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module's HF_HOME."""
    return tmp_path_factory.mktemp("hf")


def serving(hub: Hub, home: Path, **more: str) -> Iterator[Server]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "LORS_"))}
    there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "LORS_CACHE_DIR": str(home / "lors"), "OMP_NUM_THREADS": "1",
             "HF_HUB_DISABLE_XET": "1",
             "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    server = Server(Path(__file__).with_name("hub_server.py"), {**kept, **there, **more})
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Server]:
    yield from serving(hub, home)


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Server]:
    yield from serving(hub, home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


@pytest.fixture(scope="session")
def model_files(shared_dir: Path) -> dict[str, bytes]:
    """stories260k's."""
    return {path.name: path.read_bytes() for path in (shared_dir / "data" / "models" / "stories260k").iterdir()}


@pytest.fixture
def model(hub: Hub, model_files: dict[str, bytes], request: pytest.FixtureRequest) -> str:
    """A model on the hub that only this test asks for."""
    name = f"some-org/{request.node.name.replace('[', '-').replace(']', '')}"
    hub.repos["model", name] = Repo(dict(model_files))
    return name


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def lors(online: Server, offline: Server, place: Path) -> Lors:
    """Runs a command; `connected=False` with HF_HUB_OFFLINE=1, `token` is $HF_TOKEN."""

    def run(*arguments: str, connected: bool = True, token: str | None = None, **wanted: Any) -> Process:
        environment = {"HF_TOKEN": token} if token else {}
        server = online if connected else offline
        found = server.run(place, [str(argument) for argument in arguments], environment=environment, **wanted)
        assert "Traceback" not in found.output, found.output
        return found

    return run
