"""Step 1: is it right? Every check is also a test with the marker `cuda` (tests/test_gpu_benchmark.py)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from gpu.box import Box, Figures
from gpu.tiny import sparse_llama, write_checkpoint
from safetensors.torch import load_file
from torch import nn

from lors_cli.bench.model import _make_two_of_four
from lors_cli.models.packed.format import pack
from lors_cli.models.packed.kernels.triton_linear import packed_linear_cuda, unpack_cuda
from lors_cli.sparsity import TWO_OF_FOUR, Pattern
from lors_cli.tuning.head import causal_lm_loss
from lors_cli.tuning.kernels.masked_merge import how_merged, masked_merge_formula
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.kernels.triton_merge import masked_merge_kernel
from lors_cli.tuning.lors import LorsLinear, PackedLorsLinear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
"""Of ‖found − float64‖ / ‖float64‖."""


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64; NaN stays NaN."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm())


def worst(offs: Iterable[float]) -> float:
    """The largest; NaN where one is, which `max` may pass over."""
    return float(torch.tensor(list(offs), dtype=torch.float64).max())


def check(condition: bool, figures: Figures) -> Figures:
    """The figures of something that is right."""
    if not condition:
        raise AssertionError(f"wrong: {figures}")
    return figures


def merge_case(
    rows: int, columns: int, rank: int, dtype: torch.dtype, exact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A 2:4 weight, A and B; `exact`: their sums and products are so in float32, in whatever order they are added."""
    if exact:
        weight = torch.randint(-64, 65, (rows, columns)) / 64
        A, B = torch.randint(-2, 3, (rank, columns)) / 8, torch.randint(-8, 9, (rows, rank)) / 64
    else:
        weight, A, B = torch.randn(rows, columns), torch.randn(rank, columns), torch.randn(rows, rank) / 8
    weight = weight.to(dtype)
    _make_two_of_four(weight)
    return weight, A, B


def merges(device: torch.device, dtype_name: str, rounding: Rounding) -> Figures:
    """The kernel against the formula, bit by bit where sums are exact; else by how many bits of the last place."""
    dtype = DTYPES[dtype_name]
    shapes = [(70, 224, 5), (130, 1000, 80)] if device.type == "cuda" else [(70, 36, 5)]
    figures, offs = {"wrong_bits": 0, "packed_differs": 0}, list[float]()
    for rows, columns, rank in [*shapes, *([(1024, 4096, 16), (4096, 1024, 64)] if device.type == "cuda" else [])]:
        for exact in (True, False):
            weight, A, B = merge_case(rows, columns, rank, dtype, exact)
            if device.type != "cuda":  # Triton's interpreter cuts to bfloat16 where a GPU rounds
                A, B = A.to(dtype).float(), B.to(dtype).float()
            on_device = weight.to(device)
            plain, packed = (
                masked_merge_kernel(base, A.to(device), B.to(device), 0.25, torch.full_like(on_device, torch.nan),
                                    rounding=rounding).cpu()
                for base in (on_device, pack(on_device, TWO_OF_FOUR))
            )  # fmt: skip
            figures["packed_differs"] += int((plain != packed).sum()) + int(packed.isnan().sum())
            if exact and not (device.type == "cpu" and dtype == torch.bfloat16 and rounding == "nearest"):
                figures["wrong_bits"] += int((plain != masked_merge_formula(weight, A, B, 0.25, dtype, rounding)).sum())
            truth = weight.double() + 0.25 * (B.to(dtype).double() @ A.to(dtype).double())
            offs.append(off(plain, truth * (weight != 0)))
    good = figures["wrong_bits"] == figures["packed_differs"] == 0 and worst(offs) < LIMITS[dtype_name]
    return check(good, {**figures, "off": worst(offs)})


