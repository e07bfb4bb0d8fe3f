"""`lors bench --decode`: dense and packed are the same model, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lors_cli.bench import decode as benchmark
from lors_cli.bench.decode import DecodeConfig, bench_decode
from lors_cli.cli.app import app
from lors_cli.cli.views.bench import decode_rows, decode_settings, parse_flags
from lors_cli.errors import UsageError
from lors_cli.grid import GridSpec, fit_grid
from lors_cli.models.grids import save_grids
from lors_cli.models.packed.linear import PackedLinear
from lors_cli.models.packed.stage import pack_model
from lors_cli.models.shapes import SHAPES, Shape
from lors_cli.recipe.packing import PackConfig
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import Pattern, keep_largest, num_violations

LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
OTHERS = 2 * 96 * 64 + (2 * 2 + 1) * 64
"""Weights of embeddings, head and norms."""
GIVEN = {"batch_size": 1, "rounds": 1, "dtype": "float32", "device": "cpu"}
"""Flags that always have a value."""


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(("nobody/tiny",), 64, 128, 2, 4, 2, 96, 128))


def _config(**changes: object) -> DecodeConfig:
    return DecodeConfig(**{"shape": "tiny", "lengths": (8, 24), "tokens": 5, "rounds": 2, "device": "cpu",
                           "dtype": "float32", **changes})  # fmt: skip


@pytest.fixture
def sparse(checkpoint: Path) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor * keep_largest(tensor.abs(), Pattern.parse("2:4"), per_row=False)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def test_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench_decode(_config())
    assert list(found["cells"]) == ["decode 5 tokens", "prefill 8 tokens", "prefill 24 tokens"]
    for name, cell in found["cells"].items():
        tokens = 1 if name.startswith("decode") else int(name.split()[1])
        for arm in ("dense", "packed"):
            figures = cell[arm]
            assert figures["tokens_per_s"]["max"] == pytest.approx(1000 * tokens / figures["ms"]["min"], rel=0.01)
        ratio, extremes = cell["dense_over_packed"], [cell[arm]["ms"] for arm in ("dense", "packed")]
        assert extremes[0]["min"] / extremes[1]["max"] * 0.99 <= ratio["min"] <= ratio["median"] <= ratio["max"]
        assert cell["load_average"] >= 0
    json.dumps(found)
    rows = decode_rows(found)
    assert rows[0][0] == "decode 5 tokens, tokens/s"
    assert rows[-2][1] == f"{4 * (LINEARS + OTHERS) / 1e6:,.1f} MB"


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", LINEARS // 2), ("unstructured", None)])
def test_sizes_are_those_of_the_format(pattern: str, kept: int | None) -> None:
    """Kept values, 32 more a linear, and a bit a place; C is a multiple of 32."""
    sizes = bench_decode(_config(lengths=(), pattern=pattern, rounds=1, dtype="bfloat16"))["sizes"]
    assert sizes["pattern"] == pattern
    assert sizes["packed_linears_bytes"]["dense"] == 2 * LINEARS
    values = sizes["packed_linears_bytes"]["packed"] - LINEARS // 8 - 14 * 32 * 2
    assert values == pytest.approx(LINEARS, rel=1e-9 if kept else 0.05)
    assert sizes["bytes"]["dense"] == 2 * (LINEARS + OTHERS)
    assert sizes["bytes"]["dense"] - sizes["bytes"]["packed"] == 2 * LINEARS - sizes["packed_linears_bytes"]["packed"]


def test_both_arms_write_the_same_text_with_their_own_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := benchmark.why_none(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    seen: list[tuple[bool, list[int]]] = []
    plain = benchmark._generate

    def watching(model: torch.nn.Module, prompt: torch.Tensor, tokens: int, clock: object) -> tuple[float, float]:
        packed = [isinstance(module, PackedLinear) for name, module in model.named_modules() if "_proj" in name]
        assert len(set(packed)) == 1
        text = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        seen.append((packed[0], text[0].tolist()))
        return plain(model, prompt, tokens, clock)

    monkeypatch.setattr(benchmark, "_generate", watching)
    bench_decode(_config(lengths=(), rounds=3))
    assert [packed for packed, _ in seen] == [False, True, True, False, False, True, True, False]
    assert len({tuple(text) for _, text in seen}) == 1


@pytest.mark.parametrize(("bits", "dtype"), [(4, "bfloat16"), (8, "bfloat16"), (4, "float32")])
def test_a_shape_s_weights_of_few_bits(bits: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, a bit a place, scales of each row's groups of 32 and 32 bytes more a linear; the text stays the same."""
    texts: list[list[int]] = []
    plain = benchmark._generate

    def watching(model: torch.nn.Module, prompt: torch.Tensor, tokens: int, clock: object) -> tuple[float, float]:
        held = model.get_submodule("model.layers.1.mlp.down_proj")
        assert isinstance(held, PackedLinear) == (False, True, True, False)[len(texts)]
        assert not isinstance(held, PackedLinear) or held.weight.dtype == torch.uint8
        weight = held.unpacked().weight if isinstance(held, PackedLinear) else held.weight
        texts.append(weight.flatten().tolist())
        return plain(model, prompt, tokens, clock)

    monkeypatch.setattr(benchmark, "_generate", watching)
    found = bench_decode(_config(lengths=(), rounds=1, bits=bits, group_size=32, dtype=dtype))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len(set(texts[0])) > 32 * 2
    itemsize = 2 if dtype == "bfloat16" else 4
    scales = LINEARS // 32 * itemsize
    assert found["sizes"]["pattern"] == "2:4"
    assert found["sizes"]["packed_linears_bytes"] == {
        "dense": itemsize * LINEARS, "packed": LINEARS // 2 * bits // 8 + LINEARS // 8 + scales + 14 * 32
    }  # fmt: skip


