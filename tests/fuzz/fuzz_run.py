"""The harness: many broken inputs through the real commands, in one process.

In every case `lors` must end well or with one of its own errors: no traceback, no hang, nothing written outside the
results' folder, no memory that grows without bound. A case is made from its seed, kind and number alone:

    python tests/fuzz/fuzz_run.py --cases 10000 --seed 0          all kinds, in their shares
    python tests/fuzz/fuzz_run.py --only recipe:123 --seed 0      one case, with what it printed and its files kept
"""

from __future__ import annotations

import argparse
import gc
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from unittest import mock

import typer.testing
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from fuzz_files import data_case, data_folder_case
from fuzz_models import adapter_case, checkpoint_case, packed_case, run_folder_case
from fuzz_text import override_case, recipe_case, sweep_case
from fuzz_world import World, alone, at

from lors_cli.cli.app import app

Case = Callable[[Random, Path], list[str]]
KINDS: dict[str, tuple[Case, float]] = {
    "recipe": (recipe_case, 0.35),
    "override": (override_case, 0.27),
    "sweep": (sweep_case, 0.14),
    "data": (data_case, 0.11),
    "data_folder": (data_folder_case, 0.02),
    "checkpoint": (checkpoint_case, 0.04),
    "packed": (packed_case, 0.02),
    "adapter": (adapter_case, 0.025),
    "run_folder": (run_folder_case, 0.025),
}
"""What makes a case, and its share of all cases."""
FINE = (0, 2, 3, 4, 5)
"""Exit codes that a broken input may end with: 1 is a bug."""
LONGEST_S = 20
"""Seconds of processor time that a case may take; waiting counts a third, for there may be others at work."""
MOST_GROWTH = 2 << 30
"""Bytes that the process may grow beyond what it had once every command had run."""


class Hang(BaseException):
    """A case that does not end; not an Exception, so that no command can take it for an error of its own."""


@dataclass
class Outcome:
    """What came of a case."""

    name: str
    arguments: list[str]
    exit_code: int
    output: str
    problem: str | None


@dataclass
class Tally:
    """What came of many."""

    cases: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[Outcome] = field(default_factory=list)

    def add(self, kind: str, outcome: Outcome) -> None:
        """Count one."""
        self.cases[kind] += 1
        self.exit_codes[kind, outcome.exit_code] += 1
        if outcome.exit_code:
            self.messages[kind, message_kind(outcome.output)] += 1
        if outcome.problem:
            self.problems.append(outcome)


def run_case(world: World, kind: str, number: int, seed: int) -> Outcome:
    """Make a case and run it.

    Args:
        world: where.
        kind: of `KINDS`.
        number: of the case among its kind.
        seed: of all cases.
    """
    place = world.new_place()
    arguments = KINDS[kind][0](Random(f"{seed}/{kind}/{number}"), place)
    expected = world.snapshot()
    code, output, problem = -1, "", None
    with at(place):
        try:
            with _alarm():
                result = invoke(arguments)
            code, output = result.exit_code, result.output
            problem = _judge(code, output, result.exception)
        except Hang:
            problem = f"does not end within {LONGEST_S} s:\n" + traceback.format_exc(limit=-6)
    found = world.snapshot()
    changed = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
    if changed and problem is None:
        problem = f"changed outside its results: {', '.join(changed[:4])}"
    return Outcome(f"{kind}:{number}", arguments, code, output, problem)


_get_command = cache(typer.testing._get_command)
"""typer makes its command anew for every call of an app, which takes longer than most cases."""


def invoke(arguments: list[str]) -> Result:
    """Run a `lors` command in this process."""
    with mock.patch.object(typer.testing, "_get_command", _get_command):
        return CliRunner().invoke(app, arguments)


