"""Experts run one by one against what transformers itself computes, for every variant of its contract."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lors_cli.models.blocks import expert_keys
from lors_cli.pruning.walk.experts import forward_experts

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4,
}  # fmt: skip
FAMILIES = {  # module, configuration, experts
    "gated": ("mixtral", "MixtralConfig", "MixtralExperts"),
    "gated, many small": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeExperts"),
    "own gate": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3Experts"),
    "transposed": ("aria", "AriaTextConfig", "AriaExperts"),
    "transposed, interleaved, biases": ("gpt_oss", "GptOssConfig", "GptOssExperts"),
    "without gate": ("nemotron_h", "NemotronHConfig", "NemotronHExperts"),
    "norm after each expert": ("muse_spark", "MuseSparkTextConfig", "MuseSparkExperts"),
}


def build_experts(module: str, config_class: str, experts_class: str) -> Any:
    """Random float64 experts of a family; skipped where this transformers lacks it."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    config = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), config_class)()
    for key, size in SIZES.items():
        if hasattr(config, key):
            setattr(config, key, size)
    torch.manual_seed(0)
    experts = getattr(modeling, experts_class)(config).double().eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_experts_own_forward(family: str, implementation: str) -> None:
    experts = build_experts(*FAMILIES[family])
    up_key, _ = expert_keys(experts)
    num_experts, *sizes = getattr(experts, up_key).shape
    hidden = torch.randn(30, sizes[0] if experts.is_transposed else sizes[1], dtype=torch.float64)
    weights, index = torch.rand(30, num_experts, dtype=torch.float64).topk(2)
    experts.config._experts_implementation = implementation
    seen: list[tuple[int, str, int]] = []
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        found = forward_experts(experts, lambda *told: seen.append((*told[:2], len(told[2]))), hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().mean() > 0.1
    counts = [int((index == expert).sum()) for expert in range(num_experts)]
    assert seen == [(expert, key, count) for expert, count in enumerate(counts) if count
                    for key in expert_keys(experts)]  # fmt: skip


def test_a_token_may_go_to_no_expert() -> None:
    experts = build_experts(*FAMILIES["gated"])
    hidden = torch.randn(2, 16, dtype=torch.float64)
    index = torch.tensor([[4, 1], [4, 4]])
    seen: list[int] = []
    with torch.no_grad():
        found = forward_experts(
            experts, lambda expert, key, x: seen.append(expert), hidden, index, torch.ones(2, 2).double()
        )
    assert seen == [1, 1]
    assert found[0].count_nonzero() == 16
    assert found[1].count_nonzero() == 0