def test_a_checkpoint_s_own_grids_are_used(sparse: Path, tmp_path: Path) -> None:
    tensors = load_file(sparse / "model.safetensors")
    spec, grids = GridSpec(4, 32), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            grid = fit_grid(tensor, tensor != 0, spec)
            tensors[name], grids[name.removesuffix(".weight")] = grid.rounded(tensor) * (tensor != 0), grid
    save_file(tensors, sparse / "model.safetensors", {"format": "pt"})
    save_grids(sparse, grids)
    pack_model(PackConfig(), ModelConfig(path=str(sparse)), tmp_path / "packed")
    found = [bench_decode(_config(model=str(path), shape=None, lengths=(), rounds=1))
             for path in (sparse, tmp_path / "packed")]  # fmt: skip
    assert found[0]["sizes"] == found[1]["sizes"]
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in stored.values())
    assert found[0]["sizes"]["bytes"]["packed"] == sum(tensor.nbytes for tensor in stored.values())
    with pytest.raises(UsageError, match="lies on grids in float32"):
        bench_decode(_config(model=str(sparse), shape=None, lengths=(), rounds=1, dtype="bfloat16"))


def test_batches_count_every_sequence() -> None:
    cell = bench_decode(_config(batch_size=3, lengths=(8,)))["cells"]
    for name, tokens in (("decode 5 tokens", 3), ("prefill 8 tokens", 24)):
        figures = cell[name]["dense"]
        assert figures["tokens_per_s"]["max"] == pytest.approx(1000 * tokens / figures["ms"]["min"], rel=0.01)


def test_a_shape_may_be_unstructured() -> None:
    _, linears = benchmark.sparse_model("tiny", None, 1, torch.float32, torch.device("cpu"), "unstructured")
    for linear in linears.values():
        assert (linear.weight == 0).double().mean() == pytest.approx(0.5, abs=0.05)
        assert num_violations(linear.weight, Pattern.parse("2:4"))


