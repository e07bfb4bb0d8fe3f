"""The tuning stage as a whole: what it writes, how it goes on, how it stops."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import MODELS, killed_at, log
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from lors_cli.data.tokens import tuning_samples
from lors_cli.errors import SparsityError, UsageError
from lors_cli.files import records
from lors_cli.machine import processes
from lors_cli.models import loading
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.inspection import inspect, prompt_of
from lors_cli.recipe.schema import ColumnsConfig, ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning import estimate
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.merge import merge
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.training import fixed_batch, sampling
from lors_cli.tuning.training.checkpoints import MARKER_NAME, whole_checkpoints
from lors_cli.tuning.training.step_log import StepLog
from lors_cli.tuning.training.trainer import AdapterTrainer, num_steps

IDS = torch.arange(40).reshape(2, 20)


def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def test_tuning_lowers_the_loss_and_keeps_every_zero(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    base, tuned = _model(sparse_checkpoint), _model(out)
    changed = 0
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if "proj" in name:
            assert bool((after[before == 0] == 0).all()), name
            changed += int((after != before).sum())
        else:
            assert torch.equal(before, after), name
    assert changed > 1000
    assert record.metrics["violations"] == 0
    assert record.metrics["sparsity"] >= 0.5
    assert record.metrics["last_loss"] < record.metrics["first_loss"] - 0.5
    rows = log(out)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["learning_rate"] == pytest.approx(5e-2)
    assert records.is_finished(out, record.fingerprint)
    assert (out / "config.json").read_text() == (sparse_checkpoint / "config.json").read_text()


def test_adapter_and_merged_checkpoint_agree_bit_for_bit(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    adapted = load_adapter(_model(sparse_checkpoint).requires_grad_(False), out / "adapter")
    assert torch.equal(adapted(IDS).logits, _model(out)(IDS).logits)


def test_a_resumed_run_equals_an_unbroken_one(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "whole"
    tune(config, model, whole)
    for step in (1, 4, 7):
        broken = tmp_path / f"broken at {step}"
        killed_at(step, config, model, broken, monkeypatch)
        assert records.read_record(broken) is None
        assert not (broken / "model.safetensors").exists()
        tune(config, model, broken)
        for name in MODELS:
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), step
        losses = [[row["loss"] for row in log(run)] for run in (whole, broken)]
        assert losses[0] == losses[1], step


def test_its_time_is_that_of_all_calls(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    for step, before in ((3, 0), (7, 1000)):  # a checkpoint after every third
        killed_at(step, config, model, out, monkeypatch)
        marker = out / f"checkpoints/checkpoint-{step // 3 * 3}" / MARKER_NAME
        content = json.loads(marker.read_text())
        assert before < content["elapsed_s"] < before + 600
        marker.write_text(json.dumps({**content, "elapsed_s": before + 1000}))
    assert 2000 < tune(config, model, out).elapsed_s < 2600


def test_a_run_does_not_go_on_in_another_number_format(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With `dtype: auto` the machine decides the format, and no fingerprint has it."""
    model = ModelConfig(path=str(sparse_checkpoint), device="cpu")
    for fast, out in ((True, "moved"), (False, "moved"), (False, "whole")):
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda fast=fast: fast)
        record = tune(config, model, tmp_path / out)
        assert ("tuning begins anew" in capsys.readouterr().err) == ((fast, out) == (False, "moved"))
        assert record.metrics["steps"] == 8
    moved, whole = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("moved", "whole"))
    assert moved == whole