def packed_products(device: torch.device, dtype_name: str, pattern_name: str) -> Figures:
    """Products with packed weights against float64, the same bits again, and unpacking bit by bit.

    A kernel is compiled for every number of tokens and shape: all of them on the small shape in bfloat16 alone.
    """
    dtype, figures, offs = DTYPES[dtype_name], {"other_bits": 0, "unpacked_wrong": 0}, list[float]()
    pattern = None if pattern_name == "unstructured" else Pattern.parse(pattern_name)
    if device.type == "cuda":
        small, large = (9, 264) if pattern else (130, 1001), (4096, 4096)
    else:  # Triton's interpreter takes a millisecond a number
        small, large = (9, 264) if pattern else (18, 201), (6, 72)
    for rows, columns in (small, large):
        weight = torch.randn(rows, columns, device=device).to(dtype)
        if pattern is None:
            weight[torch.rand(rows, columns, device=device) < 0.5] = 0
            weight[1], weight[2] = 0, 1
        else:
            groups = torch.rand(rows, columns // pattern.m, pattern.m, device=device).argsort(-1).view(rows, columns)
            weight[groups >= pattern.n] = 0
        packed, exact = pack(weight, pattern), weight.double()
        found = unpack_cuda(packed, torch.full_like(weight, torch.nan))
        figures["unpacked_wrong"] += int((found != weight).sum())
        every = (rows, columns) == small and dtype == torch.bfloat16
        for tokens in (range(1, 9) if every else (1, 2, 3, 8)) if device.type == "cuda" else (1, 5):
            x, bias = torch.randn(tokens, columns, device=device).to(dtype), weight[:, 0].contiguous()
            y, again = packed_linear_cuda(x, packed, bias), packed_linear_cuda(x, packed, bias)
            figures["other_bits"] += int((y != again).sum())
            offs.append(off(y, x.double() @ exact.T + bias.double()))
    good = figures["other_bits"] == figures["unpacked_wrong"] == 0 and worst(offs) < LIMITS[dtype_name]
    return check(good, {**figures, "off": worst(offs)})


def hints(device: torch.device) -> Figures:
    """What the launcher made of real tensors: spills, registers, and whether loads are 16 bytes wide."""
    from lors_cli.tuning.kernels import triton_merge

    figures: Figures = {"merged_by": how_merged(device, torch.bfloat16)}
    weight, A, B = merge_case(*((512, 4096) if device.type == "cuda" else (64, 128)), 16, torch.bfloat16, False)
    for name, base in (("plain", weight.to(device)), ("packed", pack(weight.to(device), TWO_OF_FOUR))):
        grid, call = triton_merge.launch(base, A.to(device), B.to(device), 0.5, torch.empty_like(weight, device=device),
                                    "stochastic")  # fmt: skip
        kernel = triton_merge._merge[grid](**call)
        if device.type == "cuda":
            figures[name] = {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared,
                             "wide_loads": kernel.asm["ptx"].count("ld.global.v4")}  # fmt: skip
            check(kernel.n_spills == 0 and figures[name]["wide_loads"] >= 3, figures)
    return check(device.type == "cpu" or figures["merged_by"] == "one CUDA kernel", figures)


def layers(device: torch.device, dtype_name: str) -> Figures:
    """LoRS forward and backward, plain and packed, against float64 with the layer's own merged weight."""
    dtype = DTYPES[dtype_name]
    out_features, in_features, tokens = (384, 512, 256) if device.type == "cuda" else (48, 32, 8)
    figures: Figures = {}
    for name, kind in (("plain", LorsLinear), ("packed", PackedLorsLinear)):
        torch.manual_seed(0)
        linear = nn.Linear(in_features, out_features, bias=False)
        _make_two_of_four(linear.weight)
        layer = kind(linear.to(device, dtype).requires_grad_(False), 16, 16.0).to(device)
        layer.rounding = "stochastic"
        nn.init.normal_(layer.lora_B, std=0.02)
        x = torch.randn(2, tokens, in_features).to(device, dtype).requires_grad_(True)
        dY = torch.randn(2, tokens, out_features).to(device, dtype)
        y = layer(x)
        y.backward(dY)
        X, D = x.detach().double().cpu().flatten(0, 1), dY.double().cpu().flatten(0, 1)
        W_t, A, B = (value.detach().double().cpu() for value in (layer.merged_weight(), layer.lora_A, layer.lora_B))
        assert x.grad is not None
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad is not None
        figures[name] = {
            "Y": off(y.flatten(0, 1), X @ W_t.T), "dX": off(x.grad.flatten(0, 1), D @ W_t),
            "dA": off(layer.lora_A.grad, layer.scale * (D @ B).T @ X),
            "dB": off(layer.lora_B.grad, layer.scale * D.T @ (X @ A.T)),
        }  # fmt: skip
    offs = [value for errors in figures.values() for value in errors.values()]
    return check(worst(offs) < LIMITS[dtype_name], figures)


def one_step(device: torch.device) -> Figures:
    """Loss, gradients and one AdamW step of a tiny float32 Llama against the CPU's."""
    found = []
    for place in (torch.device("cpu"), device):
        model, adapters = sparse_llama(place)
        ids = torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(1)).to(place)
        optimizer = torch.optim.AdamW(adapters, lr=1e-3, eps=1e-4)
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        gradients = torch.cat([adapter.grad.flatten().cpu() for adapter in adapters if adapter.grad is not None])
        optimizer.step()
        found.append((loss.item(), gradients, torch.cat([adapter.detach().flatten().cpu() for adapter in adapters])))
    (loss, gradients, after), (own_loss, own_gradients, own_after) = found
    figures = {"loss": abs(own_loss - loss), "gradients": off(own_gradients, gradients), "after": off(own_after, after)}
    return check(figures["loss"] < 1e-5 and figures["gradients"] < 1e-4 and figures["after"] < 1e-4, figures)


