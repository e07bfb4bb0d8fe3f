"""A short run of the fuzz harness, the same cases every time; `make fuzz` is the long one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fuzz_run
import pytest
from fuzz_run import KINDS, Hang, Outcome, Tally, fuzz, message_kind, run_case, summary
from fuzz_world import World, alone

CASES = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("fuzz")
    with alone(root):
        made = World(root)
        made.build()
        yield made


def test_no_broken_input_gives_a_traceback_a_hang_or_a_stray_file(world: World) -> None:
    problems: list[str] = []
    tally = fuzz(world, CASES, 1, lambda line: problems.append(line) if line.startswith("PROBLEM") else None)
    assert not problems, "\n".join(problems)
    assert set(tally.cases) == set(KINDS)
    assert sum(tally.cases.values()) >= CASES * 0.95
    assert all(tally.exit_codes[kind, 2] for kind in KINDS if kind != "run_folder")


class TestTheHarnessItself:
    """It must see what it is there to see."""

    def outcome(self, world: World, monkeypatch: pytest.MonkeyPatch, text: str) -> Outcome:
        def broken(kind: str, path: str) -> None:
            exec(text)

        monkeypatch.setattr("lors_cli.cli.pipelines.find", broken)
        monkeypatch.setattr(fuzz_run, "LONGEST_S", 1)
        monkeypatch.setitem(KINDS, "own", (lambda rng, place: ["run", "tiny.yaml", "--out", "out"], 0.0))
        return run_case(world, "own", 0, 0)

    def test_a_bug(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.outcome(world, monkeypatch, "1 / 0")
        assert found.exit_code == 1
        assert "ZeroDivisionError" in str(found.problem)

    def test_a_hang(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        busy, waiting = "while True: pass", "import time; time.sleep(60)"
        for text in (busy, waiting):
            started = time.monotonic()
            assert "does not end" in str(self.outcome(world, monkeypatch, text).problem)
            assert time.monotonic() - started < 50
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL

    @pytest.mark.parametrize("path", ["../base/rows.jsonl", "beside", "../tmp/left", "out/../x"])
    def test_a_stray_file(self, world: World, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
        before = (world.base / "rows.jsonl").read_bytes()
        text = f"from pathlib import Path; from lors_cli.errors import UsageError; p = Path({path!r})\n"
        text += "p.parent.joinpath('.').resolve(); Path('out').mkdir(exist_ok=True)\n"
        text += "p.write_text('x')\nraise UsageError('x')"
        try:
            assert "changed outside" in str(self.outcome(world, monkeypatch, text).problem)
        finally:
            (world.base / "rows.jsonl").write_bytes(before)
            (world.root / "tmp" / "left").unlink(missing_ok=True)

    def test_a_file_among_the_results_is_none(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "import os; from lors_cli.errors import UsageError\nos.mkdir('out'); open('out/x', 'w').close()\n"
        found = self.outcome(world, monkeypatch, f"{text}raise UsageError('x')")
        assert found.problem is None
        assert found.exit_code == 2

    def test_a_case_is_the_same_every_time(self, world: World) -> None:
        first, second = (run_case(world, "recipe", 7, 3) for _ in range(2))
        assert first == second
        assert first != run_case(world, "recipe", 8, 3)

    def test_the_summary(self) -> None:
        tally = Tally()
        tally.add("recipe", Outcome("recipe:0", [], 2, "error: x.yaml:3: bad 'a'", None))
        tally.add("recipe", Outcome("recipe:1", [], 2, "error: x.yaml:4: bad 'b'", None))
        tally.add("data", Outcome("data:0", [], 1, "Traceback", "exit 1"))
        text = summary(tally, 3)
        assert "3 cases, 2 distinct messages, 1 problems" in text
        assert message_kind("error: x.yaml:3: bad 'a'") == message_kind("error: x.yaml:99: bad 'b'")
        assert Hang.__mro__[1] is BaseException


def test_a_world_leaves_the_environment_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    with alone(tmp_path):
        assert os.environ["HOME"] == str(tmp_path / "home")
    assert dict(os.environ) == before
