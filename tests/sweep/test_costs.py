"""Estimates of sweeps: operations against what PyTorch counts, and the rates that times go by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lors_cli.models.blocks import prunable_weights
from lors_cli.models.size import forward, model_size
from lors_cli.pipeline.plans import StagePlan, plan_chain, plan_stages
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sweep import costs as module
from lors_cli.sweep.costs import costs, device_rate, disk_needed, operations
from lors_cli.sweep.stages import distinct, plan_cells
from lors_cli.tuning.attach import attach
from lors_cli.tuning.estimate import EXACT, PRODUCTS
from lors_cli.tuning.lors import choose_gradients

LENGTH, SEQUENCES = 64, 8


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose products outweigh all else, as in large models."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plan(recipe: str, stage: str, *overrides: str) -> StagePlan:
    plans = plan_stages(load_recipe(Path(recipe), overrides), Path("out"), None)
    return next(plan for plan in plans if plan.stage == stage)


def test_a_forward_pass(wide: Path) -> None:
    size = model_size(ModelConfig(path=str(wide)))
    assert size is not None
    model = AutoModelForCausalLM.from_pretrained(wide, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(SEQUENCES, LENGTH, dtype=torch.long))
    masked = 2 * size.num_blocks * size.hidden_size * LENGTH * LENGTH * SEQUENCES  # counted there, not used
    assert forward(size, SEQUENCES * LENGTH, LENGTH) == counter.get_total_flops() - masked


@pytest.mark.parametrize(
    ("method", "gradient"),
    [("lors", "exact"), *((method, "approximate") for method in PRODUCTS if method != "lora")],
)
def test_a_training_step(wide: Path, method: str, gradient: Any) -> None:
    size = model_size(ModelConfig(path=str(wide)))
    assert size is not None
    model = AutoModelForCausalLM.from_pretrained(wide, attn_implementation="eager").requires_grad_(False)
    attach(model, list(prunable_weights(model)), 2, 16.0, use_rslora=True, method=method)
    choose_gradients(model, gradient, step=0)
    model.enable_input_require_grads()
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    tokens = SEQUENCES * LENGTH
    attention_and_head = 3 * (forward(size, tokens, 2 * LENGTH) - 2.0 * tokens * size.num_prunable)
    in_blocks = counter.get_total_flops() - attention_and_head
    assert in_blocks / (tokens * size.num_prunable) == pytest.approx(PRODUCTS[method] + 2 * EXACT[gradient], rel=0.1)


def test_tuning_grows_with_its_settings(at_workshop: Path) -> None:
    def count(*overrides: str) -> float:
        found = operations(plan("tiny.yaml", "tune", *overrides), None)
        assert found is not None
        return found

    kaiming = "tune.init=kaiming"
    assert count(kaiming, "tune.max_steps=12") == pytest.approx(2 * count(kaiming))
    assert count(kaiming, "tune.batch_size=8") == pytest.approx(2 * count(kaiming), rel=0.1)
    assert count(kaiming) < count() < count("tune.init_samples=100")
    assert count(kaiming, "tune.gradient_checkpointing=true") > 1.2 * count(kaiming)
    assert count(kaiming) < count(kaiming, "tune.gradient=rotating") < count(kaiming, "tune.gradient=exact")
    epochs = ["tune.max_steps=null", "tune.epochs=1.5"]  # of 40 rows: 60 samples, where 6 steps of 4 have 24
    assert count(kaiming, *epochs) == pytest.approx(60 / 24 * count(kaiming))
    size = model_size(plan("tiny.yaml", "tune").origin)
    assert size is not None
    length = plan("tiny.yaml", "tune").config.data.max_length  # type: ignore[union-attr]
    teacher = forward(size, 24 * length, length)
    assert count(kaiming, "tune.distill.weight=0.5") == pytest.approx(count(kaiming) + teacher)
    Path("text.txt").write_text("some words " * 2000)
    budget = ["tune.data.dataset=text.txt", "tune.max_steps=null", f"tune.max_tokens={48 * length}"]
    assert count(kaiming, *budget) == pytest.approx(2 * count(kaiming))


def test_alpaca_on_the_hub_is_known() -> None:
    (tune,) = (plan for plan in plan_chain(recipe(), lambda stage, _: Path(stage), None).plans if plan.stage == "tune")
    found = operations(tune, None)
    assert found is not None
    tokens = 3 * 52_002 * 105
    assert found == pytest.approx(4 * 7e9 * tokens, rel=0.25)  # Llama-3-8B has 7.0e9 weights in its blocks


def recipe() -> object:
    from lors_cli.recipe.shipped import find

    return load_recipe(find("recipe", "llama3-8b-2of4"))


def test_pruning(at_workshop: Path) -> None:
    size = model_size(ModelConfig(path="dense"))
    assert size is not None

    def count(*overrides: str) -> float:
        found = operations(plan("tiny.yaml", "prune", *overrides), None)
        assert found is not None
        return found

    one_pass = forward(size, 8 * 32, 32, head=False)
    assert count("prune.method=wanda") == 2 * one_pass
    assert count("prune.method=wanda", "prune.true_sequential=true") == one_pass
    inputs = [32, 32, 32, 64]  # of attention, its output, gate and up, down
    sums = sum(2 * 8 * 32 * width**2 for width in inputs) + sum(2 * width**3 for width in inputs)
    updates = sum(rows * columns**2 for rows, columns in size.linears)
    assert count("prune.method=sparsegpt") == 2 * one_pass + 2 * sums + updates
    assert count("prune.method=magnitude") < one_pass
    assert count("prune.reconstruct_epochs=2") == count() + 7 * one_pass


def test_evaluation(at_workshop: Path) -> None:
    size = model_size(ModelConfig(path="dense"))
    assert size is not None
    bare, only = "eval.generations=false", ("eval.models=[dense]", "eval.generations=false")
    text = operations(plan("tiny.yaml", "eval", *only, "eval.tasks=[]"), None)
    assert text == forward(size, 4 * 64, 64)
    whole = ("eval.tasks=[]", "eval.perplexity=[wikitext2]", "eval.perplexity_windows=null")
    assert operations(plan("tiny.yaml", "eval", *only, *whole), None) == forward(size, 300_000, 64)
    assert (
        operations(plan("tiny.yaml", "eval", bare, "eval.perplexity_windows=null"), None) is None
    )  # a text of any length
    assert operations(plan("tiny.yaml", "eval", bare, "eval.tasks=[]"), None) == 3 * forward(size, 4 * 64, 64)
    few, all_of_it = (
        operations(plan("tiny.yaml", "eval", *only, "eval.tasks=[rte]", "eval.perplexity=[]", limit), None)
        for limit in ("eval.limit=27", "eval.limit=null")
    )
    assert few is not None
    assert all_of_it == pytest.approx(few * 277 / 27)


# Times ----------------------------------------------------------------------------------------------------------


def test_times_go_by_a_given_rate(at_start: Path) -> None:
    plans = sweep_plans()
    for plan, cost in zip(plans, costs(plans, dict.fromkeys((p.folder for p in plans), None), 0.5), strict=True):
        assert cost.operations == operations(plan, None)
        assert cost.operations is not None
        assert cost.seconds == pytest.approx(cost.operations / 0.5e12)


def test_times_go_by_finished_stages_of_the_same_shape(at_sweep: Path) -> None:
    plans = sweep_plans()
    (lors,) = [plan for plan in plans if plan.stage == "tune" and plan.config.method == "lors"][:1]  # type: ignore[union-attr]
    record = json.loads((lors.folder / "stage.json").read_text())
    record["elapsed_s"] = 100.0
    (lors.folder / "stage.json").write_text(json.dumps(record))
    plans = sweep_plans("tune.max_steps=4")
    everything = [*sweep_plans(), *plans]
    found = costs(everything, dict.fromkeys((plan.folder for plan in everything), None), 1e-9)
    seconds = {
        plan.config.method: cost.seconds  # type: ignore[union-attr]
        for plan, cost in zip(everything, found, strict=True)
        if plan.stage == "tune" and plan.status != "done"
    }
    per_operation = 100 / (operations(lors, None) or math.nan)
    wanted = next(operations(plan, None) for plan in plans if plan.stage == "tune" and plan.config.method == "lors")  # type: ignore[union-attr]
    assert seconds["lors"] == pytest.approx(per_operation * (wanted or math.nan))
    assert seconds["sqft"] < 50  # by its own pace, which is no 100 s
    assert all(cost.seconds == 0 for plan, cost in zip(everything, found, strict=True) if plan.status == "done")


def sweep_plans(*overrides: str) -> list[StagePlan]:
    from lors_cli.sweep.cells import load_sweep

    cells = load_sweep(Path("grid.yaml"), overrides).cells
    return [plan for plan, _ in distinct(plan_cells(cells, Path("sweeps/grid"))).values()]


def test_the_devices_rate_is_a_share_of_a_product(at_workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rates", {})
    monkeypatch.setattr(module, "_timed_product", lambda left, right: 1e-3)
    share = module.EFFICIENCY["cpu"]
    assert device_rate(ModelConfig(path="dense", device="cpu")) == share * 2 * 512 * 32 * 64 / 1e-3


def test_disk_is_what_stays_and_the_largest_at_work(at_start: Path) -> None:
    from lors_cli.pipeline.stages import STAGES

    size = model_size(ModelConfig(path="dense", dtype="bfloat16"))
    assert size is not None
    plans = sweep_plans()
    kept = sum(64 << 20 if plan.stage == "eval" else size.num_bytes + (16 << 20) for plan in plans)
    at_work = [STAGES[plan.stage].needs(plan.config, size, 1).disk for plan in plans if plan.stage != "eval"]
    assert disk_needed(plans) == kept + max(at_work) - size.num_bytes - (16 << 20)


def test_what_is_unknown_is_said(at_start: Path) -> None:
    plans = sweep_plans("model.path=nobody/nothing")
    found = costs(plans, dict.fromkeys((plan.folder for plan in plans), None))
    assert all((cost.operations, cost.seconds, cost.memory, cost.disk) == (None, None, None, None) for cost in found)
    assert disk_needed(plans) is None
    assert "not known" in module.assumption(plans)