def compiled(device: torch.device) -> Figures:
    """A layer under torch.compile has the bits of the same layer without it."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=False)
    _make_two_of_four(linear.weight)
    layer = LorsLinear(linear.to(device, torch.bfloat16).requires_grad_(False), 8, 8.0).to(device)
    layer.rounding = "stochastic"
    nn.init.normal_(layer.lora_B, std=1e-3)
    faster = torch.compile(layer, backend="inductor" if device.type == "cuda" else "aot_eager", fullgraph=True)
    x, x2 = (
        torch.linspace(-1, 1, 32 * 256).view(32, 256).to(device, torch.bfloat16).requires_grad_() for _ in range(2)
    )
    y, expected = faster(x), layer(x2)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad is not None
    assert x2.grad is not None
    figures = {"Y": off(y, expected), "dX": off(x.grad, x2.grad), "equal_share": float((y == expected).double().mean())}
    return check(figures["Y"] < 1e-2 and figures["dX"] < 2e-2, figures)


def resumed(device: torch.device) -> Figures:
    """`tune` gone on with from a checkpoint ends in the bytes of the run that was not stopped."""
    from lors_cli.machine.determinism import determinism
    from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
    from lors_cli.tuning.stage import tune

    with tempfile.TemporaryDirectory() as name, determinism(True):
        folder = Path(name)
        write_checkpoint(folder / "sparse", sparse=True)
        config = TuneConfig(rank=4, alpha=4, max_steps=4, save_steps=2, batch_size=4, per_device_batch_size=2,
                            init_samples=2, learning_rate=1e-3, merged_cache="on",
                            data=TuneDataConfig(dataset=str(folder / "sparse" / "train.jsonl")))  # fmt: skip
        model = ModelConfig(path=str(folder / "sparse"), dtype="bfloat16", device=device.type)
        tune(config, model, folder / "whole")
        shutil.copytree(folder / "whole/checkpoints/checkpoint-2", folder / "stopped/checkpoints/checkpoint-2")
        tune(config, model, folder / "stopped")
        paths = [folder / run / "adapter/adapter_model.safetensors" for run in ("whole", "stopped")]
        adapters = [load_file(path) for path in paths]
        differ = [name for name, tensor in adapters[0].items() if not torch.equal(tensor, adapters[1][name])]
    return check(not differ, {"adapters": len(adapters[0]), "differ": differ[:4]})


CHECKS: dict[str, Callable[[torch.device], Figures]] = {
    **{f"merge {name} {rounding}": lambda device, name=name, rounding=rounding: merges(device, name, rounding)  # type: ignore[misc]
       for name in DTYPES for rounding in ("nearest", "stochastic") if rounding == "nearest" or name == "bfloat16"},
    "hints": hints,
    **{f"layer {name}": lambda device, name=name: layers(device, name) for name in DTYPES},  # type: ignore[misc]
    "one step": one_step,
    "resumed": resumed,
    "compiled": compiled,
    **{f"packed products {name} {pattern}":
       lambda device, name=name, pattern=pattern: packed_products(device, name, pattern)  # type: ignore[misc]
       for name in DTYPES for pattern in ("2:4", "unstructured", "4:8", "1:4")},
}  # fmt: skip


def run(box: Box) -> None:
    """All checks; those that a killed step does not come to are in the file too."""
    box.items.update({name: {"left_out": "the step ended before it did"} for name in CHECKS})
    box.write()
    for name, verify in CHECKS.items():
        torch.manual_seed(0)
        box.item(name, lambda verify=verify: verify(box.device), needs_s=5)  # type: ignore[misc]
