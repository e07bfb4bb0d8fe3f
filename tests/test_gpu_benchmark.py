"""benchmarks/gpu: its rehearsal on a CPU with nothing but the packages it may need, and its checks on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this system")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu import carried, decode, pruning, right, run, steps
from gpu.box import Box
from gpu.summary import LINES, summary
from gpu.tiny import llama

FOLDER = Path(__file__).parents[1] / "benchmarks"
ABSENT = ("gguf", "datasets", "lm_eval", "scipy", "matplotlib", "sklearn", "pandas", "tensorboard", "greenlet")
"""What a bare CUDA image may lack, and neither a step nor a stage of the chain needs."""
HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)

    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def rehearsed(tmp_path: Path, absent: tuple[str, ...], *only: str) -> dict[str, Any]:
    """All items by step of a rehearsal in which some packages cannot be imported, and its `run` and `text`."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HIDING.format(absent=absent))
    command = [
        sys.executable,
        str(FOLDER / "gpu/run.py"),
        "--out",
        str(tmp_path / "out"),
        "--rehearse",
        "--minutes",
        "60",
    ]
    environment = {**os.environ, "PYTHONPATH": str(hooks), "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *(["--only", *only] if only else [])], env=environment, capture_output=True,
                          text=True, timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    return {**found, "text": done.stdout}


def without_figures(items: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in items.items() if {"failed", "left_out"} & set(found)}


def test_the_rehearsal_runs_everything_with_few_packages(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, ABSENT)
    assert {name: step["ended"] for name, step in found["run"]["steps"].items()} == dict.fromkeys(
        ("right", "steps", "kernel", "decode", "pruning", "chain"), "finished"
    )
    for name in found["run"]["steps"]:
        assert without_figures(found[name]) == {}, name
    assert set(found["right"]) == set(right.CHECKS)
    kernels = list(found["kernel"])
    assert kernels[:2] == ["copy", "plain stochastic"]
    assert kernels.index("unstructured 6x64, batch 8") < kernels.index("plain stochastic 64x64x8x1x1")
    assert set(found["chain"]) == {"model", "dense", "pruned", "tuned 10", "tuned 300"}
    assert f"{len(right.CHECKS)} of {len(right.CHECKS)} checks are right" in found["text"]
    assert len(found["text"].splitlines()) <= LINES + len(found["run"]["steps"])


@pytest.mark.long
def test_what_needs_no_stage_runs_without_their_packages_too(tmp_path: Path) -> None:
    """Steps 2 to 5 and all of 1 but the resumed run."""
    found = rehearsed(tmp_path, (*ABSENT, "accelerate", "psutil"), "right", "kernel", "decode", "pruning")
    assert set(without_figures(found["right"])) <= {"resumed"}
    assert (
        without_figures(found["kernel"]) == without_figures(found["decode"]) == without_figures(found["pruning"]) == {}
    )


def test_a_failure_loses_only_itself_and_no_item_begins_late(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no such thing")

    box = Box(tmp_path / "step.json", time.monotonic() + 100, rehearse=True)
    assert box.item("first", broken) is None
    assert box.item("second", lambda: {"value": 1}) is not None
    assert box.item("third", lambda: {"value": 2}, needs_s=1000) is None
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["first"]["failed"] == "ValueError: no such thing"
    assert written["second"]["value"] == 1
    assert written["third"]["left_out"].endswith("were left of about 1000")


def document_of(*names: str) -> dict[str, Any]:
    ended = {"ended": "finished", "elapsed_s": 1.0, "box_s": 2.0}
    return {"device": "a GPU", "torch": "2", "transformers": "5", "steps": dict.fromkeys(names, ended)}


def test_a_number_that_is_none_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    offs = iter([0.0, float("nan"), *[0.0] * 6])
    monkeypatch.setattr(right, "off", lambda found, exact: next(offs))
    with pytest.raises(AssertionError, match=r"wrong: .*nan"):
        right.layers(torch.device("cpu"), "float32")
    assert right.worst([1.0, 2.0]) == 2


def test_checks_that_a_killed_step_did_not_come_to_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device) -> dict[str, Any]:
        raise AssertionError("wrong")

    def killed(device: torch.device) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(right, "CHECKS", {"one": lambda _: {}, "two": wrong, "three": killed, "four": lambda _: {}})
    box = Box(tmp_path / "right.json", time.monotonic() + 100, rehearse=True)
    with pytest.raises(KeyboardInterrupt):
        right.run(box)
    text = summary(document_of("right"), {"right": json.loads(box.path.read_text())})
    assert "1 of 4 checks are right; missing: three, four" in text
    assert "two: AssertionError: wrong" in text
    assert "no check was begun" in summary(document_of("right"), {})


def test_a_killed_step_leaves_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"step_s": 2.0, "peak_gib": 1.0, "saved_gib": 0.5}
    monkeypatch.setattr(steps, "measured", Mock(side_effect=[found, KeyboardInterrupt]))
    monkeypatch.setattr(pruning, "measure", Mock(side_effect=[{"pruning_s": 3.0}, KeyboardInterrupt]))
    arms = {"lors admm": pruning.forward_floor, "floor": pruning.forward_floor}
    monkeypatch.setattr(pruning.Settings, "arms", lambda _: arms)
    for name, step in (("steps", steps), ("pruning", pruning)):
        with pytest.raises(KeyboardInterrupt):
            step.run(Box(tmp_path / f"{name}.json", time.monotonic() + 100, rehearse=True))
    table = json.loads((tmp_path / "steps.json").read_text())["compared"]
    assert table == {str(steps.TINY_CELLS[0]): {"lora": {**found, "over_lora": 1.0}}}
    assert json.loads((tmp_path / "pruning.json").read_text())["compared"] == {"admm": {}}