def test_a_loss_that_is_not_finite_before_is_noted_and_one_after_is_refused(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either ended the run in a traceback, when the old result was gone."""
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    with monkeypatch.context() as patch:
        patch.setattr(fixed_batch, "measure", lambda *args, untrained=False: float("nan") if untrained else 1.5)
        record = tune(replace(config, max_steps=1), model, out)
    assert (record.metrics["loss_before"], record.metrics["loss_after"]) == (None, 1.5)
    monkeypatch.setattr(fixed_batch, "measure", lambda *args, untrained=False: 1.5 if untrained else float("inf"))
    with pytest.raises(UsageError, match=r"the loss after training is inf.*\n?.*learning_rate"):
        tune(config, model, out)
    assert records.is_finished(out, record.fingerprint)


def test_what_does_nothing_in_a_run_is_said(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = replace(config, max_steps=None, epochs=0.1, init="kaiming", warmup_steps=1,
                   data=replace(config.data, shuffle_buffer=8))  # fmt: skip
    tune(idle, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    said = capsys.readouterr().err
    assert "init_samples has nothing to do" in said
    assert "data.shuffle_buffer has nothing to do" in said
    assert "warmup_steps: 1, and the run has 1 step: the learning rate never reaches its peak" in said


def test_checkpointing_that_a_family_lacks_is_refused(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JetMoe's ended in transformers' traceback."""
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="gradient_checkpointing: LlamaForCausalLM has none"):
        tune(replace(config, gradient_checkpointing=True), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")


def test_a_run_resumed_near_the_end_of_an_epoch_equals_an_unbroken_one(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, whole = ModelConfig(path=str(sparse_checkpoint)), replace(config, max_steps=12), tmp_path / "whole"
    tune(config, model, whole)
    for step in (9, 10, 11):
        broken = tmp_path / f"broken at {step}"
        killed_at(step, config, model, broken, monkeypatch)
        tune(config, model, broken)
        assert [row["step"] for row in log(broken)] == list(range(1, 13)), step
        assert (whole / MODELS[0]).read_bytes() == (broken / MODELS[0]).read_bytes(), step


def test_a_steps_samples_come_longest_first_and_an_epoch_holds_every_sample_once() -> None:
    lengths = [(7 * index) % 23 for index in range(50)]
    samples = [{"input_ids": [0] * length} for length in lengths]

    def drawn(epoch: int) -> list[int]:
        steps = range(7 * epoch, 7 * epoch + 7)
        return [index for step in steps for index in sampling.step_samples(samples, step, batch_size=8, seed=3)]

    epochs = []
    for epoch in range(2):
        order = drawn(epoch)
        assert sorted(order) == list(range(50))
        steps = [[lengths[index] for index in order[first : first + 8]] for first in range(0, 50, 8)]
        assert all(step == sorted(step, reverse=True) for step in steps)
        assert order == drawn(epoch)
        epochs.append([frozenset(order[first : first + 8]) for first in range(0, 50, 8)])
    assert epochs[0] != epochs[1]
    assert [set(step) for step in epochs[0]] != [set(range(first, first + 8)) for first in range(0, 50, 8)]


@pytest.mark.parametrize("method", ["lors", "spp", "lora"])
def test_lora_b_has_its_own_learning_rate(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, method: str
) -> None:
    model, config = ModelConfig(path=str(sparse_checkpoint)), replace(
        config, method=method, init="kaiming", max_steps=1, learning_rate=1e-4, warmup_steps=0, max_grad_norm=0
    )  # fmt: skip
    largest = {}
    for ratio in (1.0, 16.0):
        tune(replace(config, loraplus_lr_ratio=ratio), model, tmp_path / str(ratio))
        tensors = load_file(tmp_path / str(ratio) / "adapter/adapter_model.safetensors")
        largest[ratio] = max(float(value.abs().max()) for name, value in tensors.items() if "lora_B" in name)
    # AdamW's first step moves each entry by the learning rate, whatever the gradient's size
    assert largest[1.0] == pytest.approx(1e-4, rel=1e-2)
    assert largest[16.0] == pytest.approx(16e-4, rel=1e-2)


def test_a_log_begun_beside_an_earlier_result_is_gone_on_with(tmp_path: Path) -> None:
    from lors_cli.tuning.stage import _running_log

    work = tmp_path / ".work"
    work.mkdir()
    assert _running_log(tmp_path, work) == tmp_path / "log.jsonl"
    (tmp_path / "log.jsonl").write_text("the earlier result's, whose stage.json publishing has removed")
    (work / "log.jsonl").write_text("this one's")
    assert _running_log(tmp_path, work).read_text() == "this one's"


def test_a_run_killed_after_training_merges_without_training_again(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    with monkeypatch.context() as patch:
        patch.setattr(records, "publish", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            tune(config, model, out)
    steps: list[int] = []
    original = AdapterTrainer.micro_batch

    def counted(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        steps.append(1)
        return original(self, *args)

    monkeypatch.setattr(AdapterTrainer, "micro_batch", counted)
    tune(config, model, out)
    assert steps == []
    tune(config, model, tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_checkpoints_hold_adapters_and_state_only_and_half_ones_are_passed_over(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    found = whole_checkpoints(out / "checkpoints", record.fingerprint)
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-8"]
    names = {file.name for file in found[-1].iterdir()}
    assert names == {
        "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "lors.json",
    }  # fmt: skip
    tensors = load_file(found[-1] / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(found[-1] / name, weights_only=True)
    (found[-1] / "optimizer.pt").unlink()
    assert whole_checkpoints(out / "checkpoints", record.fingerprint) == found[:1]
    assert whole_checkpoints(out / "checkpoints", "another") == []


def test_a_broken_loss_stops_with_the_last_checkpoint_kept(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AdapterTrainer.micro_batch

    def breaks(self: AdapterTrainer, *args: Any) -> torch.Tensor:
        loss = original(self, *args)
        return loss * float("nan") if self.step == 4 else loss

    monkeypatch.setattr(AdapterTrainer, "micro_batch", breaks)
    with pytest.raises(UsageError, match="broke at step 5") as caught:
        tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert "checkpoint-3 is kept" in str(caught.value)
    assert (tmp_path / "tune" / "checkpoints" / "checkpoint-3").is_dir()
    assert records.read_record(tmp_path / "tune") is None


def test_an_interrupt_saves_and_the_same_call_goes_on(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    model = ModelConfig(path=str(sparse_checkpoint))
    original = StepLog.append

    def interrupts(self: StepLog, row: dict[str, Any]) -> None:
        original(self, row)
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepLog, "append", interrupts)
    with pytest.raises(KeyboardInterrupt):
        tune(config, model, tmp_path / "tune")
    assert (tmp_path / "tune" / "checkpoints" / "checkpoint-4").is_dir()  # step 5 is given up, to be done again
    monkeypatch.setattr(StepLog, "append", original)
    tune(config, model, tmp_path / "tune")
    tune(config, model, tmp_path / "whole")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "tune"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_dense_model_is_refused(
    sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any, config: TuneConfig, tmp_path: Path
) -> None:
    model = sparse_llama()
    for parameter in model.parameters():
        parameter.data[parameter == 0] = 0.01
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="the model is dense"):
        tune(config, ModelConfig(path=str(tmp_path / "dense")), tmp_path / "tune")


def test_a_merge_that_breaks_the_pattern_publishes_nothing(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.tuning.lors import LorsLinear

    monkeypatch.setattr(LorsLinear, "merged_weight", lambda self: torch.ones_like(self.weight))
    with pytest.raises(SparsityError):
        tune(replace(config, max_steps=1), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert records.read_record(tmp_path / "tune") is None
    assert not (tmp_path / "tune" / "model.safetensors").exists()


def test_a_base_that_breaks_its_pattern_at_one_place_is_held_to_its_share(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    tensors = load_file(sparse_checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 0.5
    save_file(tensors, sparse_checkpoint / "model.safetensors", metadata={"format": "pt"})
    base = ModelConfig(path=str(sparse_checkpoint))
    assert [inspect(base)[key] for key in ("pattern", "violations")] == ["2:4", 1]
    tuned = tune(replace(config, max_steps=1, init="kaiming"), base, tmp_path / "tune")
    merged = merge(base.path, tmp_path / "tune" / "adapter", tmp_path / "merged")
    found = inspect(ModelConfig(path=str(tmp_path / "tune")))
    for metrics in (tuned.metrics, merged, found):
        assert [metrics[key] for key in ("pattern", "violations")] == ["unstructured", 0]


def test_epochs_count_the_steps_that_the_trainer_makes(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    by_epoch = replace(config, max_steps=None, epochs=1.5, batch_size=6, init="kaiming")
    record = tune(by_epoch, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert record.metrics["steps"] == num_steps(by_epoch, 40) == 11
    assert num_steps(replace(by_epoch, epochs=1.1), 300) == 55  # 1.1 · 50 is more in floats
    many = replace(by_epoch, epochs=1.1, data=replace(by_epoch.data, num_samples=50))
    assert estimate._samples(many, None) == 55


def test_gradient_checkpointing_changes_nothing_but_memory(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(sparse_checkpoint))
    plain = tune(config, model, tmp_path / "plain")
    checkpointed = tune(replace(config, gradient_checkpointing=True), model, tmp_path / "checkpointed")
    assert plain.fingerprint == checkpointed.fingerprint
    first, second = (tmp_path / name / "model.safetensors" for name in ("plain", "checkpointed"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_plain_text_and_tokens_are_tuned_on_too(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, kind: str
) -> None:
    if kind == "text":
        source = tmp_path / "book.txt"
        source.write_text("the cat sat on the mat. " * 400, encoding="utf-8")
    else:
        source = tmp_path / "ids.safetensors"
        save_file({"input_ids": torch.arange(64).repeat(12, 1).to(torch.int32)}, source)
    data = TuneDataConfig(dataset=str(source), max_length=64)
    record = tune(replace(config, data=data), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert record.metrics["last_loss"] < record.metrics["first_loss"]


def test_a_finished_result_stays_whole_while_another_is_begun_in_its_folder(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune"
    finished = tune(config, model, out)
    killed_at(2, replace(config, rank=2), model, out, monkeypatch)
    assert records.is_finished(out, finished.fingerprint)


def test_each_linear_keeps_its_own_share_of_zeros(
    sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any, config: TuneConfig, tmp_path: Path
) -> None:
    model = sparse_llama()
    for index, weight in enumerate(prunable_weights(model).values()):
        matrix = weight.matrix.normal_(generator=torch.Generator().manual_seed(index))
        rank = matrix.abs().flatten().argsort()
        matrix.view(-1)[rank[: int(len(rank) * (0.3 + 0.03 * index))]] = 0
    model.save_pretrained(tmp_path / "uneven")
    tiny_tokenizer.save_pretrained(tmp_path / "uneven")
    first = tune(replace(config, max_steps=2), ModelConfig(path=str(tmp_path / "uneven")), tmp_path / "once")
    again = tune(replace(config, max_steps=2), ModelConfig(path=str(tmp_path / "once")), tmp_path / "twice")
    assert inspect(ModelConfig(path=str(tmp_path / "twice")))["violations"] == 0
    shares = [[layer["sparsity"] for layer in record.metrics["layers"]] for record in (first, again)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-2)
    assert max(shares[0]) - min(shares[0]) > 0.3
    broken = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    weight = next(iter(prunable_weights(broken).values())).matrix
    weight[weight == 0] = 0.01
    broken.save_pretrained(tmp_path / "twice")
    assert inspect(ModelConfig(path=str(tmp_path / "twice")))["violations"] > 100


def test_settings_without_effect_do_not_change_the_fingerprint(sparse_checkpoint: Path, config: TuneConfig) -> None:
    def fingerprint(**changes: Any) -> str:
        return stage_fingerprint(replace(config, **changes), "base", None)

    assert fingerprint() == fingerprint(epochs=9.0) == fingerprint(save_steps=50) == fingerprint(alpha=4)
    assert fingerprint(init="kaiming") == fingerprint(init="kaiming", init_samples=2)
    assert fingerprint(init_samples=2) != fingerprint() != fingerprint(rank=8)
    assert fingerprint(max_steps=None) != fingerprint(max_steps=None, epochs=9.0)


# ---- the prompt in the checkpoint

QUESTION = [{"role": "user", "content": "say 3"}]


@pytest.mark.parametrize("template", ["alpaca", "alpaca_short", "vicuna"])
def test_the_checkpoint_has_the_prompt_it_was_trained_with(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, template: str
) -> None:
    """A generation prompt of the saved tokenizer is the beginning of a training sample."""
    config = replace(config, max_steps=1, data=replace(config.data, template=template))
    out = tmp_path / "tune"
    record = tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    samples = tuning_samples(config.data, tokenizer, seed=0, num_needed=None, model_max_length=512, data_dir=None)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    sample = samples.samples[3]
    assert sample["input_ids"][: len(asked)] == asked
    assert all(label == -100 for label in sample["labels"][: len(asked)])
    assert sample["labels"][len(asked)] != -100
    assert record.metrics["prompt"] == {"format": template, "ends_with": "</s>"}


def test_float16_keeps_the_gradients_of_steps_with_many_labels(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided by a step's labels before backward they would fall below its smallest number."""
    original, found = AdapterTrainer.gradients, {}

    def gradients(self: AdapterTrainer) -> Any:
        result = original(self)
        found[self.model.dtype] = torch.cat([parameter.grad.flatten() for parameter in self.trained])
        return result

    monkeypatch.setattr(AdapterTrainer, "gradients", gradients)
    monkeypatch.setattr(processes, "add_up", lambda labels: labels * 2**16)
    config = replace(config, init="kaiming", max_steps=1)
    losses = []
    for dtype in ("float16", "float32"):
        model = ModelConfig(path=str(sparse_checkpoint), dtype=dtype, device="cpu")  # type: ignore[arg-type]
        losses.append(tune(config, model, tmp_path / dtype).metrics["first_loss"])
    half, exact = found[torch.float16], found[torch.float32]
    assert float((half - exact).norm()) < 0.02 * float(exact.norm())
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_merge_carries_prompt_and_card(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    """A merged checkpoint once had the base's chat template, and no card."""
    config = replace(config, max_steps=1, data=replace(config.data, template="vicuna"))
    tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    merge(str(sparse_checkpoint), tmp_path / "tune" / "adapter", tmp_path / "merged")
    for name in ("chat_template.jinja", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "tune" / name).read_bytes(), name
    first = records.read_record(tmp_path / "merged")
    settings = json.loads((tmp_path / "tune/adapter/adapter_config.json").read_text())
    (tmp_path / "tune/adapter/adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1.0}))
    merge(str(sparse_checkpoint), tmp_path / "tune" / "adapter", tmp_path / "weaker")
    weaker = records.read_record(tmp_path / "weaker")
    assert first is not None
    assert weaker is not None
    assert weaker.files["model.safetensors"] != first.files["model.safetensors"]
    assert weaker.fingerprint != first.fingerprint  # else scores of the one would be those of the other
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "vicuna: one question" in card
    assert "tuned with lors at rank 4" in card
    assert str(tmp_path) not in card
    source = ModelConfig(path=str(tmp_path / "merged"))
    assert prompt_of(source) == {"format": "vicuna", "from": "chat_template.jinja, as it was tuned"}
    assert prompt_of(ModelConfig(path=str(sparse_checkpoint))) == {"format": None, "from": None}


def test_a_chat_model_keeps_its_template_and_generation_ends_where_answers_did(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    """As Qwen's base models: the template ends an answer in another token than the tokenizer's EOS."""
    tokenizer = AutoTokenizer.from_pretrained(sparse_checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '~\n' }}{% endfor %}"
    tokenizer.save_pretrained(sparse_checkpoint)
    out = tmp_path / "tune"
    data = replace(config.data, template="chat")
    tune(replace(config, max_steps=1, data=data), ModelConfig(path=str(sparse_checkpoint)), out)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [ord("~"), 257]
    assert prompt_of(ModelConfig(path=str(out)))["format"] == "chat"
    assert prompt_of(ModelConfig(path=str(sparse_checkpoint)))["from"] == "chat_template.jinja, as the base has it"


def test_text_leaves_the_base_s_template(sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is a story about a fox. " * 60)
    data = TuneDataConfig(dataset=str(tmp_path / "text.txt"), max_length=32)
    record = tune(replace(config, max_steps=1, data=data), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert AutoTokenizer.from_pretrained(tmp_path / "tune").chat_template is None
    assert "prompt" not in record.metrics


def test_generation_ends_and_says_nothing(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An answer that was learnt by heart comes, ends in EOS, and no warning is given; pad is EOS, as in SmolLM2."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"instruction": "say 3", "input": "", "output": "ab"}) + "\n")
    settings = json.loads((sparse_checkpoint / "generation_config.json").read_text())
    del settings["pad_token_id"]
    idle = {"temperature": 0.9, "top_p": 0.6}  # without do_sample, as Llama 2's first files had it
    (sparse_checkpoint / "generation_config.json").write_text(json.dumps({**settings, **idle}))
    data = replace(config.data, dataset=str(path), template="alpaca_short")
    out = tmp_path / "tune"
    config = replace(config, rank=16, batch_size=1, per_device_batch_size=1, max_steps=60, data=data)
    tune(config, ModelConfig(path=str(sparse_checkpoint)), out)
    model, tokenizer = _model(out), AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(**asked, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(found[0, asked["input_ids"].shape[1] :]) == "ab</s>"
    assert not caplog.records
    assert model.generation_config.pad_token_id == model.generation_config.eos_token_id == 257
    assert not idle.keys() & json.loads((out / "generation_config.json").read_text()).keys()


def test_columns_are_those_of_the_recipe_to_the_end(
    sparse_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    """The file was opened again without `columns` once all steps were done, and refused then."""
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"ask": f"say {i}", "reply": f"it is {i}"}) + "\n" for i in range(8)))
    data = replace(config.data, dataset=str(path), columns=ColumnsConfig(instruction="ask", output="reply"))
    record = tune(replace(config, max_steps=1, data=data), ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert record.config["data"]["packing"] == "separate"
