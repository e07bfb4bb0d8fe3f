"""`lors sweep` as a user sees it: each stage once, what is skipped, what fails, what survives a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forking import signalled
from typer.testing import Result

from lors_cli.errors import ResourceError
from lors_cli.files import hashes, locks, records
from lors_cli.pipeline.plans import StagePlan
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.resolved import resolved_recipe
from lors_cli.sweep import running
from lors_cli.sweep.cells import load_sweep
from lors_cli.sweep.stages import plan_cells

Lors = Callable[..., Result]
SWEEP = Path("sweeps/grid")


def index(folder: Path = SWEEP) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content


def states(folder: Path = SWEEP) -> dict[str, str]:
    return {cell["name"]: cell["status"] for cell in index(folder)["cells"]}


def snapshot(folder: Path = SWEEP) -> dict[str, tuple[int, str]]:
    """Time and hash of every file that a second call must leave alone."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def stages_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really done, in order: `prune`, `tune`, `eval pruned` and the like."""
    seen: list[str] = []
    real = running.run_stage

    def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
        seen.append(f"eval {next(iter(plan.models))}" if plan.stage == "eval" else plan.stage)
        real(plan, data_dir)

    monkeypatch.setattr(running, "run_stage", run_stage)
    return seen


def test_every_stage_is_run_once(at_start: Path, lors: Lors, stages_run: list[str], reports: list[Path]) -> None:
    result = lors("sweep", "grid.yaml")
    assert result.exit_code == 0, result.output
    assert Counter(stages_run) == {
        "eval dense": 1, "prune": 2, "eval pruned": 2, "tune": 4, "eval tuned": 4,
    }  # fmt: skip
    assert stages_run[:5] == ["eval dense", "prune", "eval pruned", "tune", "eval tuned"]
    assert len(list((SWEEP / "stages").iterdir())) == 13
    assert "[13/13]" in result.stderr
    assert result.stdout.count(str(SWEEP) + "\n") == 1
    assert reports == [SWEEP]


def test_the_index_says_where_everything_lies(at_sweep: Path) -> None:
    content = index()
    assert content["name"] == "grid"
    assert content["axes"] == {"prune.method": ["wanda", "magnitude"], "tune.method": ["lors", "sqft"]}
    assert states() == dict.fromkeys(["wanda-lors", "wanda-sqft", "magnitude-lors", "magnitude-sqft"], "done")
    for cell in content["cells"]:
        recipe = load_recipe(Path("tiny.yaml"), [f"{key}={value}" for key, value in cell["overrides"].items()])
        assert recipe.prune is not None
        assert recipe.tune is not None
        assert cell["recipe"] == "tiny"
        assert cell["values"] == {"prune.method": recipe.prune.method, "tune.method": recipe.tune.method}
        assert recipe.tune.learning_rate == (3e-3 if recipe.tune.method == "sqft" else 1e-3)
        for stage, folder in cell["stages"].items():
            record = records.read_record(SWEEP / folder)
            assert record is not None
            assert record.stage == stage
            said = getattr(resolved_recipe(recipe), stage)
            if stage == "tune":
                said = replace(said, data=replace(said.data, packing="separate"))
            assert record.config == hashes.plain(said)
            assert folder == f"stages/{stage}-{record.fingerprint[:12]}"
        for role, folder in cell["models"].items():
            record = records.read_record(SWEEP / folder)
            assert record is not None
            assert list(record.files) == [f"{role}.json", f"texts/{role}.json"]
            assert record.config["models"] == [role]
            assert folder == f"stages/eval-{record.fingerprint[:12]}"
            assert (SWEEP / folder / "samples" / role / "pydoc_choice.jsonl").is_file()
    by_name = {cell["name"]: cell for cell in content["cells"]}
    assert len({cell["models"]["dense"] for cell in content["cells"]}) == 1
    assert by_name["wanda-lors"]["stages"]["prune"] == by_name["wanda-sqft"]["stages"]["prune"]
    assert by_name["wanda-lors"]["stages"]["prune"] != by_name["magnitude-lors"]["stages"]["prune"]


def test_a_cell_has_the_weights_and_scores_of_a_run_alone(at_sweep: Path, lors: Lors) -> None:
    settings = ["tune.max_steps=2", "eval.limit=2", "eval.perplexity_windows=2", "prune.method=wanda"]
    run = lors("run", "tiny.yaml", *settings, "tune.method=sqft", "tune.learning_rate=3e-3")
    assert run.exit_code == 0, run.output
    cell = next(cell for cell in index()["cells"] if cell["name"] == "wanda-sqft")
    for stage, folder in cell["stages"].items():
        name = "model.safetensors"
        assert (SWEEP / folder / name).read_bytes() == (Path("runs/tiny") / stage / name).read_bytes()
    for role, folder in cell["models"].items():
        mine = json.loads((SWEEP / folder / f"{role}.json").read_text())
        alone = json.loads(Path(f"runs/tiny/eval/{role}.json").read_text())
        assert {**mine, "model": None} == {**alone, "model": None}


