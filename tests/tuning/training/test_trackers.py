"""Trackers: what they are told, that a resumed run is the same run, that nothing is imported unasked.

TensorBoard is the real one. wandb, mlflow and trackio are modules with the functions and parameters of wandb 0.31,
mlflow 3.17 and trackio 0.43 that `trackers` uses; each writes down how it was called.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import killed_at, log
from typer.testing import Result

from lors_cli.errors import MissingError
from lors_cli.machine import processes
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training import trackers
from lors_cli.tuning.training.trainer import AdapterTrainer

RECORDER = """
import json, random
from pathlib import Path

def note(call, /, **values):
    with open(Path(__file__).with_suffix(".calls"), "a") as file:
        file.write(json.dumps([call, values]) + "\\n")
"""
WANDB = (
    RECORDER
    + """
class Error(Exception): pass

class Run:
    def define_metric(self, name, step_metric=None, step_sync=None): note("define", name=name, step=step_metric)
    def log(self, data): note("log", **data)
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): note("finish", failed=kind is not None)

def init(*, project=None, name=None, id=None, resume=None, dir=None, config=None):
    random.random()
    if project == "refused": raise Error("no API key")
    note("init", project=project, name=name, id=id, resume=resume, dir=dir, config=config)
    return Run()
"""
)
MLFLOW = (
    RECORDER
    + """
class MlflowException(Exception): pass
class info: run_id = "made by the server"

class ActiveRun:
    info = info
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): note("finish", failed=kind is not None)

def set_experiment(name): note("experiment", name=name)
def start_run(run_id=None, run_name=None):
    note("start", run_id=run_id, run_name=run_name)
    return ActiveRun()
def log_params(params): note("params", **{key: str(value) for key, value in params.items()})
def log_metrics(metrics, step=None): note("log", step=step, **metrics)
"""
)
TRACKIO = (
    RECORDER
    + """
def init(project, *, name=None, resume=None, config=None):
    note("init", project=project, name=name, resume=resume, config=config)
