"""Statistics of a block's weights against sums over inputs that were gathered the plain way."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lors_cli.errors import UsageError
from lors_cli.models.blocks import PrunableWeight, block_weights, decoder_blocks
from lors_cli.pruning.methods.admm import admm
from lors_cli.pruning.methods.magnitude import magnitude
from lors_cli.pruning.methods.ria import ria
from lors_cli.pruning.methods.sparsegpt import sparsegpt
from lors_cli.pruning.methods.statistics import InputStatistics, Kind
from lors_cli.pruning.methods.wanda import wanda
from lors_cli.pruning.walk.calibration import capture
from lors_cli.pruning.walk.recorder import BlockDone, InputRecorder
from lors_cli.sparsity import Pattern

Build = Callable[..., PreTrainedModel]
LLAMA_LIKE = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
EXPERTS = [[key] for _ in range(4) for key in ("gate_up_proj", "down_proj")]
FUSED = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
PER_LAYER = [["per_layer_input_gate"], ["per_layer_projection"]]
GROUPS = {
    "Phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "OPT": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "GPT-NeoX": FUSED,
    "BLOOM": FUSED,
    "Falcon": [["query_key_value", "dense_h_to_4h"], *FUSED[1:2], *FUSED[3:]],
    "Falcon-40B": FUSED,
    "Falcon-RW": FUSED,
    "MPT": [["Wqkv"], ["out_proj"], ["up_proj"], ["down_proj"]],
    "GPT-J": [["q_proj", "k_proj", "v_proj", "fc_in"], ["out_proj"], ["fc_out"]],
    "CodeGen": [["qkv_proj", "fc_in"], ["out_proj"], ["fc_out"]],
    "Gemma3n": [["linear_left", *LLAMA_LIKE[0]], ["linear_right"], *LLAMA_LIKE[1:], *PER_LAYER],
    "Gemma4": [*LLAMA_LIKE, *PER_LAYER],
    "GPT-2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "Mixtral": [*LLAMA_LIKE[:2], *EXPERTS],
    "Qwen2-MoE": [*LLAMA_LIKE, *EXPERTS],
    "Qwen3-MoE": [*LLAMA_LIKE[:2], *EXPERTS],
    "GPT-OSS": [*LLAMA_LIKE[:2], *EXPERTS],
}
MIXTURES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GPT-OSS"]


class Pass:
    """The first block, run on every batch with a recorder at its weights."""

    def __init__(
        self, model: PreTrainedModel, batches: list[torch.Tensor], kind: Kind = "hessian", **options: bool
    ) -> None:
        prefix, blocks = decoder_blocks(model)
        self.block = blocks[0]
        self.weights = block_weights(self.block, f"{prefix}.0")
        self.hidden, arguments = capture(model, list(blocks), batches)
        self.arguments = arguments[0]
        self.recorder = InputRecorder(self.weights, kind, **options)
        self.num_stopped = self.run()

    @torch.no_grad()
    def run(self) -> int:
        """How many batches were stopped early."""
        num_stopped = 0
        for number, batch in enumerate(self.hidden):
            try:
                self.arguments.run(self.block, batch, number)
            except BlockDone:
                num_stopped += 1
            self.recorder.end_batch()
        return num_stopped

    def inputs_of(self, module: nn.Module) -> torch.Tensor:
        """(tokens, C) float64 inputs of a module in all batches, by a plain hook and without the recorder."""
        self.recorder.close()
        seen: list[torch.Tensor] = []
        with module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())), torch.no_grad():
            for number, batch in enumerate(self.hidden):
                self.arguments.run(self.block, batch, number)
        return torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in seen]).double()

    def statistics(self) -> dict[str, InputStatistics]:
        return {name: group.statistics for group in self.recorder.groups for name in group.names}


def check(statistics: InputStatistics, X: torch.Tensor) -> None:
    """Whether these are the sums over X (tokens, C)."""
    assert statistics.num_tokens == len(X)
    assert statistics.num_samples > 0
    H = statistics.hessian().double() * (statistics.num_samples / 2)
    torch.testing.assert_close(H, X.T @ X, rtol=1e-4, atol=1e-3)


def test_groups_are_the_weights_that_read_one_tensor(
    architecture: str, build: Build, batches: list[torch.Tensor]
) -> None:
    groups = Pass(build(architecture), batches).recorder.groups
    found = [[name.rpartition(".")[2] for name in group.names] for group in groups]
    expected = GROUPS.get(architecture, LLAMA_LIKE)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    if architecture in GROUPS:
        assert found[:2] == expected[:2]
    assert len({name for group in groups for name in group.names}) == sum(len(group.names) for group in groups)


def test_statistics_of_every_linear_are_those_of_its_own_inputs(
    architecture: str, build: Build, batches: list[torch.Tensor]
) -> None:
    done = Pass(build(architecture), batches)
    assert sum(group.statistics.num_samples for group in done.recorder.groups) > 0
    for name, statistics in done.statistics().items():
        if done.weights[name].expert is None:
            X = done.inputs_of(done.weights[name].module)
            assert len(X) == 240
            check(statistics, X)


class TestExperts:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_each_sees_the_tokens_that_its_router_sends(
        self, name: str, build: Build, batches: list[torch.Tensor]
    ) -> None:
        done = Pass(build(name), batches)
        mlp = done.block.mlp
        gathered = self.by_hand(name, mlp, done.inputs_of(mlp))
        found = {key: item for key, item in done.statistics().items() if done.weights[key].expert is not None}
        assert len(found) == len(gathered) == 8
        for key, statistics in found.items():
            check(statistics, torch.stack(gathered[key.partition("experts.")[2]]))
        assert sum(item.num_tokens for item in found.values()) == 2 * 2 * 240

    def by_hand(self, name: str, mlp: Any, X: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """What every expert's two matrices read, one token and one expert at a time."""
        router = mlp.router if name == "GPT-OSS" else mlp.gate
        gate_up = mlp.experts.gate_up_proj.detach().double()
        gathered: dict[str, list[torch.Tensor]] = {}
        for x in X:
            scores = router.weight.detach().double() @ x
            if name == "GPT-OSS":
                scores = scores + router.bias.detach()
            for expert in sorted(range(4), key=lambda index: -float(scores[index]))[:2]:
                if name == "GPT-OSS":  # (in, out), gate and up in turns
                    both = x @ gate_up[expert] + mlp.experts.gate_up_proj_bias[expert].detach()
                    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    middle = gate_up.shape[1] // 2
                    inner = F.silu(gate_up[expert, :middle] @ x) * (gate_up[expert, middle:] @ x)
                gathered.setdefault(f"{expert}.gate_up_proj", []).append(x)
                gathered.setdefault(f"{expert}.down_proj", []).append(inner)
        return gathered

    @pytest.mark.parametrize("kind", ["none", "norm", "hessian"])
    def test_one_that_no_token_reaches_is_there_with_no_tokens(
        self, kind: Kind, build: Build, batches: list[torch.Tensor]
    ) -> None:
        model = build("Mixtral", num_experts_per_tok=1)
        router = model.model.layers[0].mlp.gate.weight.data
        router[3] = (router[0] + router[1]) / 2  # never the largest of the four
        found = Pass(model, batches, kind).statistics()
        experts = {name.partition("experts.")[2]: item for name, item in found.items() if "experts" in name}
        assert len(experts) == 8
        for key in ("gate_up_proj", "down_proj"):
            assert (experts[f"3.{key}"].num_tokens, experts[f"3.{key}"].num_samples) == (0, 0)
            assert experts[f"3.{key}"].total is None
            assert sum(experts[f"{expert}.{key}"].num_tokens for expert in range(4)) == 240

    def test_experts_that_are_never_called_are_named(self, build: Build, batches: list[torch.Tensor]) -> None:
        model = build("Mixtral")
        model.model.layers[0].spare = copy.deepcopy(model.model.layers[0].mlp.experts)
        with pytest.raises(UsageError, match=r"model\.layers\.0\.spare\.0\.gate_up_proj is never called"):
            Pass(model, batches)

    def test_they_get_their_own_forward_back(self, build: Build, batches: list[torch.Tensor]) -> None:
        model = build("Mixtral")
        experts = model.model.layers[0].mlp.experts
        before = model(input_ids=batches[0]).logits
        done = Pass(model, batches)
        assert "forward" in vars(experts)
        done.recorder.close()
        assert "forward" not in vars(experts)
        assert torch.equal(model(input_ids=batches[0]).logits, before)
        experts.forward = mine = experts.forward
        Pass(model, batches).recorder.close()
        assert experts.forward is mine