def test_a_second_call_does_nothing(at_sweep: Path, lors: Lors, stages_run: list[str]) -> None:
    before = snapshot()
    result = lors("sweep", "grid.yaml")
    assert result.exit_code == 0
    assert "Nothing was left to do." in result.stdout
    assert (stages_run, snapshot()) == ([], before)
    assert lors("sweep", SWEEP / "sweep.yaml").exit_code == 0  # the folder's own text names the same sweep
    assert (stages_run, snapshot()) == ([], before)


def test_a_changed_sweep_keeps_what_still_matches(at_sweep: Path, lors: Lors, stages_run: list[str]) -> None:
    text = Path("grid.yaml").read_text()
    Path("grid.yaml").write_text(text.replace("[lors, sqft]", "[sqft, hira]").replace("[wanda, m", "[m"))
    assert lors("sweep", "grid.yaml").exit_code == 0
    assert stages_run == ["tune", "eval tuned"]
    assert states() == {"magnitude-sqft": "done", "magnitude-hira": "done"}
    assert len(list((SWEEP / "stages").iterdir())) == 15  # what no cell needs now is kept
    stages_run.clear()
    Path("grid.yaml").write_text(text)
    assert lors("sweep", "grid.yaml").exit_code == 0
    assert stages_run == []
    assert set(states().values()) == {"done"}


def test_a_new_measurement_is_the_only_one_made(at_sweep: Path, lors: Lors, stages_run: list[str]) -> None:
    before = {path: path.read_bytes() for path in SWEEP.rglob("*.jsonl")}
    shutil.copy("text.jsonl", "more.jsonl")
    result = lors("sweep", "grid.yaml", "eval.perplexity=[text.jsonl, more.jsonl]", "--only", "wanda-lors")
    assert result.exit_code == 0
    assert stages_run == ["eval dense", "eval pruned", "eval tuned"]
    assert result.stderr.count("2 measured earlier in this sweep") == 3
    assert result.stderr.count("1 to score, 2 done before") == 3
    assert {path: path.read_bytes() for path in before} == before
    assert states()["wanda-sqft"] == "done"  # with what it was measured on before
    (sqft,) = (cell for cell in index()["cells"] if cell["name"] == "wanda-sqft")
    assert "eval.perplexity" not in sqft["overrides"]


def test_only_some_cells(at_start: Path, lors: Lors, stages_run: list[str]) -> None:
    assert lors("sweep", "grid.yaml", "--only", "magnitude-lors").exit_code == 0
    assert stages_run == ["eval dense", "prune", "eval pruned", "tune", "eval tuned"]
    assert Counter(states().values()) == {"done": 1, "pending": 3}
    document = json.loads(lors("sweep", "grid.yaml", "--only", "magnitude-*", "--json").stdout)
    assert [(step["stage"], step["cell"]) for step in document["done"]] == [
        ("tune", "magnitude-sqft"), ("eval", "magnitude-sqft"),
    ]  # fmt: skip
    assert [cell["status"] for cell in document["cells"]] == ["pending", "pending", "done", "done"]
    assert set(document["cells"][3]["results"]) == {"dense", "pruned", "tuned"}
    assert set(document["cells"][0]["results"]) == {"dense"}


# What goes wrong ------------------------------------------------------------------------------------------------


def break_rows() -> None:
    """`broken.jsonl`, whose first row is fine and whose second is none."""
    first = Path("rows.jsonl").read_text().splitlines()[0]
    Path("broken.jsonl").write_text(f"{first}\n{{}}\n")


BROKEN_SWEEP = """\
name: grid
recipe: tiny.yaml
set: {tune.max_steps: 2, eval.tasks: [], eval.perplexity_windows: 2}
grid:
  prune.method: [wanda, magnitude]
  tune.data.dataset: [broken.jsonl, rows.jsonl]
"""


