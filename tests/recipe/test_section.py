"""Sections built from Python: they refuse what YAML refuses, in the same words, and show what differs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lors_cli.errors import LorsError, UsageError
from lors_cli.files.hashes import plain
from lors_cli.recipe.loading import load_stage
from lors_cli.recipe.schema import (
    CalibrationConfig,
    EvalConfig,
    ModelConfig,
    PruneConfig,
    Recipe,
    TuneConfig,
    TuneDataConfig,
)

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("tune", {"rank": "8"}, "rank: must be a whole number, not the text '8'"),
    ("tune", {"rank": 0}, "rank: must be above 0, not 0"),
    ("tune", {"rank": 8.5}, "rank: must be a whole number, not 8.5"),
    ("tune", {"use_rslora": 1}, "use_rslora: must be true or false, not 1"),
    ("tune", {"method": "lorz"}, "did you mean lors?"),
    ("tune", {"learning_rate": float("nan")}, "learning_rate: must be a finite number, not nan"),
    ("tune", {"rank": None}, "rank: is empty"),
    ("tune", {"rnk": 8}, "rnk: unknown key; did you mean rank?"),
    ("tune", {"lr": 1e-3}, "lr: unknown key; did you mean learning_rate?"),
    ("tune", {"max_steps": 5, "max_tokens": 50}, "max_tokens: max_steps says how long to train too"),
    ("prune", {"pattern": "two"}, "pattern: must be N:M"),
    ("prune", {"calibration": {"num_samples": 0}}, "calibration.num_samples: must be above 0, not 0"),
    ("eval", {"tasks": "boolq"}, "tasks: must be a list, for example [boolq]"),
    ("eval", {"tasks": "boolq,mmlu_*, rte"}, 'tasks: must be a list, for example [boolq, "mmlu_*", rte]'),
    ("eval", {"tasks": [], "perplexity": []}, "neither tasks nor perplexity is given"),
]
SCHEMAS: dict[str, Any] = {"prune": PruneConfig, "tune": TuneConfig, "eval": EvalConfig}


@pytest.mark.parametrize(("stage", "settings", "message"), WRONG, ids=[f"{case[0]}-{case[2][:25]}" for case in WRONG])
def test_python_refuses_what_yaml_refuses_in_the_same_words(
    stage: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import yaml

    with pytest.raises(LorsError) as of_python:
        SCHEMAS[stage](**settings)
    assert isinstance(of_python.value, ValueError)
    assert message in str(of_python.value)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UsageError) as of_yaml:
        load_stage(stage, tmp_path / "x.yaml", [])
    said = of_yaml.value.message.partition(": ")[2].replace(".nan", "nan")  # as YAML writes it
    assert of_python.value.message == f"{SCHEMAS[stage].__name__}: {said}"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(LorsError) as caught:
        TuneConfig(rank="8", epochs=-1, method="lorz")  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 3


def test_lists_dicts_and_paths_become_what_yaml_makes_of_them() -> None:
    config = EvalConfig(tasks=["boolq", "rte"])  # type: ignore[arg-type]
    assert config == EvalConfig(tasks=("boolq", "rte"))
    assert hash(config) == hash(EvalConfig(tasks=("boolq", "rte")))
    nested = PruneConfig(calibration={"dataset": "pydoc"})  # type: ignore[arg-type]
    assert nested == PruneConfig(calibration=CalibrationConfig(dataset="pydoc"))
    assert ModelConfig(path=Path("some/model")).path == "some/model"  # type: ignore[arg-type]
    assert ModelConfig(path=Path("~/model")).path == str(Path.home() / "model")  # type: ignore[arg-type]


def test_a_whole_number_is_the_fraction_that_yaml_makes_of_it() -> None:
    given: dict[str, Any] = {"epochs": 3, "max_grad_norm": 1, "weight_decay": 0, "rank": 8, "train_norms": True}
    config = TuneConfig(**given)
    of_yaml = load_stage("tune", None, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    assert json.dumps(plain(config)) == json.dumps(plain(of_yaml))  # as the fingerprint has it
    assert repr(config.rank) == "8"


@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(),
        TuneConfig(rank=8, learning_rate=1e-3, data=TuneDataConfig(dataset="mine.jsonl")),
        PruneConfig(pattern="4:8", calibration=CalibrationConfig(num_samples=4)),
        EvalConfig(tasks=("boolq",), limit=5),
        Recipe(name="r", model=ModelConfig(path="m"), prune=PruneConfig()),
    ],
    ids=lambda config: type(config).__name__,
)
def test_repr_is_short_and_builds_the_same_again(config: Any) -> None:
    assert eval(repr(config)) == config
    assert len(repr(config)) < 100


def test_repr_of_the_defaults_is_empty() -> None:
    assert repr(TuneConfig()) == "TuneConfig()"
    assert repr(TuneConfig(rank=8)) == "TuneConfig(rank=8)"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(copied: Callable[[Any], Any]) -> None:
    config = TuneConfig(rank=8, data=TuneDataConfig(num_samples=3))
    assert copied(config) == config


def test_method_added_from_python_is_taken_once_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LorsError, match="method: must be one of"):
        TuneConfig(method="mine")  # type: ignore[arg-type]
    monkeypatch.setattr("lors_cli.recipe.section.OWN_METHODS", {"mine"})
    with pytest.raises(LorsError, match="learning_rate: mine has none of its own"):
        TuneConfig(method="mine")  # type: ignore[arg-type]
    config = TuneConfig(method="mine", rank=4, learning_rate=1e-3)  # type: ignore[arg-type]
    assert (config.method, config.rank) == ("mine", 4)
    assert Recipe(name="r", model=ModelConfig(path="m"), tune=config).tune is config
    with pytest.raises(LorsError, match="rank: must be above 0"):
        TuneConfig(method="mine", rank=0, learning_rate=1e-3)  # type: ignore[arg-type]
