"""Two processes prune like one: forked from this one, and once under torchrun."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from forking import together
from safetensors.torch import load_file

from lors_cli.errors import UsageError
from lors_cli.machine import processes as parallel
from lors_cli.models.streaming import open_blockwise
from lors_cli.pruning import stage
from lors_cli.pruning.walk.hidden_states import HiddenStates
from lors_cli.pruning.walk.passes import start_walk
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig


def pretend(monkeypatch: pytest.MonkeyPatch, processes: int, rank: int) -> None:
    """As torchrun sets it."""
    for name, value in {"WORLD_SIZE": processes, "RANK": rank, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def prune(processes: int, checkpoint: Path, tokens: Path, out: Path, *options: str) -> CompletedProcess[str]:
    return together(processes, *arguments(checkpoint, tokens, out, *options))


def arguments(checkpoint: Path, tokens: Path, out: Path, *options: str) -> list[str]:
    return ["prune", str(checkpoint), "--out", str(out), "--calibration", str(tokens), "calibration.batch_size=4",
            "--json", *options]  # fmt: skip


def torchrun(processes: int, *of_lors: str) -> CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "lors_cli"]
    return subprocess.run([sys.executable, *launcher, *of_lors], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("options", [
    ("--method", "sparsegpt"), ("--method", "admm"), ("--method", "magnitude"),
    ("--method", "wanda", "channel_permutation=true", "quantize={group_size: 32, symmetric: false}"),
    ("--method", "wanda", "--pattern", "unstructured", "--sparsity", "0.5", "layer_sparsity=owl"),
])  # fmt: skip
def test_two_processes_prune_like_one(
    options: tuple[str, ...], checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        if processes == 2 and "magnitude" in options:
            done = torchrun(2, *arguments(checkpoint, token_file, out, *options))
        else:
            done = prune(processes, checkpoint, token_file, out, *options)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)  # one document, from one process
        record = json.loads((out / "stage.json").read_text())
        if "magnitude" not in options:
            assert done.stderr.count("calibration: ") == 1
            seen = record["metrics"]["calibration"]
            assert seen.pop("source").startswith("safetensors:")
            assert seen == {"num_samples": 10, "sequence_length": 24, "tokens": 240}
        assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json", "stage.json"}
        assert not (out / ".work").exists()
        results.append((record, load_file(out / "model.safetensors")))
    (first_record, first), (second_record, second) = results
    assert first_record["fingerprint"] == second_record["fingerprint"]
    assert second_record["metrics"]["violations"] == 0
    assert first.keys() == second.keys()
    for name in first:
        if ".layers.0." in name and name.endswith("_proj.weight"):
            agree = ((first[name] != 0) == (second[name] != 0)).double().mean()
            assert agree > 0.99, name


def test_per_layer_inputs_and_shared_keys_and_values(
    tmp_path: Path, token_file: Path, build: object, word_tokenizer: object
) -> None:
    types = ["sliding_attention", "full_attention"] * 2
    model = build("Gemma4", num_hidden_layers=4, layer_types=types, num_kv_shared_layers=2)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "dense")
    word_tokenizer.save_pretrained(tmp_path / "dense")  # type: ignore[attr-defined]
    results = []
    for processes in (1, 2):
        done = prune(processes, tmp_path / "dense", token_file, tmp_path / str(processes), "--method", "wanda")
        assert done.returncode == 0, done.stderr
        results.append(load_file(tmp_path / str(processes) / "model.safetensors"))
    first, second = results
    pruned = [name for name in first if float((first[name] == 0).float().mean()) == 0.5]
    assert len(pruned) == 4 * 9 - 2 * 2
    assert all(torch.equal(first[name] == 0, second[name] == 0) for name in pruned)


def test_experts_that_one_process_does_not_see(
    tmp_path: Path, token_file: Path, build: object, word_tokenizer: object
) -> None:
    build("Mixtral", num_local_experts=8).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    word_tokenizer.save_pretrained(tmp_path / "dense")  # type: ignore[attr-defined]
    done = prune(2, tmp_path / "dense", token_file, tmp_path / "out", "--method", "sparsegpt")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "stage.json").read_text())["metrics"]
    assert (metrics["sparsity"], metrics["violations"]) == (0.5, 0)


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("quantize={group_size: 32}",)])
def test_two_processes_reconstruct_like_one(
    options: tuple[str, ...], checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    """Ten samples: steps of four, four and two; each process has half of each."""
    results, losses = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = prune(processes, checkpoint, token_file, out, "--method", "wanda", "reconstruct_epochs=3", "-v",
                     "reconstruct_batch_size=4", *options)  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(load_file(out / "model.safetensors"))
        said = re.findall(r"mean loss (\S+) in the first epoch, (\S+) in the last", done.stderr)
        losses.append([float(value) for pair in said for value in pair])
    first, second = results
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1][1] < (0.97 if options else 0.9) * losses[1][0]
    for name, tensor in first.items():
        if ".layers.0." in name:  # later blocks see what these put out
            assert torch.equal(tensor == 0, second[name] == 0), name
            apart = (second[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert apart < (0.02 if options else 1e-4), name


def test_more_processes_than_a_step_has_samples_cannot_reconstruct(
    checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 3, 0)
    text = CalibrationConfig(dataset=str(token_file))
    with pytest.raises(UsageError, match="steps of 4, the last of 2, cannot be shared by 3 proc"):
        stage.prune(PruneConfig(method="wanda", reconstruct_epochs=1, reconstruct_batch_size=4, calibration=text),
                    ModelConfig(path=str(checkpoint)), tmp_path / "out")  # fmt: skip


def test_the_work_of_another_number_of_reconstructing_processes_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches, cut in halves for two processes: what one of them wrote are four batches too, but not these."""
    pretend(monkeypatch, 2, 1)
    half = HiddenStates(tmp_path, "device", torch.device("cpu"))
    half.expect(dict.fromkeys(range(1, 8, 2), (1, 3, 4)), torch.float32)
    for number in half.numbers:
        half.put(number, torch.zeros(1, 3, 4))
    half.advance()
    half.close()
    monkeypatch.delenv("WORLD_SIZE")
    assert HiddenStates(tmp_path, "device", torch.device("cpu")).resume([0, 1, 2, 3], 4) is None