TWO_OF_FOUR = Pattern.parse("2:4")
METHODS: dict[str, tuple[Kind, Callable[..., torch.Tensor]]] = {
    "magnitude": ("none", lambda W, statistics, pattern: magnitude(W, pattern)),
    "wanda": ("norm", wanda),
    "ria": ("norm", ria),
    "sparsegpt": ("hessian", lambda W, statistics, pattern: sparsegpt([W], statistics, pattern)[0]),
    "admm": ("hessian", lambda W, statistics, pattern: admm([W], statistics, pattern)[0]),
}


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern.parse("unstructured", 0.5)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_conv1d_is_pruned_as_the_linear_of_the_same_weight(method: str, pattern: Pattern) -> None:
    torch.manual_seed(0)
    linear, other = nn.Linear(16, 24), Conv1D(24, 16)
    other.weight.data.copy_(linear.weight.T)
    weights = block_weights(nn.ModuleDict({"linear": linear, "other": other}), "h")
    kind, prune = METHODS[method]
    recorder = InputRecorder(weights, kind)
    for _ in range(3):
        x = torch.randn(2, 30, 16)
        linear(x), other(x.clone())
        recorder.end_batch()
    assert [group.names for group in recorder.groups] == [["h.linear"], ["h.other"]]
    if kind != "none":
        totals = [group.statistics.total for group in recorder.groups]
        assert torch.equal(*totals)
    for group in recorder.groups:
        weight = weights[group.names[0]]
        weight.matrix.copy_(prune(weight.matrix, group.statistics, pattern))
    assert torch.equal(linear.weight, other.weight.T)
    assert int((other.weight == 0).sum()) == 16 * 24 // 2


