"""Blocks run one at a time give what the whole model gives, and linears that share an input are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.errors import UsageError
from lors_cli.models import block_linears, decoder_blocks
from lors_cli.pruning.calibration import BlockArguments, InputRecorder, capture

Build = Callable[..., PreTrainedModel]
GROUPS = {
    "Phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "OPT": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "GPT-NeoX": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}
LLAMA_LIKE = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The first output of every call of the modules, by a plain hook."""
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(
        lambda _module, _args, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    ) for module in modules]  # fmt: skip
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_by_block_is_bit_equal_to_a_full_forward(
    architecture: str, dtype: torch.dtype, build: Build, batches: list[torch.Tensor]
) -> None:
    model = build(architecture)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    _, blocks = decoder_blocks(model)
    with torch.no_grad(), outputs_of(list(blocks)) as expected:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    hidden, arguments = capture(model, list(blocks), batches)
    assert [tuple(batch.shape) for batch in hidden] == [(4, 24, 32), (4, 24, 32), (2, 24, 32)]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            hidden = [arguments[index].run(block, batch) for batch in hidden]
            for number, batch in enumerate(hidden):
                assert torch.equal(batch, expected[number * len(blocks) + index])


def test_the_model_is_as_before_after_capture(architecture: str, build: Build, batches: list[torch.Tensor]) -> None:
    model = build(architecture)
    _, blocks = decoder_blocks(model)
    before = model(input_ids=batches[0]).logits
    capture(model, list(blocks), batches)
    assert all("forward" not in vars(block) for block in blocks)
    assert torch.equal(model(input_ids=batches[0]).logits, before)


def test_a_failing_model_gets_its_forward_back(build: Build) -> None:
    model = build()
    _, blocks = decoder_blocks(model)
    with pytest.raises(IndexError):
        capture(model, list(blocks), [torch.tensor([[10**6]])])
    assert all("forward" not in vars(block) for block in blocks)


def test_a_wrapped_forward_stays_wrapped(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    _, blocks = decoder_blocks(model)
    wrapped = blocks[0].forward
    blocks[0].forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    mine = blocks[0].forward
    capture(model, list(blocks), batches)
    assert blocks[0].forward is mine


def record(
    model: PreTrainedModel, batches: list[torch.Tensor]
) -> tuple[InputRecorder, list[torch.Tensor], nn.Module, BlockArguments]:
    """Run the first block on every batch, listening at its linears."""
    prefix, blocks = decoder_blocks(model)
    hidden, arguments = capture(model, list(blocks), batches)
    recorder = InputRecorder(block_linears(blocks[0], f"{prefix}.0"), "hessian")
    with torch.no_grad():
        for batch in hidden:
            arguments[0].run(blocks[0], batch)
            recorder.end_batch()
    return recorder, hidden, blocks[0], arguments[0]


def test_groups_are_the_linears_that_read_one_tensor(
    architecture: str, build: Build, batches: list[torch.Tensor]
) -> None:
    recorder, *_ = record(build(architecture), batches)
    found = [sorted(name.rpartition(".")[2] for name in group.names) for group in recorder.groups]
    assert sorted(found) == sorted(sorted(group) for group in GROUPS.get(architecture, LLAMA_LIKE))


def test_statistics_of_every_linear_are_those_of_its_own_inputs(
    architecture: str, build: Build, batches: list[torch.Tensor]
) -> None:
    model = build(architecture)
    recorder, hidden, block, arguments = record(model, batches)
    recorder.close()
    prefix, _ = decoder_blocks(model)
    for group in recorder.groups:
        for name in group.names:
            linear = block_linears(block, f"{prefix}.0")[name]
            seen: list[torch.Tensor] = []
            with linear.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0].clone())):
                with torch.no_grad():
                    for batch in hidden:
                        arguments.run(block, batch)
            X = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in seen]).double()
            assert group.statistics.num_tokens == len(X) == 240
            assert group.statistics.total is not None
            torch.testing.assert_close(group.statistics.total.double(), X.T @ X, rtol=1e-4, atol=1e-3)


def test_close_removes_every_hook(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    recorder, *_ = record(model, batches)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == len(recorder.groups)
    recorder.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    unused = InputRecorder(block_linears(model.model.layers[0], "x"), "norm")
    unused.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_linear_that_is_never_called_is_named(build: Build, batches: list[torch.Tensor]) -> None:
    model = build()
    model.model.layers[0].spare = nn.Linear(32, 32)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.spare is never called"):
        record(model, batches)