def test_no_packed_item_begins_with_half_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    monkeypatch.setattr(steps, "sparse_model", lambda *_: (llama(), {}))
    monkeypatch.setattr(Box, "item", lambda self, name, measure, needs_s: asked.setdefault(name, needs_s))
    steps.run(Box(tmp_path / "steps.json", 0.0, cpu=True))
    assert {needs_s for name, needs_s in asked.items() if "lors-packed" in name} == {30}
    assert {needs_s for name, needs_s in asked.items() if "lors-packed" not in name} == {10}


def test_the_summary_fits_and_says_which_goal_was_missed() -> None:
    items: dict[str, Any] = {}
    for cell in steps.CELLS:
        for method in cell.methods:
            for number in (1, 2):
                items[f"{cell} · {method} · round {number}"] = {
                    "step_s": {"lora": 0.2, "lors": 0.21, "lors-cached": 0.19, "spp-gc": 0.4}.get(method, 0.3),
                    "peak_gib": {"sqft": 50.0, "lora": 19.0}.get(method, 20.0), "saved_gib": 1.0,
                }  # fmt: skip
    items["compared"] = steps.compared(items)
    lost = {f"item {number}": {"failed": "broke"} for number in range(100)}
    document = document_of("right", "steps", "kernel", "decode", "pruning", "chain")
    decoded = {"dense, batch 1": {"tokens_per_s": 200.0}, "2:4, batch 1": {"tokens_per_s": 320.0, "over_dense": 1.6},
               "unstructured, batch 1": {"tokens_per_s": 220.0, "over_dense": 1.1}}  # fmt: skip
    text = summary(document, {"right": lost, "steps": items, "kernel": lost, "decode": decoded, "pruning": lost,
                              "chain": lost})  # fmt: skip
    assert len(text.splitlines()) <= LINES
    assert "step, LoRS / LoRA 1.050 (goal ≤ 1: MISSED)" in text
    assert "step, LoRS kept / LoRA 0.950 (goal ≤ 1: met)" in text
    assert "peak, LoRS / LoRA with bfloat16 adapters 1.053" in text
    assert "peak, LoRS / LoRA with float32 adapters, as LoRS's 1.000 (goal ≤ 1: met)" in text
    assert "throughput, LoRS / SPP-gc 1.905 (goal ≥ 1.6: met)" in text
    assert "peak, LoRS / SQFT 0.400 (goal ≤ 0.6: met)" in text
    assert "LoRS about" in text
    assert "dense, tokens/s: batch 1: 200" in text
    assert "unstructured over dense by batch: 1: 1.10" in text
    assert "decode, 2:4 / dense, batch 1 1.600 (goal ≥ 1.5: met)" in text


