"""The benchmarks' scripts at tiny size: the reference arithmetic is right, and the results have their fields."""

from __future__ import annotations

import json
import math
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data_throughput
import decode
import eval_speed
import initialization
import memory
import prune as prune_benchmark
import reference
from common import (
    PhaseTimer,
    equal_share,
    first_block_masks,
    linears_of,
)
from gpu import pruning as gpu_pruning
from gpu.box import Box
from gpu.tiny import llama

from lors_cli.bench.measure import rotated
from lors_cli.models import shapes
from lors_cli.models import size as models_size
from lors_cli.models.blocks import decoder_blocks
from lors_cli.models.loading import load_model
from lors_cli.models.needs import RUNTIME
from lors_cli.models.shapes import Shape
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.sparsity import Pattern

TWO_OF_FOUR = Pattern.parse("2:4")
HALF = Pattern.parse("unstructured", 0.5)
ROWS, COLUMNS = 24, 160  # more than one block of 128 columns


@pytest.fixture
def sequences() -> torch.Tensor:
    """Correlated inputs (7, 40, 160); channel 5 is always 0."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(7, 40, COLUMNS, generator=generator) @ mix * torch.rand(COLUMNS, generator=generator)
    inputs[..., 5] = 0
    return inputs


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Random bytes, 12 sequences of 32 tokens."""
    path = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(256, (12, 32), generator=torch.Generator().manual_seed(4))}, path)
    return path


@pytest.fixture
def settings(workshop: Path, tokens: Path) -> prune_benchmark.Settings:
    return prune_benchmark.Settings(
        model=str(workshop / "dense"), calibration=str(tokens), methods=("wanda", "admm"), device="cpu",
        num_samples=10, batch_size=4, blocks=1, perplexity=str(tokens),
    )  # fmt: skip


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Arms run in this process; the folders of those that ran."""
    ran: list[Path] = []

    def run(folder: Path, threads: int) -> None:
        ran.append(folder)
        prune_benchmark.run_task(folder)

    monkeypatch.setattr(prune_benchmark, "spawn", run)
    return ran


def silent() -> Console:
    return Console(quiet=True)


def naive_sparsegpt(weight: torch.Tensor, inputs: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Optimal brain surgery in float64: the inverse of what is left of the Hessian is made anew for every column."""
    rows = inputs.double().flatten(0, 1)
    hessian = 2 / len(inputs) * rows.T @ rows
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    work = weight.double().clone()
    work[:, dead] = 0
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    gone = torch.zeros_like(work, dtype=torch.bool)
    for j in range(work.shape[1]):
        width = pattern.m or 128
        if j % width == 0:
            saliency = work[:, j : j + width] ** 2 / pivots[j : j + width]
            if pattern.m:
                order = saliency.argsort(dim=1)
                gone[:, j : j + width] = order.argsort(dim=1) < 2
            else:
                removed = saliency.numel() // 2 + 1  # theirs: all up to the value at this place, itself included
                gone[:, j : j + width] = saliency <= saliency.flatten().sort().values[removed - 1]
        error = torch.where(gone[:, j], work[:, j], 0) / pivots[j]
        work[:, j:] -= error[:, None] * inverses[j][0]
        work[gone[:, j], j] = 0
    return work


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF], ids=str)
def test_reference_sparsegpt_is_optimal_brain_surgery(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern
) -> None:
    statistics = reference.RunningHessian(weight)
    for sequence in sequences:
        statistics.add(sequence[None])
    pruned = reference.sparsegpt(weight, statistics, pattern)
    expected = naive_sparsegpt(weight, sequences, pattern)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF], ids=str)
