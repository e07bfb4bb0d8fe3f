"""Permutations against all there are, and blocks that compute what they did after one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.methods import permutation as module
from lors_cli.pruning.methods.permutation import find_permutation, retained
from lors_cli.pruning.walk.calibration import BlockArguments, capture
from lors_cli.pruning.walk.free_inputs import FreeInput, Producer, apply_permutation, find_for, free_inputs
from lors_cli.sparsity import Pattern, keep_largest

TWO_OF_FOUR = Pattern.parse("2:4")
Build = Callable[..., PreTrainedModel]


def channels(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Scores whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator).abs()
    return scores * torch.randn(columns, generator=generator).exp()


def kept_by_sorting(scores: torch.Tensor, pattern: Pattern, order: Sequence[int]) -> float:
    """Row by row and group by group, in plain Python."""
    assert pattern.n
    assert pattern.m
    total = 0.0
    for row in scores.tolist():
        for start in range(0, len(order), pattern.m):
            group = sorted(row[channel] for channel in order[start : start + pattern.m])
            total += sum(group[-pattern.n :])
    return total


def all_groupings(left: list[int], m: int) -> Iterator[list[int]]:
    """Every way of splitting channels into groups of m, as an order."""
    if not left:
        yield []
        return
    first, *others = left
    for mates in itertools.combinations(others, m - 1):
        for rest in all_groupings([channel for channel in others if channel not in mates], m):
            yield [first, *mates, *rest]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "2:8", "5:8"])
def test_retained_is_what_keep_largest_keeps(pattern: str) -> None:
    parsed, scores = Pattern.parse(pattern), channels(5, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for permutation in (None, order):
        moved = scores if permutation is None else scores[:, permutation]
        masked = float((moved * keep_largest(moved, parsed, per_row=True)).double().sum())
        assert retained(scores, parsed, permutation) == pytest.approx(masked, rel=1e-12)
    assert retained(scores, parsed, order) == pytest.approx(kept_by_sorting(scores, parsed, order.tolist()), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("pattern", "columns"), [("2:4", 8), ("1:4", 8), ("3:4", 8), ("1:2", 8), ("1:3", 9), ("3:6", 6), ("2:4", 12)]
)
def test_the_best_of_all_permutations_is_nearly_reached(pattern: str, columns: int, seed: int) -> None:
    parsed, scores = Pattern.parse(pattern), channels((2, 8, 24)[seed % 3], columns, seed)
    assert parsed.m
    best = max(kept_by_sorting(scores, parsed, order) for order in all_groupings(list(range(columns)), parsed.m))
    found = find_permutation(scores, parsed)
    assert sorted(found.tolist()) == list(range(columns))
    reached = kept_by_sorting(scores, parsed, found.tolist())
    assert reached >= 0.99 * best
    assert reached >= kept_by_sorting(scores, parsed, range(columns)) * (1 - 1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:16"])
def test_groups_that_exchange_in_parts_lose_little(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, scores = Pattern.parse(pattern), channels(24, 256)
    before = retained(scores, parsed)
    whole = retained(scores, parsed, find_permutation(scores, parsed))
    monkeypatch.setattr(module, "MAX_GROUPS", 7)
    parts = retained(scores, parsed, find_permutation(scores, parsed))
    assert before < parts
    assert whole - parts < 0.2 * (whole - before)


def test_every_exchange_is_the_best_assignment() -> None:
    scores = channels(6, 16)
    groups = torch.randperm(16, generator=torch.Generator().manual_seed(2)).view(4, 4)
    taken, others = groups[:, 1].tolist(), groups[:, [0, 2, 3]].tolist()
    expected = max(
        kept_by_sorting(scores, TWO_OF_FOUR, [c for one, rest in zip(dealt, others, strict=True) for c in [one, *rest]])
        for dealt in itertools.permutations(taken)
    )
    before = retained(scores, TWO_OF_FOUR, groups.flatten())
    gain = module._exchange(scores.T.contiguous(), groups, 1, TWO_OF_FOUR)
    assert retained(scores, TWO_OF_FOUR, groups.flatten()) == pytest.approx(expected, rel=1e-6)
    assert gain == pytest.approx(expected - before, abs=1e-4)
    assert gain > 0


def test_the_same_scores_have_the_same_permutation_whatever_the_seed() -> None:
    scores = channels(16, 64)
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), find_permutation(scores, TWO_OF_FOUR)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(find_permutation(scores, TWO_OF_FOUR), first)
    assert torch.equal(find_permutation(scores.clone().requires_grad_(), TWO_OF_FOUR), first)


@pytest.mark.parametrize("columns", [4, 32])
def test_where_nothing_is_to_gain_the_order_stays(columns: int) -> None:
    scores = torch.tensor([9.0, 9.0, 1.0, 1.0]).repeat(8, columns // 4)
    assert find_permutation(scores, TWO_OF_FOUR).tolist() == list(range(columns))


def test_channels_that_are_large_together_are_dealt_out() -> None:
    # The first half of the channels is large: side by side, every second of them would have to go.
    scores = channels(32, 64) / channels(32, 64).sum(0)
    scores[:, :32] *= 100
    found = find_permutation(scores, TWO_OF_FOUR)
    assert ((found.view(-1, 4) < 32).sum(1) == 2).all()
    large = float(scores[:, :32].sum())
    assert retained(scores, TWO_OF_FOUR) < 0.8 * large
    assert retained(scores, TWO_OF_FOUR, found) >= large


def random_order(free: FreeInput) -> torch.Tensor:
    """Every segment in a random order of its own."""
    generator = torch.Generator().manual_seed(5)
    order = torch.arange(sum(len(part) for tied in free.segments for part in tied))
    for tied in free.segments:
        local = torch.randperm(len(tied[0]), generator=generator)
        for part in tied:
            order[torch.tensor(part)] = torch.tensor(part)[local]
    return order


def first_block(model: PreTrainedModel, batches: list[torch.Tensor]) -> tuple[nn.Module, torch.Tensor, BlockArguments]:
    """A float64 block with random biases and norms, and its inputs."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.double()
    _, blocks = decoder_blocks(model)
    hidden, arguments = capture(model, list(blocks), batches)
    return blocks[0], hidden[0], arguments[0]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64)
    config.initializer_range = 0.2
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Llama": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Llama with biases": (["self_attn.o_proj", "mlp.down_proj"], {"attention_bias": True, "mlp_bias": True}),
    "Llama with one KV head": (["self_attn.o_proj", "mlp.down_proj"], {"num_key_value_heads": 1}),
    "Llama without GQA": (["self_attn.o_proj", "mlp.down_proj"], {"num_key_value_heads": 4}),
    "Mistral": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Qwen2": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Qwen3": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Gemma": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Gemma2": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Gemma3": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "Phi3": (["mlp.down_proj"], {}),
    "OPT": (["fc2", "self_attn.out_proj"], {}),
    "GPT-NeoX": (["mlp.dense_4h_to_h"], {}),
    "GPT-2": (["mlp.c_proj"], {}),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_block_computes_what_it_did(family: str, build: Build, batches: list[torch.Tensor]) -> None:
    names, changes = MODELS[family]
    model = gpt2() if family == "GPT-2" else build(family.split()[0], **changes)
    block, hidden, arguments = first_block(model, batches)
    free = free_inputs(block)
    assert sorted(each.name for each in free) == sorted(names)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    biases = [name for name in before if name.endswith("bias")]
    with torch.no_grad():
        expected = arguments.run(block, hidden, 0)
        for each in free:
            assert block.get_submodule(each.name) is each.consumer
            apply_permutation(each, random_order(each))
            assert not torch.equal(each.consumer.weight, before[f"{each.name}.weight"])
            for producer in each.producers:
                name = next(name for name, other in block.named_modules() if other is producer.module)
                assert not torch.equal(producer.module.weight, before[f"{name}.weight"])
                assert f"{name}.bias" not in biases or not torch.equal(producer.module.bias, before[f"{name}.bias"])
        difference = (arguments.run(block, hidden, 0) - expected).abs().max()
        assert float(difference / expected.abs().max()) < 1e-12
        apply_permutation(free[0], random_order(free[0]))
        moved = free[0].producers[0].module
        moved.weight.data.copy_(
            before[next(name for name, other in block.named_modules() if other is moved) + ".weight"]
        )
        assert float((arguments.run(block, hidden, 0) - expected).abs().max()) > 1e-3  # the comparison can fail


