"""SIGKILL at moments drawn by chance: the same command goes on each time, and ends as if nothing had happened.

A few kills by default; `make faults KILLS=80 SEED=1` makes many and prints what they hit and what they cost.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from chains import (
    Chain,
    Process,
    Server,
    compare,
    copied,
    draw_moments,
    results,
    run_chain,
    summary,
    too_much,
)  # fmt: skip

KILLS = int(os.environ.get("LORS_KILLS", "6"))
SEED = int(os.environ.get("LORS_KILLS_SEED", "0"))
LONGEST_CHAIN = 6
RUN = ("run", "chain.yaml")
OTHER = ("run", "chain.yaml", "prune.method=wanda", "tune.rank=2", "eval.models=[tuned]")
SWEEP = ("sweep", "grid.yaml")


def unbroken(server: Server, folder: Path, arguments: tuple[str, ...]) -> Process:
    process = server.run(folder, arguments)
    assert process.code == 0, process.output
    return process


def shares(kills: int) -> dict[str, int]:
    """How many kills each sort of chain gets."""
    few = kills < 12
    by_time, sweep, over = 0 if few else kills // 6, 0 if few else kills // 6, kills // 3
    found = {"moments": kills - by_time - sweep - over, "times": by_time, "over an earlier run": over, "sweep": sweep}
    return {name: number for name, number in found.items() if number}


def test_killed_runs_end_as_if_nothing_had_happened(
    server: Server, bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(SEED)
    chains: dict[str, list[Chain]] = {}
    problems: list[str] = []
    for name, number in shares(KILLS).items():
        start, whole, arguments = bench / "start", bench / f"whole {name}", SWEEP if name == "sweep" else RUN
        if name == "over an earlier run":
            start = copied(start, bench / "earlier")
            unbroken(server, start, OTHER)
        if name != "times":  # of the same run as “moments”
            reference = unbroken(server, copied(start, whole), arguments)
            expected, moments = results(whole), reference.of("moment")
        group = chains.setdefault(name, [])
        pending = draw_moments(moments, number, rng)
        while (left := number - sum(len(chain.kills) for chain in group)) > 0:
            size = min(left, LONGEST_CHAIN)
            folder = copied(start, bench / "chain")
            if name == "times":
                times = [rng.uniform(0.2, 0.6 * reference.elapsed_s) for _ in range(size)]
                chain = run_chain(server, folder, arguments, times=times)
            else:
                chosen, pending = pending[:size], pending[size:] or draw_moments(moments, number, rng)
                chain = run_chain(server, folder, arguments, moments=moments, chosen=chosen)
            group.append(chain)
            problems += [f"{name} {len(group)}: {text}" for text in verdict(chain, expected, folder)]
            if KILLS >= 12:
                with capsys.disabled():
                    print(f"\n{name} {len(group)}: {len(chain.kills)} kills, {len(problems)} problems so far", end="")
    with capsys.disabled():
        print(f"\n{summary(chains)}")
    assert not problems, "\n".join(problems)


def verdict(chain: Chain, expected: dict[str, object], folder: Path) -> list[str]:
    """What is wrong after a chain."""
    last = chain.processes[-1]
    if last.code != 0:
        return [f"exit code {last.code} after {chain.kills}:\n{last.output}"]
    found = [f"{dict(counter)} done again after {kill}"
             for kill, counter in zip(chain.kills, chain.repeated, strict=True) if too_much(counter)]  # fmt: skip
    found += [f"{text} after {chain.kills}" for text in compare(expected, results(folder))]
    bugs = [process.output for process in chain.processes if "Traceback" in process.output]
    return found + bugs