def test_reference_wanda_keeps_the_highest_scores(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern
) -> None:
    statistics = reference.RunningNorms(weight)
    for sequence in sequences:
        statistics.add(sequence[None])
    pruned = reference.wanda(weight, statistics, pattern)
    norms = sequences.double().flatten(0, 1).norm(dim=0)
    groups = (weight.double().abs() * norms).reshape(-1, pattern.m or COLUMNS)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(groups.shape[1] // 2, dim=1)[1], True)
    assert torch.equal(pruned, weight * kept.view_as(weight))


def test_running_statistics_are_means_over_sequences(weight: torch.Tensor, sequences: torch.Tensor) -> None:
    hessian, norms = reference.RunningHessian(weight), reference.RunningNorms(weight)
    for batch in sequences.split(3):  # of unequal sizes
        hessian.add(batch)
        norms.add(batch)
    rows = sequences.double().flatten(0, 1)
    torch.testing.assert_close(hessian.hessian.double(), 2 / 7 * rows.T @ rows, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(norms.squares.double(), rows.square().sum(0) / 7, rtol=1e-5, atol=0)


def first_block(model: Any) -> dict[str, torch.Tensor]:
    return {name: linear.weight.clone() for name, linear in linears_of(decoder_blocks(model)[1][0]).items()}


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF], ids=str)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_reference_and_lors_agree_on_the_first_block(
    settings: prune_benchmark.Settings, method: str, pattern: Pattern
) -> None:
    batches = settings.batches()
    ours, theirs = (load_model(settings.model_config()) for _ in range(2))
    dense = first_block(ours)
    phases = reference.prune_reference(theirs, batches, method, pattern)
    gpu_pruning.prune_lors(ours, batches, method, pattern)
    assert set(phases) == {"inputs", "forward", "statistics", "solve"}
    # 128 columns of theirs lose one weight more than their share when unstructured; else only near ties may differ.
    assert min(equal_share(first_block_masks(ours), first_block_masks(theirs)).values()) >= 0.99
    for name, weight in first_block(theirs).items():
        assert (weight == 0).double().mean() == pytest.approx(0.5, abs=0.005)
        assert torch.equal(weight, dense[name] * (weight != 0)) == (method == "wanda")


def test_rounds_are_written_resumed_and_rotated(
    settings: prune_benchmark.Settings, in_process: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    prune_benchmark.benchmark(settings, 1, out, silent())
    first = json.loads(out.read_text())
    in_process.clear()
    prune_benchmark.benchmark(settings, 2, out, silent())
    results = json.loads(out.read_text())

    assert [folder.name for folder in in_process] == [
        "truncated", "reference-wanda", "lors-wanda", "lors-admm", "floor",
    ]  # fmt: skip
    assert results["rounds"][0] == first["rounds"][0]
    assert [number["order"][0] for number in results["rounds"]] == ["floor", "reference wanda"]
    assert results["platform"] == f"{platform.system()} {platform.machine()}"
    assert str(tmp_path) not in json.dumps(results["settings"])
    for arm, figures in results["rounds"][0]["arms"].items():
        assert set(figures) >= {key for key in prune_benchmark.FIGURES if key != "peak_device_mib"}
        assert 0 <= figures["pruning_s"] < figures["elapsed_s"] <= figures["whole_s"]  # lors rounds to 0.01 s
        assert 0 < figures["peak_rss_mib"] <= figures["whole_peak_rss_mib"]
        assert figures["phases_s"]
        assert ("perplexity" in figures) == (arm != "floor")
    assert "perplexity" not in results["rounds"][1]["arms"]["lors wanda"]
    assert min(results["summary"]["masks"]["wanda"].values()) >= 0.99
    assert set(results["summary"]["ratios"]["wanda"]) == {"lors/floor", "lors/reference", "floor/reference"}
    assert set(results["summary"]["ratios"]["admm"]) == {"lors/floor"}
    ours, theirs = (first["rounds"][0]["arms"][f"{kind} wanda"]["perplexity"] for kind in ("lors", "reference"))
    assert ours == pytest.approx(theirs, rel=0.01)

    in_process.clear()
    prune_benchmark.benchmark(settings, 2, out, silent())
    assert in_process == []
    with pytest.raises(SystemExit, match="other settings"):
        prune_benchmark.benchmark(replace(settings, dtype="bfloat16"), 2, out, silent())


def test_truncated_model_has_the_first_blocks(settings: prune_benchmark.Settings, tmp_path: Path) -> None:
    prune_benchmark.truncate(settings, tmp_path / "model")
    whole = load_model(settings.model_config())
    short = load_model(ModelConfig(path=str(tmp_path / "model"), dtype="float32", device="cpu"))
    assert len(decoder_blocks(short)[1]) == 1
    weights = first_block(whole)
    assert all(torch.equal(weight, weights[name]) for name, weight in first_block(short).items())


def test_an_arm_runs_in_a_process_of_its_own(settings: prune_benchmark.Settings, tmp_path: Path) -> None:
    task = {"arm": "reference wanda", "settings": asdict(replace(settings, blocks=None, perplexity=None))}
    (tmp_path / "task.json").write_text(json.dumps(task))
    prune_benchmark.spawn(tmp_path, 1)
    assert json.loads((tmp_path / "result.json").read_text())["peak_rss_mib"] > 0
    assert (tmp_path / "masks.safetensors").is_file()
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"failed[\s\S]*KeyError"):
        prune_benchmark.spawn(tmp_path, 1)


