"""`lors run` as a user sees it: what is done, what is skipped, what survives a kill, a Ctrl-C and a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import signalled
from typer.testing import Result

from lors_cli.errors import UsageError
from lors_cli.files import locks
from lors_cli.pipeline import resources
from lors_cli.pipeline.folders import guard_out

Lors = Callable[..., Result]
RUN = Path("runs/tiny")
MAY_CHANGE = {".lock", "report.md", "manifest.json", "log.jsonl"}


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and hash of every file that a second run must leave alone."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MAY_CHANGE and path.parent.name != "figures"
    }


def weights(run: Path) -> dict[str, bytes]:
    return {stage: (run / stage / "model.safetensors").read_bytes() for stage in ("prune", "tune")}


def statuses(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return {stage["stage"]: stage["status"] for stage in json.loads(result.stdout)["stages"]}


def pieces(folder: Path = RUN) -> dict[str, int]:
    """Every stored measurement and when it was written."""
    found = (folder / "eval" / ".pieces").rglob("*.json")
    return {f"{path.parent.name}/{path.stem}": path.stat().st_mtime_ns for path in found}


def test_a_run_makes_every_stage(at_finished: Path) -> None:
    for stage in ("prune", "tune", "eval"):
        assert json.loads((RUN / stage / "stage.json").read_text())["stage"] == stage
    scores = json.loads((RUN / "eval" / "tuned.json").read_text())
    assert scores["tasks"]["pydoc_choice"]["num_samples"] == 3
    assert scores["perplexity"]["text.jsonl"]["tokens"] > 0
    assert (RUN / "report.md").is_file()
    assert [stage["stage"] for stage in json.loads((RUN / "manifest.json").read_text())["stages"]] == [
        "prune", "tune", "eval",
    ]  # fmt: skip


def test_a_second_run_does_nothing(at_finished: Path, lors: Lors) -> None:
    before = snapshot(RUN)
    result = lors("run", "tiny.yaml")
    assert result.exit_code == 0
    assert "nothing was done" in result.stdout
    assert snapshot(RUN) == before


def test_the_runs_own_recipe_names_the_same_run(at_finished: Path, lors: Lors) -> None:
    assert set(statuses(lors("run", RUN / "recipe.yaml", "--json")).values()) == {"skipped"}


def test_changing_tune_keeps_prune_and_scores_only_the_tuned_model(at_finished: Path, lors: Lors) -> None:
    before, measured = snapshot(RUN / "prune"), pieces()
    result = lors("run", "tiny.yaml", "tune.rank=2", "--json")
    assert statuses(result) == {"prune": "skipped", "tune": "done", "eval": "done"}
    assert snapshot(RUN / "prune") == before
    assert {name.split("/")[0] for name, when in pieces().items() if measured[name] != when} == {"tuned"}
    assert json.loads((RUN / "tune" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_changing_prune_does_everything_after_it_again(at_finished: Path, lors: Lors) -> None:
    measured = pieces()
    assert statuses(lors("run", "tiny.yaml", "prune.method=wanda", "--json")) == {
        "prune": "done", "tune": "done", "eval": "done",
    }  # fmt: skip
    changed = {name.split("/")[0] for name, when in pieces().items() if measured[name] != when}
    assert changed == {"pruned", "tuned"}  # the dense model is what it was


def test_changing_the_limit_changes_eval_only(at_finished: Path, lors: Lors) -> None:
    measured = pieces()
    result = lors("run", "tiny.yaml", "eval.limit=2", "--json")
    assert statuses(result) == {"prune": "skipped", "tune": "skipped", "eval": "done"}
    assert {name.split("/")[1] for name, when in pieces().items() if measured[name] != when} == {"pydoc_choice"}


def test_a_new_measurement_is_the_only_one_made(at_finished: Path, lors: Lors) -> None:
    shutil.copy("text.jsonl", "more.jsonl")
    measured = pieces()
    result = lors("run", "tiny.yaml", "eval.perplexity=[text.jsonl, more.jsonl]", "--json")
    assert statuses(result)["eval"] == "done"
    assert {name: when for name, when in pieces().items() if name in measured} == measured
    assert len(pieces()) == len(measured) + 3


def test_until_stops_and_from_goes_on(at_workshop: Path, lors: Lors) -> None:
    result = lors("run", "tiny.yaml", "prune.method=magnitude", "--until", "prune", "--json")
    assert statuses(result) == {"prune": "done"}
    assert json.loads(result.stdout)["results"] == {}
    assert not (RUN / "tune").exists()
    result = lors("run", "tiny.yaml", "prune.method=magnitude", "--from", "tune", "--until", "tune", "--json")
    assert statuses(result) == {"tune": "done"}


def test_results_of_other_settings_are_not_shown(at_finished: Path, lors: Lors) -> None:
    result = lors("run", "tiny.yaml", "prune.method=magnitude", "--until", "prune", "--json")
    assert json.loads(result.stdout)["results"] == {}
    report = (RUN / "report.md").read_text()
    assert "magnitude" in report
    assert "tuned with" not in report
    assert "## Results" not in report
    assert not (RUN / "figures" / "loss.png").exists()
    assert lors("report", RUN).exit_code == 0
    assert (RUN / "report.md").read_text() == report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "tune", "prune.method=wanda"], "prune is not finished"),
        (["--from", "tune", "--until", "prune"], "comes after"),
        (["--from", "tunee"], "has only prune, tune, eval"),
        (["--until", "report"], "has only prune, tune, eval"),
        (["--force", "tun"], "not among prune, tune, eval"),
        (["--force", "prune", "--from", "tune"], "not among tune, eval"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_wrong_stage_options_change_nothing(
    at_finished: Path, lors: Lors, arguments: list[str], said: str, dry: list[str]
) -> None:
    before = snapshot(RUN)
    result = lors("run", "tiny.yaml", *arguments, *dry)
    assert result.exit_code == 2
    assert said in result.stderr
    assert snapshot(RUN) == before


def test_force_does_a_stage_again_with_the_same_weights(at_finished: Path, lors: Lors) -> None:
    before, when = weights(RUN), snapshot(RUN)
    assert statuses(lors("run", "tiny.yaml", "--force", "tune", "--json")) == {
        "prune": "skipped", "tune": "done", "eval": "skipped",
    }  # fmt: skip
    assert weights(RUN) == before
    assert snapshot(RUN)["tune/model.safetensors"][0] != when["tune/model.safetensors"][0]
    forced = lors("run", "tiny.yaml", "eval.models=[dense,tuned]", "--force", "eval", "--json")
    assert statuses(forced)["eval"] == "done"
    left = {path.name for path in (RUN / "eval").iterdir()} - {".lock"}
    assert left == {"dense.json", "tuned.json", "samples", "texts", ".pieces", "stage.json"}


def test_a_dry_run_writes_nothing(at_workshop: Path, lors: Lors) -> None:
    before = snapshot(at_workshop)
    result = lors("run", "tiny.yaml", "--dry-run")
    assert result.exit_code == 0
    for word in ("1. prune: sparsegpt 2:4", "2. tune: lors rank 4", "3. eval:", "not done yet", "of memory"):
        assert word in result.stdout
    document = json.loads(lors("run", "tiny.yaml", "--dry-run", "--json").stdout)
    assert [stage["status"] for stage in document["stages"]] == ["run", "run", "run"]
    assert all(stage["peak_memory_bytes"] > 0 and stage["disk_bytes"] > 0 for stage in document["stages"])
    shared = ("prune.reconstruct_epochs=1", "--nproc", "3", "--dry-run", "--json")
    document = json.loads(lors("run", "tiny.yaml", *shared).stdout)
    prune, tune, _ = (stage["estimate"] for stage in document["stages"])
    assert prune.endswith("; memory for each of 3 processes")
    assert tune.endswith("; memory for each of 3 processes, not compared with what is free")
    assert [trouble["message"] for trouble in document["in_the_way"]] == [
        "reconstruct_batch_size: steps of 1 cannot be shared by 3 processes.",
        "batch_size: 4 samples a step cannot be shared by 3 processes.",
    ]
    assert snapshot(at_workshop) == before
    assert not Path("runs").exists()


def test_a_dry_run_tells_what_is_done(at_finished: Path, lors: Lors) -> None:
    def plan(*arguments: str) -> list[str]:
        document = json.loads(lors("run", "tiny.yaml", *arguments, "--dry-run", "--json").stdout)
        return [stage["status"] for stage in document["stages"]]

    assert plan() == ["done", "done", "done"]
    assert plan("tune.rank=2") == ["done", "run", "resume"]
    assert plan("--force", "prune") == ["run", "done", "done"]
    assert plan("--from", "tune") == ["done", "done"]


def test_the_large_recipe_is_planned_without_a_network(at_workshop: Path, lors: Lors) -> None:
    document = json.loads(lors("run", "llama3-8b-2of4", "--dry-run", "--json").stdout)
    peaks = {stage["stage"]: stage["peak_memory_bytes"] for stage in document["stages"]}
    assert peaks["prune"] < 14e9 < 16e9 < peaks["tune"]  # pruning holds one block, tuning the whole model
    assert document["stages"][1]["disk_bytes"] > 16e9
    assert not Path("runs").exists()


# Broken off -----------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(at_workshop: Path, finished_workshop: Path, lors: Lors) -> None:
    kept: dict[str, tuple[int, str]] = {}
    for before, finished in (
        ("/.work/inputs_0002", []),  # in pruning, after the first block
        ("prune/stage.json", []),  # while publishing
        ("checkpoint-4", ["prune"]),  # in tuning, after the first checkpoint
        ("tune/model.safetensors", ["prune"]),
        (".pieces/tuned", ["prune", "tune"]),  # in evaluation
    ):
        result = signalled(signal.SIGKILL, before, "run", "tiny.yaml")
        assert result.returncode == -signal.SIGKILL, (before, result.stderr)
        done = [stage for stage in ("prune", "tune") if (RUN / stage / "stage.json").is_file()]
        assert done == finished, before
        now = snapshot(RUN)
        assert {name: now[name] for name in kept} == kept, before
        kept = {name: value for name, value in now.items() if name.split("/")[0] in done and "checkpoints" not in name}
    measured = pieces()
    assert statuses(lors("run", "tiny.yaml", "--json")) == {"prune": "skipped", "tune": "skipped", "eval": "done"}
    assert {name: pieces()[name] for name in measured} == measured
    assert weights(RUN) == weights(finished_workshop / RUN)
    for role in ("dense", "pruned", "tuned"):
        name = RUN / "eval" / f"{role}.json"
        assert name.read_bytes() == (finished_workshop / name).read_bytes()
    assert lors("run", "tiny.yaml").stdout.count("finished earlier") == 3


def test_an_interrupted_run_says_so_once_and_goes_on(at_finished: Path, finished_workshop: Path, lors: Lors) -> None:
    shutil.rmtree(RUN / "tune")
    result = signalled(signal.SIGINT, "checkpoint-4", "run", "tiny.yaml", "--json")
    assert result.returncode == 130
    assert result.stderr.count("interrupted") == 1
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 130
    plan = json.loads(lors("run", "tiny.yaml", "--dry-run", "--json").stdout)["stages"]
    assert [stage["status"] for stage in plan][:2] == ["done", "resume"]
    result = lors("run", "tiny.yaml", "--force", "tune")  # which may be what was killed: it does not begin anew
    assert result.exit_code == 0
    assert "resuming after step" in result.stderr
    assert weights(RUN) == weights(finished_workshop / RUN)


def test_a_schedulers_signal_ends_every_stage_as_a_ctrl_c_does(
    at_workshop: Path, finished_workshop: Path, lors: Lors
) -> None:
    for number, before, finished in (
        (signal.SIGTERM, "/.work/inputs_0002", []),
        (signal.SIGTERM, "checkpoint-4", ["prune"]),
        (signal.SIGUSR1, ".pieces/tuned", ["prune", "tune"]),
    ):
        result = signalled(number, before, "run", "tiny.yaml")
        assert result.returncode == 130, (before, result.stderr)
        assert result.stderr.count(f"error: stopped by {number.name}; what was finished is kept.") == 1
        assert "Traceback" not in result.stderr
        assert [stage for stage in ("prune", "tune") if (RUN / stage / "stage.json").is_file()] == finished
        plan = json.loads(lors("run", "tiny.yaml", "--dry-run", "--json").stdout)["stages"]
        assert plan[len(finished)]["status"] == "resume"
    assert lors("run", "tiny.yaml").exit_code == 0
    assert weights(RUN) == weights(finished_workshop / RUN)


# The disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_too_small_a_disk_is_refused_beforehand(at_workshop: Path, small_disk: Path, lors: Lors) -> None:
    result = lors("run", "tiny.yaml", "--out", small_disk / "run")
    assert result.exit_code == 4
    assert "prune needs about" in result.stderr
    assert not (small_disk / "run" / "prune").exists()


def test_a_full_disk_keeps_what_is_finished(
    at_workshop: Path, finished_workshop: Path, small_disk: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_disk", lambda folder: 1 << 40)  # as when another program fills it meanwhile
    run, filler = small_disk / "run", small_disk / "filler"
    for stage, left in (("prune", 60_000), ("tune", 12_288), ("eval", 8_192)):
        before = snapshot(run) if run.exists() else {}
        filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - left)))
        result = lors("run", "tiny.yaml", "--out", run, "--until", stage)
        assert result.exit_code == 4, (stage, result.output)
        assert result.stderr.count("error:") == 1
        assert "disk is full" in result.stderr
        assert not (run / stage / "stage.json").exists()
        now = snapshot(run)
        assert {name: now[name] for name in before} == before
        filler.unlink()
        result = lors("run", "tiny.yaml", "--out", run, "--until", stage)
        assert result.exit_code == 0, (stage, result.output)
    assert weights(run) == weights(finished_workshop / RUN)


def test_a_disk_that_fills_within_a_training_checkpoint(
    at_finished: Path, small_disk: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_disk", lambda folder: 1 << 40)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 60_000))
    flags = ("--dataset", "rows.jsonl", "--rank", "4", "--max-steps", "2", "--max-length", "256")
    result = lors("tune", RUN / "prune", "--out", small_disk / "t", *flags, "save_steps=1")
    assert result.exit_code == 4
    assert "disk is full" in result.stderr


def test_a_read_only_folder_is_a_usage_error(at_workshop: Path, small_disk: Path, lors: Lors) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for command in (
        ["run", "tiny.yaml"], ["prune", "dense", "method=magnitude"],
        ["eval", "dense", "--tasks", "", "--perplexity", "text.jsonl"],
    ):  # fmt: skip
        result = lors(*command, "--out", small_disk / "x")
        assert result.exit_code == 2, result.output
        assert str(small_disk) in result.stderr


# Where results may go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "stage", "said"),
    [
        ("text.jsonl", "run", "is a file"),
        ("text.jsonl/below", "prune", "text.jsonl is a file"),
        ("dense/..", "run", "other files"),
        ("dense", "prune", "model's own folder"),
        ("runs/tiny", "prune", "run's folder"),
        ("runs/tiny/tune", "prune", "results of tune"),
        ("runs/tiny/prune", "merge", "results of prune"),
        ("runs/tiny/prune", "run", "results of prune"),
    ],
)
def test_others_files_are_not_written_over(at_finished: Path, out: str, stage: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        guard_out(Path(out), stage, ["dense"])


def test_ones_own_folders_are_taken(at_finished: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places: list[tuple[Any, str]] = [
        (empty, "prune"), (tmp_path / "new", "run"), (RUN, "run"), (RUN / "prune", "prune"), (RUN / "eval", "eval"),
    ]  # fmt: skip
    for out, stage in places:
        guard_out(Path(out), stage, ["dense"])


def test_a_folder_in_use_is_refused(at_finished: Path, lors: Lors) -> None:
    with locks.hold(RUN):
        result = lors("run", "tiny.yaml")
    assert result.exit_code == 2
    assert f"pid {os.getpid()}" in result.stderr


def test_a_folder_whose_first_file_was_cut_off_is_taken(tmp_path: Path) -> None:
    for name, stage in ((".recipe.yaml.partial", "run"), (".sweep.yaml.partial", "sweep"), (".x.partial", "prune")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / name).touch()
        guard_out(tmp_path / stage, stage)
    (tmp_path / "run" / "thesis.partial").touch()
    with pytest.raises(UsageError, match="other files"):
        guard_out(tmp_path / "run", "run")


def test_a_stage_of_a_run_that_is_in_use_is_refused(at_finished: Path, lors: Lors) -> None:
    with locks.hold(RUN / "tune"):
        result = lors("run", "tiny.yaml", "--force", "tune")
        assert result.exit_code == 2
        assert f"{RUN / 'tune'} is in use by pid {os.getpid()}" in result.stderr
        result = lors("tune", RUN / "prune", "--out", RUN / "tune", "--dataset", "rows.jsonl")
        assert result.exit_code == 2
        assert "is in use by pid" in result.stderr


def test_a_broken_piece_of_scores_is_scored_again(at_finished: Path, lors: Lors) -> None:
    before = (RUN / "eval" / "pruned.json").read_bytes()
    (piece,) = (RUN / "eval" / ".pieces" / "pruned").glob("perplexity-*.json")
    content = json.loads(piece.read_text())
    del content["result"]["value"]
    piece.write_text(json.dumps(content))
    (RUN / "eval" / "stage.json").unlink()
    result = lors("run", "tiny.yaml")
    assert result.exit_code == 0, result.stderr
    assert "pruned: 1 to score" in result.stderr
    assert (RUN / "eval" / "pruned.json").read_bytes() == before


def test_what_a_kill_left_of_publishing_is_removed(at_finished: Path, lors: Lors) -> None:
    before = snapshot(RUN)
    for name in (".work", ".staging"):
        (RUN / "prune" / name).mkdir()
        (RUN / "prune" / name / "block").write_bytes(b"x")
    assert set(statuses(lors("run", "tiny.yaml", "--json")).values()) == {"skipped"}
    assert snapshot(RUN) == before


# A real model ---------------------------------------------------------------------------------------------------


def test_stories260k_from_end_to_end(
    shared_dir: Path, tmp_path: Path, lors: Lors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next((shared_dir / "data" / "models").rglob("stories260*"), None)
    if model is None:
        pytest.skip("no stories260k in shared/data/models")
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"""
name: stories
model: {{path: {model}}}
data_dir: {shared_dir / "data"}
prune:
  method: wanda
  calibration: {{dataset: slimpajama, num_samples: 8, sequence_length: 64}}
tune: {{rank: 4, data: {{dataset: alpaca, max_length: 256, num_samples: 64}}, max_steps: 4, batch_size: 4}}
eval: {{tasks: [boolq], limit: 4, perplexity: [wikitext2], perplexity_windows: 2, perplexity_length: 64}}
""")
    document = json.loads(lors("run", "r.yaml", "--json").stdout)
    assert set(document["results"]) == {"dense", "pruned", "tuned"}
    for scores in document["results"].values():
        assert 0 <= scores["tasks"]["boolq"]["acc"] <= 1
        assert scores["perplexity"]["wikitext2"]["value"] > 1
    assert lors("inspect", "runs/stories/tune").exit_code == 0


def test_a_stored_recipe_that_is_no_text_is_written_anew(at_finished: Path) -> None:
    from lors_cli.pipeline.running import _write_recipe
    from lors_cli.recipe.loading import load_recipe

    stored = Path("runs/tiny/recipe.yaml")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:90] + b"\xbe\xff" + whole[92:])
    _write_recipe(load_recipe(Path("tiny.yaml")), stored.parent)
    assert stored.read_bytes() == whole
