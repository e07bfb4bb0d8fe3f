"""Distillation: the loss against the plain formula, which teacher is taken, and that it is learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lors_cli.errors import MissingError, UsageError
from lors_cli.files import atomic, records
from lors_cli.pipeline.running import run_recipe
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.schema import DistillConfig, ModelConfig, TuneConfig
from lors_cli.tuning import head
from lors_cli.tuning.head import Teacher, causal_lm_loss
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.teacher import with_teacher


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill((torch.rand(3, 14, generator=generator) < 0.3) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_loss_and_gradient_equal_the_plain_formula(
    weight: float, temperature: float, chunk_tokens: int, sparse_llama: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 258 * chunk_tokens})
    student, dense = sparse_llama(torch.float64), sparse_llama(torch.float64, seed=1)
    inputs = _batch()
    norm = student.model.norm.weight.requires_grad_(True)

    loss = causal_lm_loss(student, inputs, 40, teacher=Teacher(dense, weight, temperature))
    loss.backward()
    ours, norm.grad = norm.grad, None

    wanted = inputs["labels"][:, 1:]
    chosen = wanted != -100
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    logits, teacher = student(**plain).logits[:, :-1][chosen], dense(**plain).logits[:, :-1][chosen]
    entropy = F.cross_entropy(logits, wanted[chosen], reduction="sum")
    divergence = F.kl_div(F.log_softmax(logits / temperature, -1), F.log_softmax(teacher / temperature, -1),
                          log_target=True, reduction="sum")  # fmt: skip
    expected = ((1 - weight) * entropy + weight * temperature**2 * divergence) / 40
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    expected.backward()
    torch.testing.assert_close(ours, norm.grad, rtol=1e-9, atol=1e-12)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(sparse_llama: Callable[..., PreTrainedModel]) -> None:
    model = sparse_llama(torch.float64)
    norm = model.model.norm.weight.requires_grad_(True)
    loss = causal_lm_loss(model, _batch(), teacher=Teacher(model, 1.0, 1.0))
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert float(norm.grad.abs().max()) < 1e-12


@pytest.fixture
def dense_checkpoint(tmp_path: Path, sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    """Another random model with the same vocabulary."""
    folder = tmp_path / "dense"
    sparse_llama(torch.bfloat16, seed=5).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_tuning_with_a_teacher_comes_nearer_to_it_than_without(
    sparse_checkpoint: Path, dense_checkpoint: Path, config: TuneConfig, tmp_path: Path
) -> None:
    distill = DistillConfig(teacher=str(dense_checkpoint), weight=1.0)
    dense = AutoModelForCausalLM.from_pretrained(dense_checkpoint)
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))

    def distance(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return float(F.kl_div(model(ids).logits.float().log_softmax(-1), dense(ids).logits.float().log_softmax(-1),
                              log_target=True, reduction="batchmean"))  # fmt: skip

    model = ModelConfig(path=str(sparse_checkpoint))
    record = tune(replace(config, distill=distill, learning_rate=2e-2), model, tmp_path / "taught")
    tune(replace(config, learning_rate=2e-2), model, tmp_path / "alone")
    assert record.metrics["last_loss"] < record.metrics["first_loss"]
    with torch.no_grad():
        assert distance(tmp_path / "taught") < distance(tmp_path / "alone")


def test_the_teacher_is_the_model_that_was_pruned(sparse_checkpoint: Path, config: TuneConfig) -> None:
    model, config = ModelConfig(path=str(sparse_checkpoint)), replace(config, distill=DistillConfig())
    with pytest.raises(UsageError, match=r"distill.*pruned from"):
        with_teacher(config, model)
    record = records.StageRecord("prune", "f", {}, {"path": "some/dense"}, {}, {}, 1.0, {})
    atomic.write_json(sparse_checkpoint / "stage.json", record.__dict__)
    assert with_teacher(config, model).distill == DistillConfig(teacher="some/dense")
    record.metrics["commit"] = "c0ffee"  # main may have moved since
    atomic.write_json(sparse_checkpoint / "stage.json", record.__dict__)
    assert with_teacher(config, model).distill == DistillConfig(teacher="some/dense", revision="c0ffee")
    chosen = replace(config, distill=DistillConfig(revision="v2"))
    assert with_teacher(chosen, model).distill == DistillConfig(teacher="some/dense", revision="v2")
    given = replace(config, distill=DistillConfig(teacher="another"))
    assert with_teacher(given, model) is given


def test_another_vocabulary_or_a_missing_teacher_is_refused(
    sparse_checkpoint: Path, tiny_tokenizer: Any, config: TuneConfig, tmp_path: Path
) -> None:
    shape = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "other")
    model = ModelConfig(path=str(sparse_checkpoint))
    with pytest.raises(UsageError, match="knows 300 tokens, the sparse model 258"):
        tune(replace(config, distill=DistillConfig(teacher=str(tmp_path / "other"))), model, tmp_path / "out")
    with pytest.raises(MissingError):
        tune(replace(config, distill=DistillConfig(teacher=str(tmp_path / "nowhere"))), model, tmp_path / "out")


def test_the_teacher_and_its_share_belong_to_the_fingerprint(dense_checkpoint: Path, sparse_checkpoint: Path) -> None:
    def fingerprint(**settings: Any) -> str:
        return stage_fingerprint(TuneConfig(data=replace(TuneConfig().data, dataset="pydoc"), **settings), "m", None)

    taught = fingerprint(distill=DistillConfig(teacher=str(dense_checkpoint)))
    others = [fingerprint(), fingerprint(distill=DistillConfig(teacher=str(sparse_checkpoint))),
              fingerprint(distill=DistillConfig(teacher=str(dense_checkpoint), weight=0.7)),
              fingerprint(distill=DistillConfig(teacher=str(dense_checkpoint), temperature=2))]  # fmt: skip
    assert len({taught, *others}) == 5


def test_a_recipe_names_its_own_dense_model_as_teacher(
    tmp_path: Path, dense_checkpoint: Path, instructions: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
name: taught
model: {{path: {dense_checkpoint}}}
prune: {{method: magnitude, pattern: "2:4"}}
tune:
  data: {{dataset: {instructions}, max_length: 320}}
  max_steps: 2
  batch_size: 2
  init: kaiming
  distill: {{weight: 0.4}}
""")
    recipe = load_recipe(path)
    assert recipe.tune is not None
    assert recipe.tune.distill == DistillConfig(teacher=str(dense_checkpoint), weight=0.4)
    first = run_recipe(recipe, tmp_path / "run")
    assert [stage["status"] for stage in first["stages"]] == ["done", "done"]
    again = run_recipe(recipe, tmp_path / "run")
    assert [stage["status"] for stage in again["stages"]] == ["skipped", "skipped"]
