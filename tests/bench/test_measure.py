"""`lors bench`: what its figures are, that it needs few packages, and that it goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lors_cli.bench import measure as benchmark
from lors_cli.bench.live_memory import LiveBytes
from lors_cli.bench.measure import BenchConfig, bench
from lors_cli.bench.model import ARMS, adapted, put_on_grids, sparse_model
from lors_cli.cli.app import app
from lors_cli.cli.views.bench import parse_flags, table_rows
from lors_cli.errors import MissingError, UsageError
from lors_cli.grid import Grid
from lors_cli.models.shapes import SHAPES, Shape
from lors_cli.tuning.lors import LorsLinear

TINY = Shape(("nobody/tiny",), 64, 128, 2, 4, 2, 96, 128)
CPU = torch.device("cpu")
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
"""Weights in the decoder blocks of TINY."""


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def _config(**changes: object) -> BenchConfig:
    return BenchConfig(**{"shape": "tiny", "lengths": (16,), "ranks": (4,), "rounds": 2, "steps": 1, "device": "cpu",
                          **changes})  # fmt: skip


def test_live_bytes_counts_new_storage_once_and_forgets_what_is_freed() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        view = known[10:].add_(1).view(9, 10)
        assert live.current == 0
        first = view + 1
        both = torch.cat([first, first])
        assert live.current == 4 * (90 + 180)
        del first
        assert live.current == 4 * 180
        both.t()
        del both
        assert live.current == 0
    assert live.peak == 4 * 270


def test_the_document_and_its_ratios() -> None:
    found = bench(_config(methods=("lora", "lors", "lors-cached", "sqft", "sqft-gc")))
    (cell,) = found["cells"].values()
    assert list(cell) == ["lora", "lors", "lors-cached", "sqft", "sqft-gc"]
    for figures in cell.values():
        assert figures["tokens_per_s"]["min"] > 0
        for slowest, longest in (("min", "max"), ("max", "min")):  # medians of two are no inverses of each other
            assert figures["tokens_per_s"][slowest] == pytest.approx(16 / figures["step_s"][longest], rel=0.05)
    assert cell["lora"]["step_over_lora"]["median"] == cell["lors"]["step_over_lors"]["median"] == 1
    json.dumps(found)


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_figures_name_their_device(name: str) -> None:
    assert benchmark.environment_of(torch.device(name))["device"] == name.upper()


def test_a_method_named_twice_is_measured_once() -> None:
    (cell,) = bench(_config(methods=("lors", "sqft", "lors"), rounds=1))["cells"].values()
    assert list(cell) == ["lors", "sqft"]


def test_nothing_to_measure_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingError, match="peft"):
        bench(_config(methods=("lora",)))


def test_memory_is_what_the_formulas_say() -> None:
    """LoRS keeps nothing of the weights' size; its cache a bfloat16 copy; SQFT a mask and a bfloat16 copy."""
    methods = ("lora", "lors", "lors-cached", "lors-exact", "lors-packed", "sqft", "sqft-gc", "hira-gc")
    (cell,) = bench(_config(methods=methods, rounds=1))["cells"].values()
    saved = {name: figures["saved_bytes"] for name, figures in cell.items()}
    assert saved["lors"] <= saved["lora"]
    assert saved["lors-cached"] == saved["lors"] + 2 * LINEARS
    assert saved["sqft"] - saved["lors"] >= 3 * LINEARS
    assert saved["sqft-gc"] < saved["lors"] + LINEARS
    assert saved["hira-gc"] == saved["lors-exact"] == saved["lors"]
    assert cell["lors-exact"]["peak_bytes"] < cell["lors"]["peak_bytes"] + 2 * 64 * 128  # a tile is a weight here
    # 9/8 bytes an element instead of 2, and one weight restored
    assert saved["lors-packed"] == saved["lors"]
    won = cell["lors"]["peak_bytes"] - cell["lors-packed"]["peak_bytes"]
    assert LINEARS / 2 < won <= LINEARS * 7 / 8
    # in the peak: the largest merged weight for LoRS, all of them for its cache
    assert cell["lors-cached"]["peak_bytes"] - cell["lors"]["peak_bytes"] > LINEARS


def test_block_checkpointing_keeps_less() -> None:
    cells = bench(_config(methods=("lors", "sqft"), checkpointing=(False, True), rounds=1))["cells"]
    plain, again = cells["16 tokens, rank 4"], cells["16 tokens, rank 4, block checkpointing"]
    for name in ("lors", "sqft"):
        assert again[name]["saved_bytes"] < plain[name]["saved_bytes"] / 2