class TestStopAfterLast:
    def test_statistics_are_those_of_whole_passes(
        self, architecture: str, build: Build, batches: list[torch.Tensor]
    ) -> None:
        model = build(architecture)
        whole = Pass(model, batches)
        whole.recorder.close()
        stopped = Pass(model, batches, stop_after_last=True)
        assert whole.num_stopped == 0
        assert stopped.num_stopped == (0 if architecture in MIXTURES else len(batches) - 1)
        for group, other in zip(whole.recorder.groups, stopped.recorder.groups, strict=True):
            assert group.names == other.names
            assert (group.statistics.num_tokens, group.statistics.num_samples) == (
                other.statistics.num_tokens, other.statistics.num_samples,
            )  # fmt: skip
            assert torch.equal(group.statistics.hessian(), other.statistics.hessian())

    def test_the_last_product_is_left_out(self, build: Build, batches: list[torch.Tensor]) -> None:
        model = build()
        products: Counter[str] = Counter()
        for name in ("up_proj", "down_proj"):
            linear = getattr(model.model.layers[0].mlp, name)
            linear.register_forward_hook(lambda _, args, output, name=name: products.update([name]))
        Pass(model, batches, stop_after_last=True)
        assert products == {"up_proj": 3, "down_proj": 1}


class Twice(nn.Module):
    """q and k read x, then y; k may leave y out."""

    def __init__(self, *, alike: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.alike = alike

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.q(x), self.k(x), self.last(x + y)
        self.q(y)
        if self.alike:
            self.k(y)


class TestCalledTwiceAPass:
    def record(self, block: Twice) -> tuple[dict[str, InputStatistics], list[torch.Tensor], InputRecorder]:
        batches = [torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        recorder = InputRecorder(block_weights(block, "b"), "hessian", stop_after_last=True)
        for x, y in batches:
            block(x, y)  # BlockDone would end the test
            recorder.end_batch()
        found = {name: group.statistics for group in recorder.groups for name in group.names}
        return (
            found,
            [torch.stack([batch[part] for batch in batches]).reshape(-1, 4).double() for part in (0, 1)],
            recorder,
        )

    def test_every_call_counts_once(self) -> None:
        found, (x, y), recorder = self.record(Twice())
        assert [group.names for group in recorder.groups] == [["b.q", "b.k"], ["b.last"]]
        check(found["b.q"], torch.cat([x, y]))
        check(found["b.last"], x + y)
        assert found["b.q"].num_samples == 2 * found["b.last"].num_samples == 18

    def test_weights_that_share_one_input_of_two_are_apart(self) -> None:
        found, (x, y), recorder = self.record(Twice(alike=False))
        assert [group.names for group in recorder.groups] == [["b.q"], ["b.k"], ["b.last"]]
        check(found["b.q"], torch.cat([x, y]))
        check(found["b.k"], x)


def test_close_removes_every_hook(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    done = Pass(model, batches)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == len(done.recorder.groups)
    done.recorder.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    InputRecorder(done.weights, "norm").close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_linear_that_is_never_called_is_named(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    model.model.layers[0].spare = nn.Linear(32, 32)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.spare is never called"):
        Pass(model, batches)


def prune_all(model: PreTrainedModel, batches: list[torch.Tensor], method: str) -> dict[str, PrunableWeight]:
    """Every block in turn, as the driver does; an expert without tokens loses its smallest weights."""
    prefix, blocks = decoder_blocks(model)
    hidden, arguments = capture(model, list(blocks), batches)
    kind, prune = METHODS[method]
    pruned: dict[str, PrunableWeight] = {}
    with torch.no_grad():
        for index, block in enumerate(blocks):
            weights = block_weights(block, f"{prefix}.{index}")
            recorder = InputRecorder(weights, kind, stop_after_last=True)
            for number, batch in enumerate(hidden):
                with suppress(BlockDone):
                    arguments[index].run(block, batch, number)
                recorder.end_batch()
            recorder.close()
            for group in recorder.groups:
                for matrix in (weights[name].matrix for name in group.names):
                    matrix.copy_(prune(matrix, group.statistics, TWO_OF_FOUR) if group.statistics.num_tokens
                                 else magnitude(matrix, TWO_OF_FOUR))  # fmt: skip
            hidden = [arguments[index].run(block, batch, number) for number, batch in enumerate(hidden)]
            pruned.update(weights)
    return pruned


def groups_with_other_than_two(rows: Sequence[Sequence[float]]) -> int:
    return sum(sum(value != 0 for value in row[start : start + 4]) != 2
               for row in rows for start in range(0, len(row), 4))  # fmt: skip


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["GPT-2", *MIXTURES])
def test_whole_models(name: str, method: str, build: Build, batches: list[torch.Tensor]) -> None:
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = prune_all(model, batches, method)
    assert all(groups_with_other_than_two(weight.matrix.tolist()) == 0 for weight in weights.values())
    holders = {(id(weight.module), weight.key) for weight in weights.values()}
    for key, tensor in model.state_dict().items():
        module, _, last = key.rpartition(".")
        if (id(model.get_submodule(module)), last) not in holders:
            assert torch.equal(tensor, before[key]), key
    assert bool(model(input_ids=batches[0]).logits.isfinite().all())
