"""Chains of kills: a command is started again and again, killed each time, until it comes to its end.

A chain is checked against an unbroken run of the same command: the same results bit for bit, the same files, and no
more work done twice than one block, one checkpoint interval or one piece of evaluation for each kill.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAVE_STEPS = 2
RECIPE = """\
name: chain
model: {{path: {model}}}
data_dir: data
prune:
  method: sparsegpt
  pattern: 2:4
  reconstruct_epochs: 1
  calibration: {{dataset: text.jsonl, num_samples: 8, sequence_length: 64, batch_size: 4}}
tune:
  rank: 4
  data: {{dataset: rows.jsonl, max_length: 128}}
  learning_rate: 1e-3
  max_steps: 7
  batch_size: 4
  save_steps: {save_steps}
pack: {{}}
eval:
  tasks: [arc_easy, openbookqa]
  limit: 2
  perplexity: [text.jsonl]
  perplexity_windows: 2
  perplexity_length: 64
"""
SWEEP = """\
name: grid
recipe: chain.yaml
set: {tune.max_steps: 3, eval.tasks: [openbookqa], prune.method: wanda}
grid: {tune.method: [lors, sqft]}
"""
AREAS = (".work", ".staging", "checkpoints", ".pieces", "samples", ".scratch")
VOLATILE = {"elapsed_s", "environment", "phases_s", "tokens_per_s", "finished_at", "last_call", "working_directory"}


def write_workplace(folder: Path, data: Path) -> None:
    """Recipe, sweep and texts for a chain.

    Args:
        folder: made.
        data: the shared data.
    """
    folder.mkdir(parents=True)
    for source, name in (("slimpajama_like", "text"), ("alpaca", "rows")):
        rows = first_rows(data / source / "train.jsonl.gz", 40)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    for task in ("arc_easy", "openbookqa"):
        for path in sorted((data / "eval" / task).glob("*.jsonl.gz")):
            cut = folder / "data" / "eval" / task / path.name
            cut.parent.mkdir(parents=True, exist_ok=True)
            cut.write_bytes(gzip.compress(first_rows(path, 8).encode()))
    text = RECIPE.format(model=data / "models" / "stories260k", save_steps=SAVE_STEPS)
    (folder / "chain.yaml").write_text(text)
    (folder / "grid.yaml").write_text(SWEEP)


def first_rows(path: Path, number: int) -> str:
    """The first lines of a compressed text."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return "".join(itertools.islice(file, number))