def log(metrics, step=None): note("log", step=step, **metrics)
def finish(): note("finish")
"""
)
MODULES = {"wandb": WANDB, "mlflow": MLFLOW, "trackio": TRACKIO}


@pytest.fixture
def model(sparse_checkpoint: Path) -> ModelConfig:
    return ModelConfig(path=str(sparse_checkpoint))


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that write down how they were called."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


def calls(fakes: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    path = fakes / f"{name}.calls"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def named(found: list[tuple[str, dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    return [values for name, values in found if name == kind]


def expected_values(row: dict[str, Any]) -> dict[str, float]:
    values = {f"train/{key}": row[key] for key in ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_s")}
    return values | ({"eval/loss": row["val_loss"]} if "val_loss" in row else {})


def test_tensorboards_events_hold_every_step_once_though_some_were_done_again(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(config, report_to=("tensorboard",), val_size=5, eval_steps=4)
    killed_at(5, config, model, tmp_path / "tune", monkeypatch)  # steps 4 and 5 are done again
    tune(config, model, tmp_path / "tune")
    events = accumulator.EventAccumulator(str(tmp_path / "tune/tensorboard"))
    events.Reload()
    rows = log(tmp_path / "tune")
    for key, name in (("loss", "train/loss"), ("learning_rate", "train/learning_rate"), ("val_loss", "eval/loss")):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(row["step"], row[key]) for row in rows if key in row]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert '"val_size": 5' in text
    assert '"code"' in text


def test_wandb_gets_settings_commit_and_numbers_and_a_resumed_run_is_the_same(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: Path
) -> None:
    code = {"commit": "abc", "dirty": False}
    monkeypatch.setattr("lors_cli.machine.environment.code_version", lambda: code)
    config, out = replace(config, report_to=("wandb",), val_size=5, eval_steps=4), tmp_path / "my-run" / "tune"
    killed_at(5, config, model, out, monkeypatch)
    tune(config, model, out)
    found = calls(fakes, "wandb")
    first, second = named(found, "init")
    assert first == second
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("LORS", "my-run", "allow", str(out))
    assert len(first["id"]) == 32
    assert first["config"]["code"] == code
    assert first["config"]["model"] == model.path
    told = first["config"]["tune"]
    assert (told["rank"], told["init"], told["data"]["dataset"]) == (4, "gradient", config.data.dataset)
    assert [values["failed"] for values in named(found, "finish")] == [True, False]
    assert named(found, "define") == 2 * [{"name": "*", "step": "train/global_step"}]
    logged = named(found, "log")
    assert [values["train/global_step"] for values in logged] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    for row, values in zip(log(out)[3:], logged[5:], strict=True):
        assert values == {**expected_values(row), "train/global_step": row["step"]}


def test_wandbs_own_variables_win_and_another_run_is_another(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: Path
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "sparse")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = replace(config, report_to=("wandb",), max_steps=1, init="kaiming")
    for name in ("a", "b"):
        tune(config, model, tmp_path / name)
    first, second = named(calls(fakes, "wandb"), "init")
    assert (first["project"], first["name"], first["dir"]) == ("sparse", "mine", str(tmp_path))
    assert first["id"] != second["id"]


def test_mlflow_and_trackio_get_them_too(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: Path
) -> None:
    config, out = replace(config, report_to=("mlflow", "trackio"), max_steps=5), tmp_path / "run"
    killed_at(4, config, model, out, monkeypatch)
    tune(config, model, out)
    mlflow, trackio = calls(fakes, "mlflow"), calls(fakes, "trackio")
    assert named(mlflow, "experiment") == 2 * [{"name": "LORS"}]
    starts = [{"run_id": None, "run_name": "run"}, {"run_id": "made by the server", "run_name": "run"}]
    assert named(mlflow, "start") == starts
    (params,) = named(mlflow, "params")  # mlflow refuses others of the same run later
    assert params.items() >= {"tune.rank": "4", "model": model.path}.items()
    first, second = named(trackio, "init")
    assert first == second
    assert first["name"].startswith("run-")
    assert (first["project"], first["resume"], first["config"]["tune.data.max_length"]) == ("LORS", "allow", 320)
    assert len(named(trackio, "finish")) == 2
    wanted = [{"step": row["step"], **expected_values(row)} for row in log(out)[3:]]
    assert named(mlflow, "log")[4:] == wanted == named(trackio, "log")[4:]


def test_trackers_move_no_bit_and_no_fingerprint_though_they_draw_random_numbers(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = replace(config, report_to=("wandb",), max_steps=2)
    states: list[Any] = []
    original = AdapterTrainer.run

    def noted(self: AdapterTrainer, report: Callable[..., None]) -> None:
        states.append((random.getstate(), torch.get_rng_state().tolist()))
        original(self, report)

    monkeypatch.setattr(AdapterTrainer, "run", noted)
    first = tune(tracked, model, tmp_path / "tracked")
    random.seed(0)
    second = tune(replace(tracked, report_to=()), model, tmp_path / "plain")
    assert states[0] == states[1]
    assert (
        first.fingerprint
        == second.fingerprint
        == stage_fingerprint(replace(tracked, report_to=("mlflow",)), first.inputs["model"], None)
    )
    assert (tmp_path / "tracked/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


def test_nothing_is_imported_unless_asked_for(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, fakes: Path
) -> None:
    for name in MODULES:
        (fakes / f"{name}.py").write_text("raise AssertionError('imported')")
    tune(replace(config, max_steps=1, init="kaiming"), model, tmp_path / "tune")
    assert not MODULES.keys() & sys.modules.keys()
    with pytest.raises(AssertionError, match="imported"):
        tune(replace(config, max_steps=1, init="kaiming", report_to=("wandb",)), model, tmp_path / "asked")


def test_a_missing_package_ends_a_run_before_its_first_stage(
    tmp_path: Path, sparse_checkpoint: Path, instructions: Path, monkeypatch: pytest.MonkeyPatch,
    lors: Callable[..., Result], config: TuneConfig,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # as wandb leaves it, and no package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "wandb/__init__.py").exists()])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nmodel: {{path: {sparse_checkpoint}}}\nprune: {{method: magnitude}}\n"
        f"tune: {{data: {{dataset: {instructions}}}, report_to: [wandb]}}\n"
    )
    result = lors("run", str(recipe))
    assert result.exit_code == 3
    assert "report_to: wandb is not installed" in result.output
    assert "pip install wandb" in result.output
    assert not (tmp_path / "runs/mine/prune/stage.json").exists()
    with pytest.raises(MissingError, match="pip install wandb"):
        tune(replace(config, report_to=("wandb",)), ModelConfig(path="not even looked for"), tmp_path / "tune")


def test_a_tracker_that_cannot_begin_ends_the_run_before_training(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with pytest.raises(MissingError, match=r"wandb cannot begin: no API key\n.*WANDB_MODE=offline"):
        tune(replace(config, report_to=("wandb",)), model, tmp_path / "tune")
    assert log(tmp_path / "tune") == []


@pytest.mark.parametrize("at", ["log", "end"])
def test_a_tracker_that_fails_is_given_up_and_nothing_else(
    tmp_path: Path, fakes: Path, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    fails = """
def fail(*given, step=9, **values):
    note("fail", step=step)
    if step > 1: raise ConnectionError("the server is gone")
ActiveRun.__exit__ = fail
"""
    (fakes / "mlflow.py").write_text(MLFLOW + fails + ("log_metrics = fail" if at == "log" else ""))
    run = trackers.TrackedRun("name", {}, tmp_path, tmp_path)

    def work() -> None:
        with trackers.tracking(["mlflow", "trackio"], run, 1) as track:
            for step in (1, 2, 3):
                track({"step": step, "loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    steps = [values["step"] for values in named(calls(fakes, "mlflow"), "fail")]
    assert steps == ([1, 2, 9] if at == "log" else [9])
    assert named(calls(fakes, "trackio"), "log") == [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("mlflow fails and is told nothing more; log.jsonl has every step: the server is gone") == 1


def test_the_main_process_alone_tracks(tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trackers.TrackedRun("name", {}, tmp_path, tmp_path)
    row = {"step": 1, "loss": 1.0, "grad_norm": None}
    for is_main in (False, True):
        monkeypatch.setattr(processes, "is_main", lambda is_main=is_main: is_main)
        with trackers.tracking(["wandb"], run, 1) as track:
            track(row)
        assert len(calls(fakes, "wandb")) == (4 if is_main else 0)
    assert named(calls(fakes, "wandb"), "log") == [{"train/loss": 1.0, "train/global_step": 1}]


def test_real_wandb_offline(
    model: ModelConfig, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tune(replace(config, report_to=("wandb",), max_steps=2), model, tmp_path / "tune")
    (file,) = (tmp_path / "tune/wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"max_grad_norm" in content
