"""Every setting of the schema moves its stage's fingerprint, or is among those that are known to move no result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lors_cli.evaluation import eval_fingerprint
from lors_cli.pruning import stage as pruning
from lors_cli.recipe.schema import (
    CalibrationConfig,
    DistillConfig,
    EvalConfig,
    MixConfig,
    PruneConfig,
    QuantizeConfig,
    TeacherCacheConfig,
    TuneConfig,
    TuneDataConfig,
)
from lors_cli.tuning import stage as tuning

TEXT = {"text.txt": "some text\n", "other.txt": "other text\n"}
PRUNE = PruneConfig(method="wanda", pattern="unstructured", sparsity=0.5, quantize=QuantizeConfig(),
                    reconstruct_epochs=1, calibration=CalibrationConfig(dataset="text.txt"))  # fmt: skip
TUNE = TuneConfig(
    data=TuneDataConfig(dataset="text.txt", stream="on"),
    distill=DistillConfig(teacher="teacher.gguf", cache=TeacherCacheConfig()),
    train_norms=True, val_size=8, early_stopping_patience=2, load_best_model_at_end=False, learning_rate=1e-2,
)  # fmt: skip
EVAL = EvalConfig(tasks=("rte",), perplexity=("text.txt",), apply_chat_template=True)
OTHER: dict[str, Any] = {
    "prune.method": "ria", "prune.pattern": None, "prune.channel_permutation": None,  # these have tests of their own
    "prune.quantize.bits": 8, "prune.quantize.group_size": 64, "prune.true_sequential": True,
    "prune.layer_sparsity": "owl", "prune.skip": ("a.*",),
    "prune.calibration.dataset": "other.txt",
    "prune.calibration.split": None, "prune.calibration.columns": None,  # in the text's fingerprint; a file has none
    "prune.calibration.offload": "disk",
    "tune.method": "sqft", "tune.init": "kaiming", "tune.rounding": "nearest", "tune.gradient": "exact",
    "tune.merged_cache": "on",
    "tune.base": "packed", "tune.data.dataset": "other.txt", "tune.data.split": None, "tune.data.columns": None,
    "tune.data.template": "vicuna", "tune.data.packing": "isolated", "tune.data.stream": "off",
    "tune.data.max_length": 64, "tune.data.mix": None,  # which has a test of its own
    "tune.skip": ("a.*",), "tune.lr_schedule": "linear", "tune.optim": "adamw_8bit",
    "tune.max_tokens": 4096, "tune.per_device_batch_size": 8, "tune.parallelism": "fsdp", "tune.report_to": ("wandb",),
    "tune.load_best_model_at_end": True, "tune.distill.teacher": "other.gguf", "tune.distill.revision": None,
    "tune.min_learning_rate": 1e-3, "tune.distill.cache.dtype": "float32", "tune.adam_betas": (0.8, 0.999),
    "tune.val_size": 0.5,
    "eval.models": None, "eval.tasks": ("boolq",), "eval.perplexity": ("other.txt",), "eval.num_fewshot": 3,
    "eval.fewshot_as_multiturn": False, "eval.system_instruction": "Be brief.", "eval.include_path": None,
    "eval.limit": 7, "eval.generations": False,
}  # fmt: skip
"""Another value than the default's neighbour; None where there is none that could be given beside the others."""
WITHOUT_EFFECT = {
    "prune.calibration.offload", "prune.calibration.batch_size", "eval.generations",
    *(f"tune.{name}" for name in tuning.WITHOUT_EFFECT),
}  # fmt: skip
BEGUN = {"prune": PRUNE, "tune": TUNE, "eval": EVAL}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in TEXT.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "teacher.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.gguf").write_bytes(b"GGUFother")
    monkeypatch.chdir(tmp_path)


def settings(config: Any, prefix: str) -> Iterator[str]:
    for entry in fields(config):
        value = getattr(config, entry.name)
        yield from settings(value, f"{prefix}.{entry.name}") if is_dataclass(value) else [f"{prefix}.{entry.name}"]


def changed(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = changed(getattr(config, path[0]), path[1:], value)
    return replace(config, **{path[0]: value})


def another(key: str, value: Any) -> Any:
    """A value that the setting does not have."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    return 3 if value is None else value + 0.25 if isinstance(value, float) else value + 1


def fingerprint(stage: str, config: Any) -> str:
    if stage == "eval":
        return eval_fingerprint(config, {"dense": "model:0"}, None)
    made = {"prune": pruning.stage_fingerprint, "tune": tuning.stage_fingerprint}[stage]
    return made(config, "model:0", None)


ALL = [key for stage, config in BEGUN.items() for key in settings(config, stage)]


@pytest.mark.parametrize("key", [key for key in ALL if OTHER.get(key, 0) is not None])
def test_a_setting_moves_the_fingerprint_if_it_moves_the_result(key: str) -> None:
    stage, *path = key.split(".")
    before = BEGUN[stage]
    after = changed(before, path, another(key, None if key in OTHER else _value(before, path)))
    assert (fingerprint(stage, before) == fingerprint(stage, after)) == (key in WITHOUT_EFFECT)


def _value(config: Any, path: list[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


MIXED = replace(TUNE, max_steps=4, val_size=None, early_stopping_patience=None, load_best_model_at_end=None)


def _mixed(**settings: Any) -> str:
    part = MixConfig(**{"dataset": "other.txt", "weight": 0.25, **settings})
    return fingerprint("tune", replace(MIXED, data=replace(MIXED.data, mix=(part,))))


@pytest.mark.parametrize(
    "change",
    [{"weight": 0.5}, {"dataset": "third.txt"}, {"num_samples": 3}, {"packing": "isolated"}, {"stream": "on"},
     {"template": "chat"}, {"train_on_prompt": True}],
)  # fmt: skip
def test_a_setting_of_a_mix_moves_the_fingerprint(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "third.txt").write_text("third text\n")
    assert len({fingerprint("tune", MIXED), _mixed(), _mixed(**change)}) == 3
    assert _mixed() == _mixed(packing="concatenated", stream="off")  # what is implied, said
