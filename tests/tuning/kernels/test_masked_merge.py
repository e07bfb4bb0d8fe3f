"""How often the merged weight is built, that it is never out of date, and that keeping it changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lors_cli.machine import processes
from lors_cli.models.packed.format import Packed, pack
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels import cache as merged_cache
from lors_cli.tuning.kernels import masked_merge as merging
from lors_cli.tuning.kernels import scratch as kernels_scratch
from lors_cli.tuning.kernels.cache import Keep, cache_policy
from lors_cli.tuning.kernels.masked_merge import masked_merge, masked_merge_formula
from lors_cli.tuning.kernels.scratch import scratch
from lors_cli.tuning.lors import LorsLinear, keep_merged


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every merged weight that is built: its number of rows."""
    built: list[int] = []
    plain = masked_merge

    def counting(weight: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        built.append(weight.shape[0])
        return plain(weight, *args, **options)

    monkeypatch.setattr(merged_cache, "masked_merge", counting)
    return built


def _model(keep: Keep) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for rows, columns in ((24, 16), (16, 24)):
        linear = nn.Linear(columns, rows)
        linear.weight.data[:, ::2] = 0
        layers.append(LorsLinear(linear, 4, 4.0))
        nn.init.normal_(layers[-1].lora_B)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    keep_merged(model, keep)
    return model


def _train(keep: Keep, *, checkpointed: bool) -> list[torch.Tensor]:
    """Two steps of two micro-batches; every adapter at the end."""
    model = _model(keep)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    torch.manual_seed(1)
    for _ in range(2):
        for _ in range(2):
            x = torch.randn(5, 16, requires_grad=True)
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_keeping_changes_no_bit(checkpointed: bool) -> None:
    never = _train("never", checkpointed=checkpointed)
    for keep in ("recompute", "always"):
        assert all(torch.equal(*pair) for pair in zip(never, _train(keep, checkpointed=checkpointed), strict=True))


@pytest.mark.parametrize(
    ("keep", "checkpointed", "expected"),
    [
        ("never", False, 2 * 2 * 2 * 2),  # layers × steps × micro-batches × (forward, backward)
        ("never", True, 2 * 2 * 2 * 3),  # forward twice
        ("recompute", False, 2 * 2 * 2 * 2),
        ("recompute", True, 2 * 2 * 2 * 2),  # the second forward's is the backward's too
        ("always", False, 2 * 2),
        ("always", True, 2 * 2),
    ],
)
def test_how_often_it_is_built(keep: Keep, checkpointed: bool, expected: int, builds: list[int]) -> None:
    _train(keep, checkpointed=checkpointed)
    assert len(builds) == expected


def test_with_recompute_nothing_is_held_once_the_backward_pass_is_over() -> None:
    model = _model("recompute")
    x = torch.randn(5, 16, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(layer.cache._merged is None for layer in model if isinstance(layer, LorsLinear))


def test_every_change_of_an_adapter_is_seen() -> None:
    layer = _model("always")[0]
    x = torch.randn(3, 16)
    with torch.no_grad():
        for change in (
            lambda: layer.lora_A.mul_(2),
            lambda: layer.lora_B.add_(1),
            lambda: setattr(layer, "lora_B", nn.Parameter(torch.randn(24, 4))),
            lambda: layer.load_state_dict({**layer.state_dict(), "lora_A": torch.randn(4, 16)}),
            lambda: layer.weight.mul_(2),
        ):
            layer(x)
            change()
            assert torch.equal(layer(x), layer.to_linear()(x))


def test_scratch_memory_is_shared_and_grows_to_the_largest() -> None:
    small = scratch(torch.Size((3, 4)), torch.float32, torch.device("cpu"))
    large = scratch(torch.Size((300, 40)), torch.float32, torch.device("cpu"))
    again = scratch(torch.Size((4, 3)), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == large.data_ptr()
    assert small.shape == (3, 4)
    assert scratch(torch.Size((4, 3)), torch.bfloat16, torch.device("cpu")).data_ptr() != again.data_ptr()


def test_scratch_made_under_inference_mode_serves_training_too() -> None:
    kernels_scratch._scratch.clear()
    model = _model("never")
    with torch.inference_mode():
        model(torch.randn(2, 16))
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()


def test_how_weights_are_merged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert merging.how_merged(cpu, torch.float64).startswith("one addmm and a mask (no C kernel: it does not know")
    monkeypatch.setattr(merging, "_addmm_rounds_once", lambda *_: False)
    assert "float32 tiles" in merging.how_merged(cpu, torch.bfloat16)
    gpu = torch.device("cuda")
    monkeypatch.setattr(merging, "why_no_cuda_kernel", lambda *_: "too old")
    assert merging.how_merged(gpu, torch.bfloat16).startswith("float32 tiles (no CUDA kernel: too old")
    monkeypatch.setattr(merging, "why_no_cuda_kernel", lambda *_: "")
    assert merging.how_merged(gpu, torch.bfloat16) == "one CUDA kernel"
    weight = torch.tensor([[1.0, 0, 0, 2], [0, 3, 4, 0]]).to(torch.bfloat16)
    monkeypatch.setattr(Packed, "device", gpu)
    for pattern, before in ((TWO_OF_FOUR, ""), (None, "unpacking, then ")):
        said = merging.how_merged(gpu, torch.bfloat16, weight=pack(weight, pattern))
        assert said == f"{before}one CUDA kernel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_formula_for_compilers_gives_the_same_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 32).to(dtype)
    weight[:, ::2] = 0
    A, B = torch.randn(4, 32), torch.randn(40, 4)
    expected = masked_merge(weight, A, B, 0.5)
    torch.testing.assert_close(masked_merge_formula(weight, A, B, 0.5, dtype), expected, rtol=0, atol=0)


def test_it_compiles_without_graph_breaks() -> None:
    model, plain = _model("never"), _model("never")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, x2 = (torch.arange(80.0).view(5, 16).div(80).requires_grad_() for _ in range(2))
    y, expected = compiled(x), plain(x2)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_policy_follows_free_memory_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    size, cpu = 16 << 20, torch.device("cpu")
    free = monkeypatch.setattr
    for available, checkpointing, expected in ((1 << 30, False, "always"), (1 << 20, False, "never"),
                                               (1 << 20, True, "recompute")):  # fmt: skip
        free("psutil.virtual_memory", lambda available=available: type("Memory", (), {"available": available}))
        keep, reason = cache_policy(size, cpu, "auto", checkpointing=checkpointing)
        assert keep == expected
        assert "free" in reason
    free("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 27}))
    for number, expected in ((1, "always"), (4, "never")):  # the memory is that of all processes of the machine
        free(processes, "num_local_processes", lambda number=number: number)
        assert cache_policy(size, cpu, "auto", checkpointing=False)[0] == expected
    assert cache_policy(size, cpu, "on", checkpointing=False)[0] == "always"
    assert cache_policy(size, cpu, "off", checkpointing=True)[0] == "never"
