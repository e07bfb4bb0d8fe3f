"""Blocks run one at a time give what the whole model gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lors_cli.models.blocks import decoder_blocks
from lors_cli.pruning.stage import prune
from lors_cli.pruning.walk.calibration import capture
from lors_cli.recipe.schema import CalibrationConfig, PruneConfig

Build = Callable[..., PreTrainedModel]


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
    streams = (4,) if architecture == "Gemma3n" else ()
    assert [tuple(batch.shape) for batch in hidden] == [(*streams, size, 24, 32) for size in (4, 4, 2)]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            hidden = [arguments[index].run(block, batch, number) for number, batch in enumerate(hidden)]
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


def test_the_card_of_a_model_calibrated_on_another_split(checkpoint: Path, tmp_path: Path, shared_dir: Path) -> None:
    """The card asked for the split train, which need not be there, when all blocks were pruned."""
    folder = tmp_path / "data" / "slimpajama_like"
    folder.mkdir(parents=True)
    shutil.copy(shared_dir / "data" / "slimpajama_like" / "validation.jsonl.gz", folder)
    text = CalibrationConfig(dataset="slimpajama", split="validation", num_samples=2, sequence_length=16)
    prune(PruneConfig(method="wanda", calibration=text), checkpoint, tmp_path / "out", data_dir=tmp_path / "data")
    assert "calibrated on slimpajama" in (tmp_path / "out" / "README.md").read_text()