class Server:
    """A `server.py` process, or that of another program like it, which may have an environment of its own."""

    def __init__(self, program: Path | None = None, env: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, program or Path(__file__).with_name("server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        return json.loads(line)

    def run(self, folder: Path, arguments: Sequence[str], **wanted: Any) -> Process:
        """Run one command in `folder`; `wanted` as for `server.run`."""
        assert self._process.stdin is not None
        trace, output = folder.with_suffix(".trace"), folder.with_suffix(".output")
        trace.unlink(missing_ok=True)
        job = {"arguments": list(arguments), "folder": str(folder), "trace": str(trace), "output": str(output)}
        print(json.dumps({**job, **wanted}), file=self._process.stdin, flush=True)
        answer = self._answer()
        lines = [line.split("\t", 1) for line in trace.read_text().splitlines()]
        return Process(answer["code"], answer["elapsed_s"], lines, output.read_text())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@contextmanager
def serving() -> Iterator[Server]:
    """A server for a while."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


@dataclass
class Process:
    """A command that has ended.

    Args:
        code: its exit code, -9 when it was killed.
        elapsed_s: how long it ran.
        lines: (kind, what) of its trace.
        output: what it wrote to stdout and stderr.
    """

    code: int
    elapsed_s: float
    lines: list[list[str]]
    output: str

    def of(self, kind: str) -> list[str]:
        """What its trace has of a kind."""
        return [line[1] for line in self.lines if line[0] == kind]


def place(key: str) -> tuple[str, str, str]:
    """The stage, part of its folder and kind of a moment, “before rename runs/chain/tune/checkpoints/…”."""
    kind, path = " ".join(key.split(" ")[:2]), key.split(" ", 2)[2]
    parts = path.split("/")[2:]
    if parts[:1] == ["stages"]:
        parts = [parts[1].split("-")[0], *parts[2:]] if len(parts) > 1 else []
    stage = parts[0] if parts and parts[0] in ("prune", "tune", "pack", "eval") else "run"
    area = next((part for part in parts if part in AREAS), "results" if stage != "run" else "top")
    return stage, area, kind


def draw_moments(moments: Sequence[str], number: int, rng: random.Random) -> list[int]:
    """Which of an unbroken run's moments to kill at: every sort of them in turn, one of its moments by chance.

    Args:
        moments: keys, in order.
        number: of them.
        rng: decides.

    Returns:
        Indices, in no order.
    """
    sorts: dict[tuple[str, str, str], list[int]] = {}
    for index, key in enumerate(moments):
        sorts.setdefault(place(key), []).append(index)
    drawn: list[int] = []
    while len(drawn) < number:
        order = sorted(sorts)
        rng.shuffle(order)
        drawn += [rng.choice(sorts[sort]) for sort in order]
    return drawn[:number]


@dataclass
class Chain:
    """What came of one chain."""

    processes: list[Process] = field(default_factory=list)
    kills: list[tuple[str, str, str]] = field(default_factory=list)
    """Stage, part and kind of each."""
    repeated: list[Counter[str]] = field(default_factory=list)
    """After each kill: finished units of work that were done once more, by sort."""


def run_chain(
    server: Server, folder: Path, arguments: Sequence[str], *, moments: Sequence[str] = (), chosen: Sequence[int] = (),
    times: Sequence[float] = (),
) -> Chain:  # fmt: skip
    """Start a command until it ends, killed at chosen moments or after given times on the way.

    Args:
        server: that runs it.
        folder: to work in.
        arguments: of `lors`.
        moments: of an unbroken run.
        chosen: indices into them.
        times: in seconds, for kills that no moment is chosen for.
    """
    chain = Chain()
    wanted: list[dict[str, Any]] = []
    before = -1
    for index in sorted(chosen):
        count = list(moments[before + 1 : index + 1]).count(moments[index])
        if count:
            wanted.append({"moment": {"key": moments[index], "count": count}})
        before = index
    wanted += [{"after_s": after_s} for after_s in times]
    done = Counter[str]()
    for kill in [*wanted, {}]:
        process = server.run(folder, arguments, **kill)
        chain.processes.append(process)
        work = Counter(process.of("work"))
        if chain.kills:
            chain.repeated.append(Counter(unit.split(" ")[0] for unit in work if unit in done))
        done.update(work)
        if process.code != -9:
            break
        told = process.of("kill")
        last = (process.of("moment") or ["after time runs/x"])[-1]
        chain.kills.append(place(told[0]) if told else (*place(last)[:2], "after some time"))
    return chain


def too_much(repeated: Counter[str]) -> bool:
    """Whether a kill cost more than a block, a checkpoint interval (with the start before it) or a piece."""
    sorts = {"step" if sort == "start" else sort for sort in repeated}
    allowed = {"block": 1, "step": SAVE_STEPS, "piece": 1, "start": 1}
    return len(sorts) > 1 or any(count > allowed[sort] for sort, count in repeated.items())


def results(folder: Path) -> dict[str, Any]:
    """What must be the same however often a run was killed: file by file, None where only the name must be.

    Args:
        folder: that the command worked in.
    """
    return {str(path.relative_to(folder)): _result(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _result(path: Path) -> Any:
    if path.parent.parent.name == "checkpoints" or path.name in ("README.md", ".lock") or path.suffix == ".png":
        return None
    if path.name == "log.jsonl":
        return [_steady(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("stage.json", "manifest.json") or path.parent.parent.name == ".pieces":
        content = _steady(json.loads(path.read_text()))
        files = content.get("files", {})
        return {**content, "files": {name: files[name] for name in files if name.endswith(".safetensors")}}
    return None if path.name.startswith("report.") else path.read_bytes()


def _steady(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _steady(value) for key, value in content.items() if key not in VOLATILE}
    return [_steady(item) for item in content] if isinstance(content, list) else content


def compare(whole: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """How the results of a chain differ from those of an unbroken run.

    Args:
        whole: of the unbroken run.
        mine: of the chain.
    """
    lacking = [f"lacks {name}" for name in sorted(whole.keys() - mine.keys())]
    more = [f"left over: {name}" for name in sorted(mine.keys() - whole.keys())]
    return (
        lacking
        + more
        + [f"differs: {name}" for name in sorted(whole.keys() & mine.keys()) if whole[name] != mine[name]]
    )


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def summary(chains: dict[str, list[Chain]]) -> str:
    """Kills by stage and kind, and what they cost, as a table of text.

    Args:
        chains: by the name of what was run.
    """
    every = [chain for group in chains.values() for chain in group]
    kills = Counter(kill for chain in every for kill in chain.kills)
    stages = ("run", "prune", "tune", "pack", "eval")
    kinds = sorted({kind for _, _, kind in kills})
    lines = [f"{'killed':<18}" + "".join(f"{stage:>8}" for stage in stages)]
    for kind in kinds:
        counts = [sum(n for (s, _, k), n in kills.items() if (s, k) == (stage, kind)) for stage in stages]
        lines.append(f"{kind:<18}" + "".join(f"{count:>8}" for count in counts))
    lines.append(
        f"{'in all':<18}" + "".join(f"{sum(n for (s, _, _), n in kills.items() if s == stage):>8}" for stage in stages)
    )
    parts = Counter(f"{stage}/{area}" for stage, area, _ in kills.elements())
    lines.append("where: " + ", ".join(f"{name} {count}" for name, count in sorted(parts.items())))
    for name, group in chains.items():
        count = sum(len(chain.kills) for chain in group)
        lines.append(f"{name}: {count} kills in {len(group)} chains")
    repeated = sum((counter for chain in every for counter in chain.repeated), Counter[str]())
    worst = {sort: max(counter[sort] for chain in every for counter in chain.repeated) for sort in repeated}
    done = ", ".join(f"{sort} {count} (at most {worst[sort]} a kill)" for sort, count in sorted(repeated.items()))
    lines.append(f"{sum(kills.values())} kills; finished work done again: {done or 'none'}")
    return "\n".join(lines)