def test_gpu_blocks_on_a_processor(tmp_path: Path) -> None:
    tiny = gpu_pruning.Settings(
        hidden_size=64, intermediate_size=160, num_heads=4, num_key_value_heads=2, blocks=2, num_samples=6,
        sequence_length=24, batch_size=4, dtype="float32", device="cpu",
    )  # fmt: skip
    out = tmp_path / "pruning.json"
    gpu_pruning.run(Box(out, math.inf, rehearse=True), tiny)
    results = json.loads(out.read_text())
    assert set(results) == {
        "floor", "reference sparsegpt", "lors sparsegpt", "reference wanda", "lors wanda", "lors admm", "compared",
    }  # fmt: skip
    for method in ("sparsegpt", "wanda"):
        assert min(results["compared"][method]["equal_masks"].values()) >= 0.99
        assert results["compared"][method]["lors/reference"] > 0
    assert results["lors wanda"]["peak_gib"] is None  # no CUDA
    assert set(results["lors wanda"]["phases_s"]) == {"inputs", "forward", "statistics", "solve"}


def test_an_inner_phase_stops_the_outer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("common.time.perf_counter", lambda: next(clock))
    timer = PhaseTimer(torch.device("cpu"))
    with timer.phase("forward"):
        with timer.phase("statistics"):
            pass
    assert timer.seconds == {"forward": 5.0, "statistics": 2.0}


def test_rotation_gives_every_arm_every_place() -> None:
    orders = [rotated("abc", by) for by in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_directions_are_held_against_the_gradients_of_the_loss() -> None:
    model, ids = llama(), torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(5))
    linears = linears_of(decoder_blocks(model)[1][0])
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    found = dict(initialization.gradients(model, linears, batches))
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert set(found) == set(linears)
    for name, linear in linears.items():
        torch.testing.assert_close(found[name], linear.weight.grad, rtol=1e-3, atol=1e-6)
    ways = {"all": {name: torch.eye(linear.in_features) for name, linear in linears.items()}}
    assert initialization.captured(model, linears, batches, ways) == {"all": 1}


TINY_SHAPE = Shape((), 32, 64, 22, 4, 2, 300, 128)


def test_memory_of_a_run_is_watched_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.SHAPES, "tiny", TINY_SHAPE)
    out = tmp_path / "memory.json"
    case = memory.Case("tiny", 2, "sparsegpt", num_samples=4, sequence_length=16, batch_size=2)
    memory.benchmark([case], tmp_path, out, silent())
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert row | asdict(case) == row
    assert row["hidden_states"] == 4 * 16 * 32 * 2
    assert 50 << 20 < row["peak_anon"] < row["peak_rss"] < 4 << 30  # Python and torch take most of it
    assert row["beyond_hidden"] == row["peak_anon"] - row["hidden_states"]
    assert 0 < row["peak_anon_at_s"] <= row["elapsed_s"]
    assert row["checkpoint"] > 2 * memory.size_of(case.sizes).num_parameters
    assert row["estimate"] == sum(row["parts"].values()) + RUNTIME
    assert str(tmp_path) not in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]

    monkeypatch.setattr(memory, "measure", lambda *_: pytest.fail("measured anew"))
    assert memory.benchmark([case], tmp_path, out, silent())["rows"] == results["rows"]
    with pytest.raises(SystemExit, match=r"failed[\s\S]*no such thing"):
        memory.watch([sys.executable, "-c", "raise ValueError('no such thing')"], 1, tmp_path / "log")


def test_sizes_by_arithmetic_are_those_of_the_written_model(tmp_path: Path) -> None:
    for tied in (False, True):
        shape = replace(TINY_SHAPE, num_layers=3, tied=tied)
        memory.make_checkpoint(shape, tmp_path / str(tied))
        config = ModelConfig(path=str(tmp_path / str(tied)), dtype="bfloat16", device="cpu")
        assert models_size.model_size(config) == memory.size_of(shape)
    assert memory.size_of(memory.WHOLE_MODELS["llama3-70b"]).num_parameters == 70_553_706_496  # as published