def test_the_whole_model_computes_what_it_did(architecture: str, build: Build, batches: list[torch.Tensor]) -> None:
    model = build(architecture)
    expected = model(input_ids=batches[0]).logits
    for block in decoder_blocks(model)[1]:
        for free in free_inputs(block):
            apply_permutation(free, random_order(free))
    torch.testing.assert_close(model(input_ids=batches[0]).logits, expected, rtol=1e-3, atol=1e-4)


def test_heads_of_one_group_are_tied_and_their_scores_searched_together(build: Build) -> None:
    free = {each.name: each for each in free_inputs(decoder_blocks(build("Llama"))[1][0])}
    attention, mlp = free["self_attn.o_proj"], free["mlp.down_proj"]
    assert attention.segments == ((range(8), range(8, 16)), (range(16, 24), range(24, 32)))
    assert attention.producers[0].rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    assert mlp.segments == ((range(64),),)

    scores = channels(32, 32)
    found = find_for(attention, scores, TWO_OF_FOUR)
    for start in (0, 16):
        first, second = found[start : start + 8] - start, found[start + 8 : start + 16] - start - 8
        assert torch.equal(first, second)
        assert sorted(first.tolist()) == list(range(8))
        stacked = torch.cat([scores[:, start : start + 8], scores[:, start + 8 : start + 16]])
        orders = all_groupings(list(range(8)), 4)
        best = max(kept_by_sorting(stacked, TWO_OF_FOUR, order) for order in orders)
        assert kept_by_sorting(stacked, TWO_OF_FOUR, first.tolist()) >= 0.99 * best
    assert retained(scores, TWO_OF_FOUR, found) > retained(scores, TWO_OF_FOUR)


