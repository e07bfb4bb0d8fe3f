"""The benchmark of quality over core-hours: what its plan measures next, and what it never looks at."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cells
import frontier
from frontier import Trial

BEST_RATES = {"lors": 3e-3, "lors-exact": 1e-3, "sqft": 1e-4, "hira": 1e-1, "spp": 1e-2}


def loss_of(trial: Trial) -> float:
    """Lowest at the method's own rate, on admm and both texts with a teacher; HiRA is ahead of all, LoRS behind."""
    if trial.method == "none":
        return {"reconstructed": 4.0, "reconstructed-2": 4.1, "admm": 4.2}.get(trial.start, 4.3)
    away = abs(math.log(trial.rate / BEST_RATES[trial.method]))
    worse = {"hira": 0.0, "sqft": 0.1, "spp": 0.2, "lors-exact": 0.3, "lors": 0.4}[trial.method]
    away += 0.05 * (trial.start != "admm")
    return 3 + away + worse + 0.2 * (trial.text != "both") + 0.1 * (trial.loss != "teacher") - trial.steps / 1e4


def run_to_the_end(loss: Callable[[Trial], float] = loss_of) -> dict[str, Trial]:
    """Every trial that the plan wants, one after the other as they become wanted."""
    found: frontier.Found = {}
    order: dict[str, Trial] = {}
    while waiting := frontier.missing(frontier.plan(found), found):
        trial = waiting[0]
        order[trial.name] = trial
        found[trial.name] = {"web": math.exp(loss(trial)), "responses": loss(trial), "wikitext2": -len(order)}
    return order


def test_rates_are_searched_until_the_best_is_not_at_the_edge() -> None:
    order = list(run_to_the_end().values())
    tried = {method: {trial.rate for trial in order if trial.method == method} for method in BEST_RATES}
    assert tried["lors"] == {3e-4, 1e-3, 3e-3, 1e-2}
    assert tried["lors-exact"] == {3e-4, 1e-3, 3e-3}
    assert tried["sqft"] == {1e-4, 3e-4, 1e-3}  # 1e-4 is the grid's end
    assert tried["hira"] == {3e-3, 1e-2, 3e-2, 1e-1}
    assert order[0] == Trial(frontier.FIRST_START)


def test_short_trials_choose_text_and_loss_and_few_are_run_long() -> None:
    order = run_to_the_end().values()
    texts = [
        trial for trial in order if trial.steps == frontier.SHORT and (trial.text, trial.loss) != ("web", "labels")
    ]
    assert {trial.method for trial in texts} == {"hira"}
    assert len(texts) == 3 * 2 - 1
    long = [trial for trial in order if trial.steps > frontier.SHORT]
    *leaders, last = long
    assert {(trial.start, trial.steps) for trial in leaders} == {("reconstructed", frontier.LONG["reconstructed"])}
    assert {(trial.text, trial.loss) for trial in leaders} == {("both", "teacher")}
    assert [(trial.method, trial.seed) for trial in leaders] == [
        (method, seed) for seed in (0, 1) for method in ("hira", "sqft", "lors-exact")]  # fmt: skip
    assert (last.method, (last.start, last.steps), last.seed) == ("hira", frontier.FULL, 0)


def test_a_run_that_broke_is_never_the_best() -> None:
    assert frontier.objective({"broke": True}) == math.inf
    trials = {1e-3: {"broke": True}, 3e-3: {"web": 30.0, "responses": 3.0}, 3e-4: {"web": 40.0, "responses": 3.0},
              1e-2: {"web": 50.0, "responses": 3.0}}  # fmt: skip
    found = {
        Trial(frontier.FIRST_START, "lors", rate=rate, steps=frontier.SHORT).name: row for rate, row in trials.items()
    }
    _, best = frontier.search("lors", found)
    assert best is not None
    assert best.rate == 3e-3


def test_names_are_read_back() -> None:
    for trial in run_to_the_end().values():
        assert Trial.of(trial.name) == trial


def test_tasks_are_wanted_for_starts_and_long_trials_that_are_there() -> None:
    start = Trial("reconstructed")
    assert frontier.names({}) == [trial.name for trial in frontier.plan({})]
    assert f"tasks-{start.name}" in frontier.names({start.name: {"web": 30.0, "responses": 3.0}})


WRITE = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
import cells
if sys.argv[1] == "bad":
    sys.exit(3)
cells.Cells(Path({work!r}), ()).finish(sys.argv[1], {{"value": 7}})
"""


def test_cells_run_once_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    program = WRITE.format(benchmarks=str(Path(cells.__file__).parent), work=str(tmp_path))
    bench = cells.Cells(tmp_path, (sys.executable, "-c", program))
    assert not bench.run(lambda found: ["bad", "a", *(["b"] if "a" in found else [])], jobs=1)
    found = bench.found()
    assert {name: figures["value"] for name, figures in found.items()} == {"a": 7, "b": 7}
    written = bench.file("a").stat().st_mtime_ns
    assert bench.run(lambda found: ["a", "b"], jobs=2)
    assert bench.file("a").stat().st_mtime_ns == written


def test_seconds_of_a_broken_run_are_counted_too(tmp_path: Path) -> None:
    counted = tmp_path / "seconds.json"
    cells.lors("--version", counted=counted)
    once = cells.seconds_of(counted)
    assert once > 0
    cells.lors("--version", counted=counted)
    assert cells.seconds_of(counted) > once