def test_a_failed_cell_does_not_stop_the_others(at_start: Path, lors: Lors, stages_run: list[str]) -> None:
    break_rows()
    Path("grid.yaml").write_text(BROKEN_SWEEP)
    result = lors("sweep", "grid.yaml", "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert set(document["failed"]) == {"wanda-broken.jsonl", "magnitude-broken.jsonl"}
    assert document["failed"]["wanda-broken.jsonl"]["exit_code"] == 2
    assert "broken.jsonl" in document["failed"]["wanda-broken.jsonl"]["message"]
    assert [cell["status"] for cell in index()["cells"]] == ["failed", "done", "failed", "done"]
    assert index()["cells"][0]["error"] == document["failed"]["wanda-broken.jsonl"]["message"]
    assert "Traceback" not in result.stderr
    stages_run.clear()
    table = lors("sweep", "grid.yaml", "--only", "*-rows.jsonl")
    assert table.exit_code == 0
    assert "wanda-broken.jsonl (failed)" in table.stdout
    assert stages_run == []
    shutil.copy("rows.jsonl", "broken.jsonl")  # mended: another fingerprint, and the cells go on
    assert lors("sweep", "grid.yaml").exit_code == 0
    assert set(states().values()) == {"done"}


def test_a_shared_stage_fails_once_for_all_its_cells(
    at_start: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = running.run_stage, list[str]()

    def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
        if getattr(plan.config, "method", "") == "wanda":
            tried.append(plan.stage)
            raise ResourceError("no room at https://me:word@mirror", "make some")
        real(plan, data_dir)

    monkeypatch.setattr(running, "run_stage", run_stage)
    result = lors("sweep", "grid.yaml", "eval.tasks=[]")
    assert result.exit_code == 4
    assert [path for path in Path().rglob("*") if path.is_file() and b"me:word" in path.read_bytes()] == []
    assert tried == ["prune"]
    assert result.stderr.count("error: wanda-lors: no room") == 1
    assert states() == {
        "wanda-lors": "failed", "wanda-sqft": "failed", "magnitude-lors": "done", "magnitude-sqft": "done",
    }  # fmt: skip
    assert "2 done, 2 failed" in result.stdout
    (wanda, *_) = json.loads(lors("sweep", "grid.yaml", "eval.tasks=[]", "--status", "--json").stdout)["cells"]
    assert [stage["detail"] for stage in wanda["stages"] if stage["status"] == "failed"] == [
        "no room at https://[hidden]@mirror"
    ]
    monkeypatch.setattr(running, "run_stage", real)
    assert lors("sweep", "grid.yaml", "eval.tasks=[]").exit_code == 0
    assert set(states().values()) == {"done"}
    assert not list(SWEEP.glob("jobs/*.failed.json"))


def test_a_bug_is_told_and_noted(at_start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from lors_cli.cli.app import app

    def run_stage(plan: StagePlan, data_dir: Path | None) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(running, "run_stage", run_stage)
    result = CliRunner().invoke(app, ["sweep", "grid.yaml"])
    assert result.exit_code == 1
    assert "this is a bug in lors: ZeroDivisionError" in result.stderr
    assert index()["cells"][0]["error"] == "ZeroDivisionError: ours"
    assert list(states().values()) == ["failed", "pending", "pending", "pending"]


def test_a_killed_sweep_goes_on_to_the_same_results(at_start: Path, finished_sweep: Path, lors: Lors) -> None:
    whole = snapshot(finished_sweep / SWEEP)
    for before in ("/.work/inputs_0002", "tuned.json"):  # in pruning, and when the last scores are written
        result = signalled(signal.SIGKILL, before, "sweep", "grid.yaml")
        assert result.returncode == -signal.SIGKILL, (before, result.stderr)
        assert states()["wanda-lors"] == "running"
    result = signalled(signal.SIGINT, "checkpoint-2", "sweep", "grid.yaml", "--json")
    assert result.returncode == 130, result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 130
    assert states() == {
        "wanda-lors": "done", "wanda-sqft": "pending", "magnitude-lors": "pending", "magnitude-sqft": "pending",
    }  # fmt: skip
    assert lors("sweep", "grid.yaml").exit_code == 0
    for name, (_, digest) in snapshot().items():
        if name.endswith((".safetensors", ".yaml", "dense.json", "pruned.json", "tuned.json", "sweep.json")):
            assert whole[name][1] == digest, name


def test_a_folder_in_use_is_refused(at_sweep: Path, lors: Lors) -> None:
    with locks.hold(SWEEP):
        result = lors("sweep", "grid.yaml")
    assert result.exit_code == 2
    assert "in use by pid" in result.stderr


def test_others_files_are_not_written_over(at_sweep: Path, lors: Lors) -> None:
    for command, said in (
        (["sweep", "grid.yaml", "--out", "dense"], "other files"),
        (["sweep", "grid.yaml", "--out", "text.jsonl"], "is a file"),
        (["run", "tiny.yaml", "--out", str(SWEEP)], "is a sweep's folder"),
        (["prune", "dense", "--out", str(SWEEP), "method=magnitude"], "is a sweep's folder"),
    ):
        result = lors(*command)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(
    ("changes", "exit_code", "said"),
    [
        (["prune.pattern=2:5"], 2, "no multiple of 5. (cells wanda-lors, wanda-sqft, magnitude-lors and 1 more)"),
        (["model.path=./gone"], 3, "./gone"),
        (["eval.tasks=[arc_eazy]"], 2, "did you mean arc_easy?"),
        (["tune.data.dataset=gone.jsonl"], 3, "gone.jsonl"),
        (["data_dir=/nowhere"], 3, "/nowhere"),
        (["--only", "wanda"], 2, "Did you mean wanda-"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_impossible_cells_are_errors_before_any_work(
    at_start: Path, lors: Lors, changes: list[str], exit_code: int, said: str, dry: list[str]
) -> None:
    result = lors("sweep", "grid.yaml", *changes, *dry)
    assert result.exit_code == exit_code
    assert said in " ".join(result.stderr.split())
    assert not Path("sweeps").exists()


def test_a_rank_that_spp_cannot_have_is_an_error_of_its_cells(at_start: Path, lors: Lors) -> None:
    Path("grid.yaml").write_text("name: g\nrecipe: tiny.yaml\ngrid: {tune.method: [lors, spp], tune.rank: [4, 5]}\n")
    result = lors("sweep", "grid.yaml")
    assert result.exit_code == 2
    assert "ranks that work for this model: 1, 2, 4, 8, 16 (cell spp-rank5)" in " ".join(result.stderr.split())


def test_stages_that_a_recipe_lacks_are_not_in_the_index(at_start: Path, lors: Lors) -> None:
    Path("short.yaml").write_text(
        "name: short\nmodel: {path: dense}\nprune: {method: magnitude}\n"
        "eval: {models: [pruned], tasks: [], perplexity: [text.jsonl], perplexity_windows: 2, perplexity_length: 64}\n"
    )
    Path("s.yaml").write_text("name: s\nrecipe: short.yaml\ngrid: {prune.pattern: [2:4, 4:8]}\n")
    assert lors("sweep", "s.yaml").exit_code == 0
    cells = index(Path("sweeps/s"))["cells"]
    assert [cell["name"] for cell in cells] == ["2of4", "4of8"]
    assert [(list(cell["stages"]), list(cell["models"])) for cell in cells] == [(["prune"], ["pruned"])] * 2


def test_plans_share_folders_by_fingerprint(at_start: Path) -> None:
    sweep = load_sweep(Path("grid.yaml"))
    for plan in plan_cells(sweep.cells, Path("out")):
        assert [stage.stage for stage in plan.plans] == ["eval", "prune", "eval", "tune", "eval"]
        assert [next(iter(stage.models)) for stage in plan.plans if stage.stage == "eval"] == [
            "dense", "pruned", "tuned",
        ]  # fmt: skip
        assert all(stage.folder.name == f"{stage.stage}-{stage.fingerprint[:12]}" for stage in plan.plans)
    assert not Path("out").exists()


def test_a_call_that_fails_or_does_other_cells_keeps_what_is_said_of_a_finished_one(
    at_sweep: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.errors import ResourceError
    from lors_cli.sweep import running

    def refuse(*_: Any) -> None:
        raise ResourceError("no room")

    said = [Path("sweeps/grid", name).read_bytes() for name in ("sweep.json", "sweep.yaml")]
    with monkeypatch.context() as patched:
        patched.setattr(running, "run_stage", refuse)
        assert lors("sweep", "grid.yaml", "eval.limit=1").exit_code == 4
    before = {cell["name"]: cell for cell in json.loads(said[0])["cells"]}
    for cell in index()["cells"]:
        later = cell.pop("unfinished")
        assert (later["status"], later["error"], later["overrides"]["eval.limit"]) == ("failed", "no room", 1)
        assert cell == before[cell["name"]]
    assert lors("sweep", "grid.yaml", "eval.limit=1", "--only", "wanda-lors").exit_code == 0
    after = {cell["name"]: cell for cell in index()["cells"]}
    failed = [name for name, cell in after.items() if cell.pop("unfinished", {}).get("error") == "no room"]
    assert failed == ["wanda-sqft", "magnitude-lors", "magnitude-sqft"]
    assert [name for name in before if after[name] != before[name]] == ["wanda-lors"]
    assert after["wanda-lors"]["overrides"]["eval.limit"] == 1
    assert Path("sweeps/grid/sweep.yaml").read_bytes() == said[1]  # most cells are of it
    assert lors("sweep", "grid.yaml", "eval.limit=1").exit_code == 0
    assert "eval.limit: 1" in Path("sweeps/grid/sweep.yaml").read_text()
    assert not any("unfinished" in cell for cell in index()["cells"])
