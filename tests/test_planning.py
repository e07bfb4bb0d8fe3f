"""Sizes and estimates before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lors_cli.planning import RUNTIME, estimate, model_size, try_estimate
from lors_cli.recipe import CalibrationConfig, EvalConfig, ModelConfig, PruneConfig, TuneConfig, TuneDataConfig


@pytest.mark.parametrize(
    ("hub_id", "num_parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ],
)
def test_known_models_have_their_published_size(hub_id: str, num_parameters: int) -> None:
    size = model_size(ModelConfig(path=hub_id))
    assert size is not None
    assert size.num_parameters == num_parameters
    assert size.num_bytes == num_parameters * 2


def test_an_unknown_hub_model_has_no_size() -> None:
    assert model_size(ModelConfig(path="nobody/nothing")) is None
    needs, why = try_estimate(PruneConfig(), ModelConfig(path="nobody/nothing"))
    assert needs is None
    assert "unknown" in why


def test_a_missing_folder_is_a_reason_not_an_error() -> None:
    needs, why = try_estimate(PruneConfig(), ModelConfig(path="./gone"))
    assert needs is None
    assert "./gone" in why


def test_a_folder_has_the_size_of_its_model(workshop: Path) -> None:
    from lors_cli.models import load_model
    from lors_cli.weights import prunable_weights

    config = ModelConfig(path=str(workshop / "dense"), dtype="float32")
    size, model = model_size(config), load_model(config)
    assert size is not None
    assert size.num_parameters == model.num_parameters()
    assert size.num_prunable == sum(weight.matrix.numel() for weight in prunable_weights(model).values())
    assert size.largest_input == 64
    assert size.num_bytes == 4 * size.num_parameters
    halved = model_size(replace(config, dtype="bfloat16"))
    assert halved is not None
    assert halved.num_bytes * 2 == size.num_bytes


SPARSEGPT = PruneConfig(calibration=CalibrationConfig(num_samples=32, sequence_length=512))
TUNE = TuneConfig(rank=8, batch_size=8, per_device_batch_size=2, data=TuneDataConfig(max_length=256))


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (PruneConfig(method="magnitude"), replace(SPARSEGPT, method="wanda")),
        (replace(SPARSEGPT, method="wanda"), SPARSEGPT),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, num_samples=64))),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, sequence_length=1024))),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, batch_size=16))),
        (TUNE, replace(TUNE, rank=16)),
        (TUNE, replace(TUNE, per_device_batch_size=4)),
        (TUNE, replace(TUNE, data=replace(TUNE.data, max_length=512))),
        (replace(TUNE, gradient_checkpointing=True), TUNE),
        (replace(TUNE, init="kaiming"), TUNE),
        (EvalConfig(batch_size=4), EvalConfig(batch_size=8)),
    ],
)
def test_estimates_grow_with_the_settings(small: Any, large: Any) -> None:
    size = model_size(ModelConfig(path="HuggingFaceTB/SmolLM2-135M"))
    assert size is not None
    assert estimate(small, size).memory < estimate(large, size).memory
    assert estimate(small, size).disk <= estimate(large, size).disk


@pytest.mark.parametrize("config", [SPARSEGPT, TUNE, EvalConfig()])
def test_no_stage_needs_less_than_its_weights(config: Any) -> None:
    for hub_id in ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Meta-Llama-3-8B"):
        size = model_size(ModelConfig(path=hub_id))
        assert size is not None
        needs = estimate(config, size)
        assert needs.memory > size.num_bytes + RUNTIME
        if not isinstance(config, EvalConfig):
            assert needs.disk > size.num_bytes
        assert "GiB of memory" in str(needs) or "MiB of memory" in str(needs)