def test_both_ways_of_scoring_are_timed_and_agree(workshop: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(workshop / "dense"), "dtype": "float32", "device": "cpu", "tasks": ["pydoc_choice"], "limit": 5,
        "batch_size": 4, "threads": 1,
    }  # fmt: skip
    out = tmp_path / "speed.json"
    eval_speed.measure(settings, None, 2, out)
    results = json.loads(out.read_text())
    found = results["tasks"]["pydoc_choice"]
    assert (len(found["rounds"]), found["num_documents"]) == (2, 5)
    assert found["scores"]["hflm"] == found["scores"]["lors"]
    for key in ("agreement", "batch_agreement"):
        assert (found[key]["acc"], found[key]["acc_norm"]) == (1, 1)
        assert found[key]["max_difference"] < 1e-3
    for clock in eval_speed.CLOCKS:
        one, two = (arms["hflm"][clock] / arms["lors"][clock] for arms in found["rounds"])
        assert found["summary"][clock]["hflm/lors"]["median"] == pytest.approx((one + two) / 2, rel=0.01)
    eval_speed.show(results)
    with pytest.raises(SystemExit, match="other settings"):
        eval_speed.measure({**settings, "limit": 6}, None, 2, out)


def test_data_throughput_counts_every_token_in_both_arms(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path))  # put back after the benchmark's own
    texts = ["fox " * (1 + index % 40) for index in range(300)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TuneDataConfig(dataset=str(path), max_length=64, stream="on", shuffle_buffer=8)
    found = data_throughput.measure(TuneConfig(data=data, epochs=1), tiny_tokenizer, 1)
    assert found["tokens"] == sum(len(text) + 1 for text in texts) // 64 * 64
    assert found["cache_bytes_a_token"] == pytest.approx(2, abs=0.1)
    assert set(found["tokens_per_s"]) == set(found["tokens_per_cpu_s"]) == {"cold", "cached"}
    assert data_throughput.parse_rates(["a = b=12"]) == {"a = b": 12.0}


def test_decoding_compares_the_same_products_round_by_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linears and whole models; a second call measures what is missing only, and nothing in another way."""
    out = tmp_path / "decode.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(shapes.SHAPES, "tiny", Shape(("nobody/tiny",), 64, 128, 2, 4, 2, 96, 128))
    command = [
        "decode.py", "--out", str(out), "--shapes", "96x64", "--batches", "3", "--seconds", "0", "--megabytes", "1",
        "--pattern", "unstructured", "--models", "tiny", "--lengths", "8", "--tokens", "4", "--rounds", "2",
        "--threads", "1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    if reason := decode.ops.available(torch.bfloat16):
        pytest.skip(reason)
    threads = torch.get_num_threads()
    try:
        decode.main()
        first = json.loads(out.read_text())
        (result,) = first["results"]
        assert result["rounds"] == decode.LEAST_ROUNDS
        arms = {"torch", "dense C", "packed", "dense int4", "packed int4", "packed int8"}
        assert set(result["microseconds"]) == arms
        ratio = result["torch ÷ packed"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert set(first["models"]) == {"tiny, 1 thread", "tiny int4, 1 thread"}
        assert set(first["models"]["tiny, 1 thread"]["cells"]) == {"decode 4 tokens", "prefill 8 tokens"}
        sizes = [first["models"][name]["sizes"]["packed_linears_bytes"]["packed"] for name in first["models"]]
        assert 0 < sizes[1] < sizes[0] / 2
        assert first["models"]["tiny, 1 thread"]["environment"]["clock"] == "processor time of the thread"
        assert "96x64" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", [*command, "2"])
        decode.main()
        second = json.loads(out.read_text())
        assert second["results"][0] == result
        assert [found["threads"] for found in second["results"]] == [1, 2]
        assert second["models"]["tiny, 1 thread"] == first["models"]["tiny, 1 thread"]
        assert second["models"]["tiny, 2 threads"]["environment"]["threads"] == 2
        monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float32"])
        with pytest.raises(SystemExit, match="another way"):
            decode.main()
    finally:
        torch.set_num_threads(threads)