def test_random_weights_are_two_of_four_and_come_back_untouched() -> None:
    model, linears = sparse_model("tiny", None, 1, torch.bfloat16, CPU)
    assert len(linears) == 7
    assert "lm_head" not in linears
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    for weight in before.values():
        kept = (weight.view(weight.shape[0], -1, 4) != 0).sum(2)
        assert bool((kept <= 2).all())
        assert kept.double().mean() > 1.99
    grids = put_on_grids(linears)
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    for arm in ARMS.values():
        with adapted(model, linears, arm, 4, grids) as optimizer:
            loss = model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss
            loss.backward()
            optimizer.step()
        assert all(model.get_submodule(name) is linear for name, linear in linears.items())
        assert all(torch.equal(linear.weight, before[name]) for name, linear in linears.items())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_lora_row_has_adapters_in_the_weights_dtype_and_pefts_default_float32() -> None:
    model, linears = sparse_model("tiny", None, 1, torch.bfloat16, CPU)
    for name, dtype in (("lora", torch.bfloat16), ("lora-float32", torch.float32), ("lors", torch.float32)):
        with adapted(model, linears, ARMS[name], 4) as optimizer:
            assert {parameter.dtype for parameter in optimizer.param_groups[0]["params"]} == {dtype}


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(methods=("lors",), ranks=(2, 4), rounds=1)
    measured: list[str] = []
    plain = benchmark._measure

    def counting(config: BenchConfig, cell: object, *rest: object) -> object:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(str(cell))
        return plain(config, cell, *rest)

    monkeypatch.setattr(benchmark, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        bench(config, tmp_path)
    first = json.loads((tmp_path / "bench.json").read_text())["cells"]
    monkeypatch.setattr(benchmark, "_measure", plain)
    found = bench(config, tmp_path)
    assert list(found["cells"]) == ["16 tokens, rank 2", "16 tokens, rank 4"]
    assert found["cells"]["16 tokens, rank 2"] == first["16 tokens, rank 2"]
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    monkeypatch.setattr(benchmark, "sparse_model", None)  # nothing is made or measured again
    assert bench(config, tmp_path) == found
    with pytest.raises(UsageError, match="other settings"):
        bench(_config(methods=("sqft",), rounds=1), tmp_path)


def test_rotating_gradients_are_timed_in_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block's seven layers a quarter is two or one: over four steps each has been exact once."""
    exact: list[list[bool]] = []
    plain = benchmark.causal_lm_loss

    def noting(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        exact.append([module.exact for module in model.modules() if isinstance(module, LorsLinear)])
        return plain(model, batch)

    monkeypatch.setattr(benchmark, "causal_lm_loss", noting)
    bench(_config(methods=("lors-rotating",), blocks=1, rounds=1, steps=2))
    timed = exact[1:9]  # one step warms up
    assert [sum(layer) for layer in zip(*timed, strict=True)] == [2] * 7


def test_figures_have_six_digits_however_small() -> None:
    assert benchmark.spread([0.001623491, 0.00162348]) == {"median": 0.00162349, "min": 0.00162348, "max": 0.00162349}


def test_figures_of_a_checkpoint_that_changed_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(model=str(tmp_path), shape=None, blocks=1)
    monkeypatch.setattr(benchmark, "model_fingerprint", lambda model: f"{model.path}:1")
    document = {"settings": json.loads(json.dumps(asdict(config))), "environment": {}, "cells": {"one": {}},
                "model": benchmark.measured_model(config)}  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(document))
    assert benchmark.begun(config, tmp_path) == document
    monkeypatch.setattr(benchmark, "model_fingerprint", lambda model: f"{model.path}:2")
    with pytest.raises(UsageError, match="of what the model was before"):
        benchmark.begun(config, tmp_path)


def test_a_method_that_does_not_fit_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = benchmark.adapted

    def full(model: object, linears: dict[str, nn.Linear], arm: object, rank: int, grids: dict[str, Grid]) -> object:
        if arm is ARMS["sqft"]:
            raise torch.OutOfMemoryError
        return plain(model, linears, arm, rank, grids)

    monkeypatch.setattr(benchmark, "adapted", full)
    (cell,) = bench(_config(methods=("lors", "sqft")))["cells"].values()
    assert cell["sqft"] == {"failed": "out of memory"}
    assert cell["lors"]["tokens_per_s"]["median"] > 0
    assert table_rows(cell)[1][:2] == ["sqft", "out of memory"]


def test_the_command_writes_json_and_pictures(tmp_path: Path) -> None:
    flags = ["bench", "--shape", "tiny", "--lengths", "8,16", "--ranks", "4,5", "--rounds", "1", "--steps", "1",
             "--methods", "lora,lors,spp-gc", "--out", str(tmp_path), "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, flags)  # spp-gc cannot be had with rank 5
    assert done.exit_code == 0, done.output
    assert "8 tokens, rank 4" in done.output
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == ["beside_the_authors", "memory_by_length", "memory_by_rank", "speed_by_length", "speed_by_rank"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("lrs",)}, "lrs is none of"),
        ({"shape": "llama9"}, "llama9 is none of"),
        ({"ranks": ()}, "nothing is given"),
        ({"rounds": 0}, "at least 1"),
        ({"lengths": (1,)}, "at least 2 tokens"),
        ({"lengths": (4096,)}, "above the model's 128"),
        ({"ranks": (5,), "methods": ("spp",)}, "ranks that work"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(_config(**changes))


@pytest.mark.parametrize("flag", ["ranks", "checkpointing", "dtype"])
def test_flags_that_cannot_be_are_named(flag: str) -> None:
    flags = {"shape": "tiny", "ranks": "4", "lengths": "16", "checkpointing": "off", "dtype": "float32", flag: "x"}
    with pytest.raises(UsageError, match=f"--{flag}"):
        parse_flags(flags)


def test_it_needs_torch_transformers_typer_rich_and_yaml_alone() -> None:
    others = ("peft", "datasets", "lm_eval", "matplotlib", "psutil", "scipy", "greenlet", "gguf",
              "accelerate", "triton")  # fmt: skip
    code = (
        "import sys\n"
        f"for name in {others!r}: sys.modules[name] = None\n"
        "from lors_cli.cli import main\n"
        "steps = ['--ranks', '4', '--steps', '1', '--methods', 'lora,lors,sqft']\n"
        "for given in (steps, ['--decode', '--tokens', '2']):\n"
        "    sys.argv = ['lors', 'bench', *given, '--blocks', '1', '--lengths', '8', '--rounds', '1', '--json',\n"
        "                '--device', 'cpu']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "    print('---')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps, decoding, _ = done.stdout.split("---\n")
    (cell,) = json.loads(steps)["cells"].values()
    assert list(cell) == ["lors", "sqft"]
    assert "no row for LoRA" in done.stderr
    assert list(json.loads(decoding)["cells"]) == ["decode 2 tokens", "prefill 8 tokens"]