def test_a_checkpoint_and_its_packed_form_are_the_same_benchmark(sparse: Path, tmp_path: Path) -> None:
    record = pack_model(PackConfig(), ModelConfig(path=str(sparse)), tmp_path / "packed")
    found = [bench_decode(_config(model=str(path), shape=None, lengths=(4,), rounds=1))
             for path in (sparse, tmp_path / "packed")]  # fmt: skip
    assert found[0]["sizes"] == found[1]["sizes"]
    assert found[0]["model"].startswith("folder:")
    assert found[1]["model"] == f"pack:{record.fingerprint}:auto"
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "packed/model.safetensors").values())
    assert found[0]["sizes"]["bytes"]["packed"] == stored
    part = bench_decode(_config(model=str(sparse), shape=None, blocks=1, lengths=(), rounds=1))
    assert part["model"] == found[0]["model"]  # whose speed this is not: the settings say so


def test_a_dense_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="is dense"):
        bench_decode(_config(model=str(checkpoint), shape=None))


def test_without_a_kernel_it_says_why_and_both_arms_are_dense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "why_none", lambda *_: "there is no C compiler")
    monkeypatch.setattr(benchmark, "_packed", None)  # is not called
    found = bench_decode(_config(lengths=()))
    assert found["environment"]["kernel"] is None
    assert found["environment"]["why_no_kernel"] == "there is no C compiler"
    assert "there is no C compiler. Both arms have dense linears" in " ".join(capsys.readouterr().err.split())


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int]] = []
    plain = benchmark._measure

    def stopping(config: DecodeConfig, cell: tuple[int, int], *rest: object) -> object:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(cell)
        return plain(config, cell, *rest)

    monkeypatch.setattr(benchmark, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench_decode(_config(), tmp_path)
    first = json.loads((tmp_path / "bench.json").read_text())["cells"]
    monkeypatch.setattr(benchmark, "_measure", plain)
    found = bench_decode(_config(), tmp_path)
    assert list(first) == ["decode 5 tokens"]
    assert found["cells"]["decode 5 tokens"] == first["decode 5 tokens"]
    assert len(found["cells"]) == 3
    monkeypatch.setattr(benchmark, "sparse_model", None)  # nothing is made or measured again
    assert bench_decode(_config(), tmp_path) == found
    with pytest.raises(UsageError, match="other settings"):
        bench_decode(_config(tokens=6), tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(UsageError, match="figures of another machine"):
        bench_decode(_config(), tmp_path)


def test_the_command(tmp_path: Path) -> None:
    flags = ["bench", "--decode", "--shape", "tiny", "--lengths", "8", "--tokens", "4", "--rounds", "1", "--out",
             str(tmp_path), "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0, done.output
    for part in ("decode 4 tokens, ms a token", "prefill 8 tokens, tokens/s", "dense ÷ packed", "MB", "kernel: "):
        assert part in done.output, part
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["tokens"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "llama9"}, "llama9 is none of"),
        ({"pattern": "1:2"}, "--pattern"),
        ({"tokens": 1}, "--tokens: must be at least 2"),
        ({"batch_size": 0}, "--batch-size: must be at least 1"),
        ({"lengths": (0,)}, "at least 1 token"),
        ({"lengths": (500,)}, "501 tokens are more than the model's 128"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench_decode(_config(**changes))


def test_flags_of_the_other_benchmark_are_refused() -> None:
    for name in ("methods", "ranks", "accumulation", "checkpointing", "steps"):
        with pytest.raises(UsageError, match=f"--{name} is of training steps"):
            decode_settings({**GIVEN, name: "4"})
    for name in ("pattern", "tokens"):
        with pytest.raises(UsageError, match=f"--{name} is for --decode"):
            parse_flags({**GIVEN, name: "4"})
    with pytest.raises(UsageError, match="--pattern: a checkpoint has its own zeros"):
        decode_settings({**GIVEN, "model": "sparse", "pattern": "2:4"})