def _judge(code: int, output: str, exception: BaseException | None) -> str | None:
    if exception is not None and not isinstance(exception, SystemExit):
        return "escaped the command:\n" + "".join(traceback.format_exception(exception))
    if "Traceback (most recent call last)" in output or code not in FINE:
        return f"exit {code}:\n{output[-3000:]}"
    return f"exit {code} without a message" if code and not output.strip() else None


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    timers = ((signal.ITIMER_PROF, LONGEST_S), (signal.ITIMER_REAL, 3 * LONGEST_S))
    for timer, seconds in timers:
        signal.setitimer(timer, seconds, 1)  # again every second: the first may be lost in a destructor
    try:
        yield
    finally:
        for timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def message_kind(output: str) -> str:
    """The message of an output without what differs from case to case."""
    lines = [line for line in output.splitlines() if "rror" in line or line.startswith(("│", "{"))] or [""]
    text = re.sub(r"'[^']*'|`[^`]*`|\"[^\"]*\"", "…", lines[0])
    return re.sub(r"[^\s:]*[/\\][^\s:]*|-?\d[\w.+-]*", "#", text)[:110]


def fuzz(world: World, cases: int, seed: int, report: Callable[[str], None]) -> Tally:
    """Run so many cases, in the kinds' shares.

    Args:
        world: built.
        cases: how many, at least one a kind.
        seed: of all of them.
        report: takes a line a problem, and a line now and then.
    """
    tally = Tally()
    start_kib, started = peak_kib(), time.monotonic()
    for kind, (_, share) in KINDS.items():
        for number in range(max(1, round(cases * share))):
            outcome = run_case(world, kind, number, seed)
            grown = peak_kib() - start_kib
            if outcome.problem is None and grown * 1024 > MOST_GROWTH:
                outcome.problem, start_kib = f"took {grown / 2**20:.1f} GiB more", peak_kib()
            tally.add(kind, outcome)
            if outcome.problem:
                report(f"PROBLEM {outcome.name} lors {outcome.arguments}\n{outcome.problem}")
            if number % 50 == 49:
                gc.collect()
        report(
            f"{kind}: {tally.cases[kind]} cases, {time.monotonic() - started:.0f} s, peak {peak_kib() / 2**20:.2f} GiB"
        )
    return tally


def peak_kib() -> int:
    """The largest memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def summary(tally: Tally, longest: int) -> str:
    """The counts for people.

    Args:
        tally: of `fuzz`.
        longest: how many messages of each kind to show.
    """
    lines = [f"{'kind':12} {'cases':>6} {'ok':>6} {'2':>6} {'3':>5} {'4':>4} {'5':>4}  distinct messages"]
    for kind, count in tally.cases.items():
        codes = [tally.exit_codes[kind, code] for code in FINE]
        distinct = [message for of, message in tally.messages if of == kind]
        lines.append("{:12} {:6} {:6} {:6} {:5} {:4} {:4}  {}".format(kind, count, *codes, len(distinct)))
    lines.append(f"{sum(tally.cases.values())} cases, {len(tally.messages)} distinct messages, "
                 f"{len(tally.problems)} problems")  # fmt: skip
    for kind in tally.cases:
        mine = Counter({message: count for (of, message), count in tally.messages.items() if of == kind})
        lines += [f"  {kind:12} {count:6} × {message}" for message, count in mine.most_common(longest)]
    return "\n".join(lines)


def main() -> int:
    """The long version, for `make fuzz`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a kind, or one case as kind:number")
    parser.add_argument("--messages", type=int, default=8, help="messages of each kind to show")
    options = parser.parse_args()
    kind, colon, number = (options.only or "").partition(":")
    root = Path(tempfile.mkdtemp(prefix="lors-fuzz-"))
    with alone(root):
        world = World(root)
        world.build()
        if colon:
            outcome = run_case(world, kind, int(number), options.seed)
            print(f"lors {outcome.arguments}\nin {world.place}\n{outcome.output}\n{outcome.problem or 'no problem'}")
            return bool(outcome.problem)
        if kind:
            KINDS_LEFT = {kind: (KINDS[kind][0], 1.0)}
            KINDS.clear()
            KINDS.update(KINDS_LEFT)
        tally = fuzz(world, options.cases, options.seed, lambda line: print(line, flush=True))
    print(summary(tally, options.messages))
    return bool(tally.problems)


if __name__ == "__main__":
    sys.exit(main())