def test_heads_that_groups_would_straddle_stay(build: Build) -> None:
    model = build("Qwen3", head_dim=6)
    free = {each.name: each for each in free_inputs(decoder_blocks(model)[1][0])}["self_attn.o_proj"]
    assert find_for(free, channels(32, 24), TWO_OF_FOUR).tolist() == list(range(24))
    assert find_for(free, channels(32, 24), Pattern.parse("1:3")).tolist() != list(range(24))


def test_heads_that_share_values_cannot_be_permuted_apart(build: Build) -> None:
    free = {each.name: each for each in free_inputs(decoder_blocks(build("Llama"))[1][0])}["self_attn.o_proj"]
    with pytest.raises(AssertionError, match="share a KV head"):
        apply_permutation(free, torch.tensor([1, 0, *range(2, 32)]))


def test_modules_with_more_in_between_are_left_alone(build: Build) -> None:
    block = decoder_blocks(build("Llama"))[1][0]
    block.mlp.ffn_sub_norm = nn.LayerNorm(64)
    assert [free.name for free in free_inputs(block)] == ["self_attn.o_proj"]
    block.self_attn.gate = nn.Parameter(torch.ones(32))
    assert free_inputs(block) == []
    gated = decoder_blocks(build("Llama"))[1][0]  # Qwen3-Next's q_proj makes queries and a gate on the output
    gated.self_attn.q_proj = nn.Linear(32, 64)
    assert [free.name for free in free_inputs(gated)] == ["mlp.down_proj"]


def test_pruned_in_a_better_order_more_of_the_weight_is_left() -> None:
    # Hidden channels in runs of eight: three in four runs are ten times smaller.
    generator = torch.Generator().manual_seed(6)
    sizes = torch.tensor([1.0, 0.1, 0.1, 0.1]).repeat_interleave(8).repeat(2)
    first, second = nn.Linear(16, 64), nn.Linear(64, 12)
    second.weight.data.copy_(torch.randn(12, 64, generator=generator) * sizes)
    free = FreeInput("fc2", second, (Producer(first, torch.arange(64)),), ((range(64),),))
    first.requires_grad_(False)
    second.requires_grad_(False)
    x = torch.randn(40, 16, generator=generator)
    expected = second(first(x).relu())

    def pruned_error() -> tuple[float, float]:
        weight = second.weight
        pruned = weight * keep_largest(weight.abs(), TWO_OF_FOUR, per_row=True)
        hidden = first(x).relu()
        return float(pruned.abs().sum()), float((hidden @ (pruned - weight).T).square().sum())

    kept, error = pruned_error()
    apply_permutation(free, find_for(free, second.weight.abs(), TWO_OF_FOUR))
    torch.testing.assert_close(second(first(x).relu()), expected)
    kept_after, error_after = pruned_error()
    assert kept_after > 1.2 * kept
    assert error_after < 0.5 * error