def test_what_was_cut_for_other_processes_goes_before_another_cut_is_begun(checkpoint: Path, tmp_path: Path) -> None:
    """Else a third call, of as many processes as the first, would go on among the second's blocks."""
    source = open_blockwise(ModelConfig(path=str(checkpoint), dtype="float32"))
    tokens = torch.arange(64).view(4, 16)
    for folder, ahead in ((tmp_path, False), (tmp_path / "dense", True)):
        states = HiddenStates(folder, "device", torch.device("cpu"), ahead=ahead)
        states.expect(dict.fromkeys((0, 1), (2, 16, 32)), torch.float32)
        for _ in range(3):
            for number in (0, 1):
                states.put(number, torch.zeros(2, 16, 32))
            states.advance()
        states.close()
        assert 2 in states.there(2)
    walk = start_walk(source, list(tokens.split(1)), CalibrationConfig(), tmp_path, with_dense=True)
    walk.close()
    assert walk.dense is not None
    for states in (walk.states, walk.dense.states):
        assert (states.there(2), states.there(4)) == (set(), {0})


def test_more_processes_than_batches_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 3, 0)
    source = open_blockwise(ModelConfig(path=str(checkpoint), dtype="float32"))
    with pytest.raises(UsageError, match="2 calibration batches cannot be shared by 3 processes"):
        start_walk(source, [torch.zeros(4, 8).long()] * 2, CalibrationConfig(), tmp_path)


def test_another_number_of_processes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {number: torch.randn(2, 3, 4) for number in range(5)}
    for rank in (0, 1):
        pretend(monkeypatch, 2, rank)
        states = HiddenStates(tmp_path, "device", torch.device("cpu"))
        mine = range(rank, 5, 2)
        states.expect(dict.fromkeys(mine, (2, 3, 4)), torch.float32)
        for number in mine:
            states.put(number, hidden[number])
        states.advance()
        states.close()
        assert HiddenStates(tmp_path, "device", torch.device("cpu")).resume(list(mine), 5) == (0 if rank else None)
    monkeypatch.delenv("WORLD_SIZE")
    for place in ("device", "disk"):
        alone = HiddenStates(tmp_path, place, torch.device("cpu"))  # type: ignore[arg-type]
        assert alone.resume(list(range(5)), 5) == 0
        assert all(torch.equal(alone.get(number), hidden[number]) for number in range(5))


def test_only_the_first_process_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # of a job that is not torchrun's
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallel.is_main()
    assert parallel.num_processes() == 1
    pretend(monkeypatch, 2, 1)
    assert not parallel.is_main()
    assert parallel.num_processes() == 2