def test_figures_of_an_earlier_run_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("right", "kernel"):
        (tmp_path / f"{name}.json").write_text('{"one": {}}')
    monkeypatch.setattr(run, "spawn", lambda *_: {"ended": "failed", "elapsed_s": 0.0, "box_s": 1.0})
    assert "no check was begun" in run.run_all(tmp_path, 9, rehearse=True, cpu=False, names=["right"])
    assert (tmp_path / "kernel.json").is_file()


def test_the_chain_is_held_against_the_cpu_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {"dense": {"perplexity": 20.1}, "pruned": {"perplexity": float("nan")}, "tuned 300": {"perplexity": 9.0}}
    monkeypatch.setattr("gpu.summary.CPU_CHAIN", tmp_path / "chain.json")
    assert "no figures of a CPU" in summary(document_of("chain"), {"chain": items})
    cpu = {"model": {"model": "SmolLM2"}, "dense": {"perplexity": 20.0}, "pruned": {"perplexity": 40.0}}
    (tmp_path / "chain.json").write_text(json.dumps(cpu))
    text = summary(document_of("chain"), {"chain": items})
    assert "dense: perplexity 20.100, on the CPU 20.000, apart 0.005 (goal ≤ 0.01: met)" in text
    assert "pruned: perplexity nan, on the CPU 40.000, apart nan (goal ≤ 0.01: MISSED)" in text
    assert "tuned 300: perplexity 9.000\n" in text
    assert "no figures of a CPU" not in text


def test_wrong_logits_are_timed_and_lose_their_goal(tmp_path: Path) -> None:
    model = llama()
    expected = decode.Step(model, 2, 8)()
    box = Box(tmp_path / "decode.json", time.monotonic() + 100, rehearse=True)
    assert box.item("2:4, batch 1", lambda: decode.timed(model, 2, 8, 1, 1.05 * expected)[0])
    box.item("2:4, batch 1", lambda: {**decode.timed(model, 2, 8, 1, expected.roll(1))[0], "over_dense": 2.0})
    assert box.items["2:4, batch 1"]["step_s"] > 0
    text = summary(document_of("decode"), {"decode": box.items})
    assert "2:4, batch 1: wrong: its logits are 1" in text
    assert "goal" not in text


def test_the_decode_step_is_the_model_s() -> None:
    """Logits of the last token, by transformers at once and by the step behind transformers' own cache."""
    model = llama()
    ids = torch.randint(model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = decode.Step(model, batch=3, length=12)
    step.ids = ids[:, -1:]
    for block, layer in zip(step.cache, cache.layers, strict=True):
        block[0, :, :, :-1], block[1, :, :, :-1] = layer.keys, layer.values
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)


def test_a_carried_model_is_the_one_that_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    low, step = -torch.rand(8, 2, 1, generator=generator).half(), (torch.rand(8, 2, 1, generator=generator) / 8).half()
    signed = torch.randint(-127, 128, (8, 64), generator=generator)
    signed[:, ::32] = 127
    tensors = {
        "four": (codes * step.float() + low.float()).flatten(1),
        "eight": signed * 0.25,
        "odd": torch.randn(8, 40, generator=generator),
        "any": torch.randn(8, 64, generator=generator),
        "norm": torch.randn(64, generator=generator),
    }
    forms = {name: set(carried.pack(weight)) for name, weight in tensors.items()}
    assert forms["four"] == {"codes4", "step", "low"}
    assert forms["eight"] == {"codes8", "step"}
    assert forms["odd"] == forms["any"] == forms["norm"] == {"plain"}
    monkeypatch.setattr(carried, "PART_BYTES", 700)
    folders = carried.write_parts(tensors, tmp_path / "carried")
    (folders[0] / "tensors.json").write_text(json.dumps(sorted(tensors)))
    assert len(folders) > 1
    assert max(sum(path.stat().st_size for path in folder.iterdir()) for folder in folders) < 2000
    whole = carried.put_together(tmp_path / "carried", tmp_path / "model")
    found = carried.load_file(whole / "model.safetensors")
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in tensors.items())
    (folders[-1] / "weights.safetensors").rename(tmp_path / "lost")
    folders[-1].rmdir()
    with pytest.raises(FileNotFoundError, match="a part is missing"):
        carried.put_together(tmp_path / "carried", tmp_path / "model")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("name", right.CHECKS)
def test_right_on_a_gpu(name: str) -> None:
    right.CHECKS[name](torch.device("cuda"))
