"""Which weights of a block are pruned, and that their matrices are the stored parameters themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lors_cli.errors import UsageError
from lors_cli.models.blocks import (
    block_weights,
    decoder_blocks,
    expert_keys,
    left_out,
    model_max_length,
    prunable_weights,
)
from lors_cli.models.inspection import detect_pattern
from lors_cli.sparsity import Pattern, mask_digest, num_violations

Build = Callable[..., PreTrainedModel]
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
EXPERTS = [f"mlp.experts.{expert}.{key}" for expert in range(4) for key in ("gate_up_proj", "down_proj")]
SHARED = [f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
DENSE = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
EXPECTED = {
    "Llama": [[*ATTENTION, *DENSE]] * 2,
    "GPT-2": [["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]] * 2,
    "Mixtral": [[*ATTENTION, *EXPERTS]] * 2,
    "Qwen2-MoE": [[*ATTENTION, *EXPERTS, *SHARED], [*ATTENTION, *DENSE]],
    "Qwen3-MoE": [[*ATTENTION, *EXPERTS]] * 2,
    "GPT-OSS": [[*ATTENTION, *EXPERTS]] * 2,
    "Falcon": [
        [f"self_attention.{part}" for part in ("query_key_value", "dense")] + ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    ]
    * 2,
    "Gemma4": [[*ATTENTION, *DENSE, "per_layer_input_gate", "per_layer_projection"]] * 2,
    "Gemma3n": [
        [
            *ATTENTION,
            *DENSE,
            "laurel.linear_left",
            "laurel.linear_right",
            "per_layer_input_gate",
            "per_layer_projection",
        ]
    ]
    * 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_in_the_blocks_order_without_routers(name: str, build: Build) -> None:
    prefix = "transformer.h" if name in ("GPT-2", "Falcon") else "model.layers"
    expected = [f"{prefix}.{index}.{part}" for index, parts in enumerate(EXPECTED[name]) for part in parts]
    weights = prunable_weights(build(name))
    assert list(weights) == expected
    assert all(weight.name == full_name for full_name, weight in weights.items())


def test_matrices_have_their_inputs_in_columns(build: Build) -> None:
    weights = prunable_weights(build("GPT-2"))
    assert weights["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert weights["transformer.h.0.mlp.c_proj"].shape == (32, 64)
    for name, inner in (("Mixtral", 64), ("Qwen3-MoE", 48), ("GPT-OSS", 64)):
        weights = prunable_weights(build(name))
        assert weights["model.layers.1.mlp.experts.2.gate_up_proj"].shape == (2 * inner, 32)
        assert weights["model.layers.1.mlp.experts.2.down_proj"].shape == (32, inner)


def test_what_is_copied_into_a_matrix_is_stored(architecture: str, build: Build) -> None:
    model = build(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, weight in enumerate(prunable_weights(model).values()):
        weight.matrix.copy_(torch.full(weight.shape, 1000.0 + number))
    for number, weight in enumerate(prunable_weights(model).values()):
        stored = getattr(weight.module, weight.key)
        assert bool(((stored if weight.expert is None else stored[weight.expert]) == 1000 + number).all())
    for name, tensor in model.state_dict().items():
        if (
            name.endswith(("_bias", ".bias"))
            or "norm" in name
            or any(f".{part}" in name for part in ("router", "gate.", "shared_expert_gate", "altup"))
        ):
            assert torch.equal(tensor, before[name]), name


def test_a_transposed_matrix_is_the_weight_that_multiplies_the_input() -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"plain": nn.Linear(8, 12), "other_way": Conv1D(12, 8)})
    weights = block_weights(block, "h.0")
    weights["h.0.other_way"].matrix.copy_(weights["h.0.plain"].matrix)
    block["other_way"].bias.data.copy_(block["plain"].bias)  # type: ignore[union-attr]
    x = torch.randn(5, 8)
    torch.testing.assert_close(block["other_way"](x), block["plain"](x))


def test_the_parameter_is_looked_up_at_access(build: Build) -> None:
    model = build("Mixtral")
    experts = model.model.layers[0].mlp.experts
    weight = prunable_weights(model)["model.layers.0.mlp.experts.1.down_proj"]
    experts.down_proj = nn.Parameter(torch.arange(4.0).view(4, 1, 1).expand(4, 32, 64).clone())
    assert bool((weight.matrix == 1).all())


@pytest.mark.parametrize(("name", "changes", "expected"), [
    ("Llama", {}, 64), ("MPT", {"max_seq_len": 48}, 48), ("GPT-J", {"max_position_embeddings": 40}, 40),
    ("Gemma3-vision", {}, 64),
])  # fmt: skip
def test_the_longest_sequence(name: str, changes: dict[str, int], expected: int, build: Build) -> None:
    assert model_max_length(build(name, **changes)) == expected


def test_parts_for_images_are_left_out(build: Build) -> None:
    model = build("Gemma3-vision")
    assert len(model.model.vision_tower.encoder.layers) == len(model.model.language_model.layers)
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    assert left_out(model) == ["model.vision_tower", "model.multi_modal_projector"]


def test_nothing_else_is_left_out(architecture: str, build: Build) -> None:
    assert left_out(build(architecture)) == (["model.vision_tower", "model.multi_modal_projector"]
                                             if architecture == "Gemma3-vision" else [])  # fmt: skip


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen2-MoE", "GPT-OSS"])
def test_a_model_without_weights_has_the_same(name: str, build: Build) -> None:
    real = build(name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(real.config)
    assert next(empty.parameters()).is_meta
    assert [(name, weight.shape) for name, weight in prunable_weights(empty).items()] == [
        (name, weight.shape) for name, weight in prunable_weights(real).items()
    ]


def test_a_router_is_one_only_beside_experts() -> None:
    def part() -> nn.Module:
        linears = {name: nn.Linear(4, 4) for name in ("gate", "router", "up")}
        return nn.ModuleDict({**linears, "shared_expert_gate": nn.ModuleDict({"inner": nn.Linear(4, 1)})})

    mixture = part()
    mixture.experts = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(4, 4)})])
    block = nn.ModuleDict({"dense": part(), "mixture": mixture})
    assert list(block_weights(block, "b")) == [
        "b.dense.gate", "b.dense.router", "b.dense.up", "b.dense.shared_expert_gate.inner", "b.mixture.up",
        "b.mixture.experts.0.gate",
    ]  # fmt: skip


class TestRefusals:
    def check(self, part: nn.Module, message: str, name: str = "mixer") -> None:
        with pytest.raises(UsageError, match=message):
            block_weights(nn.ModuleDict({name: part}), "h.0")

    def test_a_convolution(self) -> None:
        self.check(nn.Conv1d(4, 4, 3), r"not supported: h\.0\.mixer\.weight \(4 × 4 × 3\)")

    def test_experts_of_an_unknown_layout(self) -> None:
        part = nn.Module()
        part.input_linear = nn.Parameter(torch.zeros(2, 4, 6))
        self.check(part, r"h\.0\.experts\.input_linear \(2 × 4 × 6\) .* unknown layout", "experts")

    def test_experts_stacked_in_a_matrix(self) -> None:
        part = nn.Module()
        part.w1 = nn.Parameter(torch.zeros(8, 6))
        self.check(part, r"h\.0\.experts\.w1 \(8 × 6\) .* unknown layout", "experts")

    def test_a_third_tensor_beside_fused_experts(self, build: Build) -> None:
        experts = build("Mixtral").model.layers[0].mlp.experts
        assert expert_keys(experts) == ("gate_up_proj", "down_proj")
        experts.extra = nn.Parameter(torch.zeros(4, 2, 2))
        self.check(experts, r"h\.0\.mixer\.extra \(4 × 2 × 2\)")

    def test_a_linear_in_groups(self) -> None:
        part = nn.Linear(4, 8)
        part.n_groups = 2  # type: ignore[assignment]
        self.check(part, r"not supported: parts of h\.0\.mixer")


def zero_half(weight: torch.Tensor) -> None:
    weight[:, 0::4] = 0
    weight[:, 3::4] = 0


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "GPT-OSS", "GPT-2"])
def test_a_saved_checkpoint_keeps_zeros_and_pattern(name: str, build: Build, tmp_path: Path) -> None:
    model = build(name)
    for weight in prunable_weights(model).values():
        zero_half(weight.matrix)
    model.save_pretrained(tmp_path)
    loaded = prunable_weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert detect_pattern(loaded) == Pattern(2, 4, 0.5)
    for full_name, weight in prunable_weights(model).items():
        assert torch.equal(loaded[full_name].matrix, weight.matrix)
        assert num_violations(loaded[full_name].matrix, Pattern(2, 4, 0.5)) == 0
    if name == "Mixtral":  # stored expert by expert, fused when loaded
        split = load_file(tmp_path / "model.safetensors")
        w3 = split["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
        assert torch.equal(w3, loaded["model.layers.1.mlp.experts.2.gate_up_proj"].matrix[64:])


def test_a_mask_digest_does_not_depend_on_how_a_matrix_is_stored() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).relu()
    assert mask_digest([("a", weight)]) == mask_digest([("a", weight.T.contiguous().T)])
    assert mask_digest([("a", weight)]) != mask_digest([("a", weight.T.contiguous().view(12, 20))])
