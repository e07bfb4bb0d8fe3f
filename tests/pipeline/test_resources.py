"""Sizes and estimates before anything is loaded."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lors_cli.errors import ResourceError, UsageError
from lors_cli.models.blocks import prunable_weights
from lors_cli.models.needs import RUNTIME, Estimate
from lors_cli.models.size import ModelSize, forward, model_size
from lors_cli.pipeline import preflight, resources
from lors_cli.pipeline.plans import StagePlan
from lors_cli.pipeline.preflight import troubles
from lors_cli.pipeline.resources import check_disk, check_memory, try_estimate
from lors_cli.pipeline.stages import STAGES
from lors_cli.pruning import estimate as pruning_estimate
from lors_cli.pruning.estimate import memory_parts, operations, shortage
from lors_cli.recipe.schema import (
    CalibrationConfig,
    DistillConfig,
    EvalConfig,
    ModelConfig,
    PackConfig,
    PruneConfig,
    TuneConfig,
    TuneDataConfig,
)
from lors_cli.tuning import estimate as tuning_estimate
from lors_cli.tuning.attach import adaptable_layers

GIB = 1 << 30
NAMES = {PruneConfig: "prune", TuneConfig: "tune", EvalConfig: "eval"}


def estimate(config: Any, size: ModelSize) -> Estimate:
    return STAGES[NAMES[type(config)]].needs(config, size, 1)


def plan_of(config: Any, model: ModelConfig) -> StagePlan:
    return StagePlan(NAMES[type(config)], Path("out"), config, {"dense": model}, model, "0", "run", "")


@pytest.mark.parametrize(
    ("hub_id", "num_parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ],
)
def test_known_models_have_their_published_size(hub_id: str, num_parameters: int) -> None:
    size = model_size(ModelConfig(path=hub_id))
    assert size is not None
    assert size.num_parameters == num_parameters
    assert size.num_bytes == num_parameters * 2


def test_an_unknown_hub_model_has_no_size() -> None:
    assert model_size(ModelConfig(path="nobody/nothing")) is None
    needs, why = try_estimate(plan_of(PruneConfig(), ModelConfig(path="nobody/nothing")))
    assert needs is None
    assert "unknown" in why


def test_what_an_interrupted_call_has_written_is_not_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan_of(PruneConfig(), ModelConfig(path="HuggingFaceTB/SmolLM2-135M")), folder=tmp_path)
    needs, _ = try_estimate(plan)
    assert needs is not None
    monkeypatch.setattr(resources, "free_disk", lambda folder: needs.disk - 1000)
    with pytest.raises(ResourceError, match="prune needs about"):
        check_disk(plan)
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "block-0.safetensors").write_bytes(bytes(1000))
    check_disk(plan)


def test_a_missing_folder_is_a_reason_not_an_error() -> None:
    needs, why = try_estimate(plan_of(PruneConfig(), ModelConfig(path="./gone")))
    assert needs is None
    assert "./gone" in why


def test_a_folder_has_the_size_of_its_model(workshop: Path) -> None:
    from lors_cli.models.loading import load_model

    config = ModelConfig(path=str(workshop / "dense"), dtype="float32")
    size, model = model_size(config), load_model(config)
    assert size is not None
    assert size.num_parameters == model.num_parameters()
    assert size.num_prunable == sum(weight.matrix.numel() for weight in prunable_weights(model).values())
    assert max(columns for _, columns in size.linears) == 64
    assert size.num_bytes == 4 * size.num_parameters
    halved = model_size(replace(config, dtype="bfloat16"))
    assert halved is not None
    assert halved.num_bytes * 2 == size.num_bytes


SPARSEGPT = PruneConfig(calibration=CalibrationConfig(num_samples=32, sequence_length=512))
TUNE = TuneConfig(rank=8, batch_size=8, per_device_batch_size=2, data=TuneDataConfig(max_length=256))


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (PruneConfig(method="magnitude"), replace(SPARSEGPT, method="wanda")),
        (replace(SPARSEGPT, method="wanda"), SPARSEGPT),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, num_samples=64))),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, sequence_length=1024))),
        (SPARSEGPT, replace(SPARSEGPT, calibration=replace(SPARSEGPT.calibration, batch_size=16))),
        (TUNE, replace(TUNE, rank=16)),
        (TUNE, replace(TUNE, per_device_batch_size=4)),
        (TUNE, replace(TUNE, data=replace(TUNE.data, max_length=512))),
        (replace(TUNE, gradient_checkpointing=True), TUNE),
        (replace(TUNE, init="kaiming"), replace(TUNE, init="gradient-exact")),
        (TUNE, replace(TUNE, merged_cache="on")),
        (replace(TUNE, method="sqft-gc"), replace(TUNE, method="sqft")),
        (replace(TUNE, method="hira-gc"), replace(TUNE, method="hira")),
        (replace(TUNE, gradient="exact"), replace(TUNE, method="sqft")),
        (EvalConfig(batch_size=4), EvalConfig(batch_size=8)),
    ],
)
def test_estimates_grow_with_the_settings(small: Any, large: Any) -> None:
    size = model_size(ModelConfig(path="HuggingFaceTB/SmolLM2-135M"))
    assert size is not None
    assert estimate(small, size).memory < estimate(large, size).memory
    assert estimate(small, size).disk <= estimate(large, size).disk


def size_of(hub_id: str) -> ModelSize:
    size = model_size(ModelConfig(path=hub_id))
    assert size is not None
    return size


@pytest.mark.parametrize("config", [TUNE, EvalConfig()])
def test_tuning_and_evaluation_hold_the_whole_model(config: Any) -> None:
    for hub_id in ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Meta-Llama-3-8B"):
        size = size_of(hub_id)
        needs = estimate(config, size)
        assert needs.memory > size.num_bytes + RUNTIME
        assert "GiB of memory" in str(needs) or "MiB of memory" in str(needs)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "admm"])
def test_pruning_holds_a_block_and_not_the_model(method: Any) -> None:
    size = size_of("meta-llama/Meta-Llama-3-8B")
    config = PruneConfig(method=method, true_sequential=False, calibration=CalibrationConfig(batch_size=1))
    parts = memory_parts(config, size)
    assert parts["hidden_states"] == (0 if method == "magnitude" else 128 * 2048 * 4096 * 2)
    assert RUNTIME + sum(parts.values()) - parts["hidden_states"] < (8 if method == "admm" else 6) * GIB
    assert parts == memory_parts(config, replace(size, num_blocks=320))
    assert estimate(config, size).disk > size.num_bytes
    whole = memory_parts(config, replace(size, streamed=False))
    assert whole["weights"] == size.num_bytes


def test_what_takes_memory_in_pruning() -> None:
    size = size_of("meta-llama/Meta-Llama-3-8B")
    assert [*size.block] == [
        (4096, 4096, False), (1024, 4096, False), (1024, 4096, False), (4096, 4096, False),
        (14336, 4096, False), (14336, 4096, False), (4096, 14336, False),
    ]  # fmt: skip
    base = PruneConfig(method="sparsegpt")
    parts = memory_parts(base, size)
    assert parts["statistics"] == 4 * (3 * 4096**2 + 14336**2)
    sequential = memory_parts(replace(base, true_sequential=True), size)
    assert sequential["statistics"] == 4 * 14336**2
    assert sequential["activations"] - parts["activations"] == 128 * 2048 * (2 * 4096 + 14336) * 2
    on_disk = memory_parts(replace(base, calibration=CalibrationConfig(offload="disk")), size)
    assert on_disk["hidden_states"] == 0
    assert memory_parts(base, size, num_processes=4)["hidden_states"] * 4 == parts["hidden_states"]
    assert memory_parts(replace(base, reconstruct_epochs=1), size)["solver"] > parts["solver"]
    assert memory_parts(replace(base, method="wanda"), size)["statistics"] == 0


def test_a_mixture_holds_every_experts_sums() -> None:
    size = size_of("HuggingFaceTB/SmolLM2-135M")
    experts = [(f"model.layers.0.mlp.experts.{index}.{key}", *shape, True) for index in range(8)
               for key, shape in (("gate_up_proj", (3072, 576)), ("down_proj", (576, 1536)))]  # fmt: skip
    mixture = replace(size, layers=(*size.layers[:4], *experts))
    parts = memory_parts(PruneConfig(method="sparsegpt"), mixture)
    assert parts["statistics"] == 4 * (8 * (576**2 + 1536**2) + 3 * 576**2)


def test_a_token_goes_through_some_of_a_mixtures_experts(build: Any, tmp_path: Path) -> None:
    network = build("Mixtral", num_local_experts=8, num_experts_per_tok=2)
    network.save_pretrained(tmp_path)
    size = model_size(ModelConfig(path=str(tmp_path)))
    assert size is not None
    experts = sum(rows * columns for _, rows, columns, expert in size.layers if expert)
    assert size.num_active == size.num_prunable - experts + experts / 4
    assert forward(size, 3, 0) == 3 * 2 * (size.num_active + size.hidden_size * size.vocab_size)
    config = PruneConfig(method="sparsegpt", calibration=CalibrationConfig(num_samples=1, sequence_length=8))
    every = replace(size, expert_share=1.0)
    forwards = 2 * (forward(every, 8, 8, head=False) - forward(size, 8, 8, head=False))
    sums = sum(2 * 6 * columns**2 for _, _, columns, expert in size.layers if expert)  # of 6 tokens more
    assert operations(config, every) - operations(config, size) == forwards + sums


def test_experts_in_one_tensor_get_no_adapter_in_an_estimate_either(build: Any, tmp_path: Path) -> None:
    """They were counted: 154 GiB for Qwen3-30B-A3B where 63 do."""
    network = build("Qwen2-MoE", intermediate_size=44)  # of its second block, which has no experts
    network.save_pretrained(tmp_path)
    size = model_size(ModelConfig(path=str(tmp_path)))
    assert size is not None
    linears = [linear.weight.shape for linear in adapted_linears(network)]
    tune = TuneConfig(method="lora", init="kaiming", rank=4, max_steps=10, batch_size=8, per_device_batch_size=2,
                      data=TuneDataConfig(max_length=16))  # fmt: skip
    more = estimate(replace(tune, rank=5), size).memory - estimate(tune, size).memory
    assert more == 16 * sum(sum(shape) for shape in linears)  # adapters, gradients, two moments in float32
    sqft, lora = (tuning_estimate.operations(replace(tune, method=name), size, None) for name in ("sqft", "lora"))
    assert sqft is not None
    assert lora is not None
    samples, weights = 10 * 8, sum(shape.numel() for shape in linears)
    assert sqft - lora == weights * (2 * samples * 16 + 2 * 4 * 2 * samples / 2)  # products, and merges of rank 4
    with pytest.raises(UsageError, match=r"work for this model: 1, 2, 4$"):
        STAGES["tune"].fits(replace(tune, method="spp", rank=8), size)


def adapted_linears(network: Any) -> list[torch.nn.Linear]:
    weights = prunable_weights(network)
    return [network.get_submodule(name) for name in adaptable_layers(network, weights)]


def test_a_larger_teacher_counts_as_what_it_is() -> None:
    small, large = size_of("HuggingFaceTB/SmolLM2-135M"), size_of("meta-llama/Meta-Llama-3-8B")
    own, other = (
        replace(TUNE, max_steps=1, distill=DistillConfig(teacher=teacher))
        for teacher in ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Meta-Llama-3-8B")
    )
    assert estimate(other, small).memory - estimate(own, small).memory == large.num_bytes - small.num_bytes
    more = [tuning_estimate.operations(config, small, None) or 0 for config in (own, other)]
    assert more[1] - more[0] == pytest.approx(forward(large, 8 * 105, 105) - forward(small, 8 * 105, 105))
    assert estimate(replace(own, distill=DistillConfig(teacher="nobody/nothing")), small) == estimate(own, small)


@pytest.mark.parametrize("stage", ["tune", "pack"])
def test_what_can_only_be_pruned_is_known_before_it_is(stage: str, build: Any, tmp_path: Path) -> None:
    for name, fits in (("GPT-2", False), ("Mixtral", True)):
        build(name).save_pretrained(tmp_path / name)
        size = model_size(ModelConfig(path=str(tmp_path / name)))
        assert size is not None
        size = replace(size, max_length=2048)
        with nullcontext() if fits else pytest.raises(UsageError, match="Linear can be"):
            STAGES[stage].fits(TUNE if stage == "tune" else PackConfig(), size)


@pytest.mark.parametrize(
    ("config", "key", "length"),
    [
        (SPARSEGPT, "sequence_length", 512),
        (TUNE, "max_length", 256),
        (EvalConfig(perplexity=("pydoc",), perplexity_length=256), "perplexity_length", 256),
    ],
)
def test_a_length_beyond_the_model_s_limit_is_known_before_anything_runs(config: Any, key: str, length: int) -> None:
    size, fits = size_of("HuggingFaceTB/SmolLM2-135M"), STAGES[NAMES[type(config)]].fits
    fits(config, replace(size, max_length=length))
    with pytest.raises(UsageError, match=f"^{key} {length} is more than the model's {length - 1} tokens"):
        fits(config, replace(size, max_length=length - 1))


def test_a_length_that_is_not_used_is_not_looked_at() -> None:
    size = replace(size_of("HuggingFaceTB/SmolLM2-135M"), max_length=8)
    STAGES["prune"].fits(replace(SPARSEGPT, method="magnitude"), size)
    STAGES["eval"].fits(EvalConfig(perplexity_length=256), size)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"dataset": "text.jsonl", "template": "vicuna"}, "data.template is for instructions, and text.jsonl is text"),
        ({"dataset": "rows.jsonl", "packing": "concatenated"}, "would let the instructions of rows.jsonl see one"),
        ({"dataset": "pydoc", "packing": "concatenated"}, "would let the instructions of pydoc see one another"),
        ({"dataset": "rows.jsonl", "stream": "on"}, "data.stream: on is for text, and rows.jsonl is instructions"),
        ({"dataset": "text.jsonl", "stream": "on"}, "val_size: 0.1 is a share, and how long streamed text is"),
        ({"dataset": "talk.jsonl"}, "talk.jsonl, row 2: a conversation of user, assistant, user, assistant does not"),
    ],
)
def test_settings_that_are_not_for_the_data_are_known_before_anything_runs(
    at_workshop: Path, data: dict[str, Any], said: str
) -> None:
    turns = [{"role": role, "content": "Hello."} for role in ("user", "assistant")]
    Path("talk.jsonl").write_text("\n".join(json.dumps({"messages": turns * pairs}) for pairs in (1, 2)))
    config = replace(TUNE, val_size=0.1, data=TuneDataConfig(max_length=256, **data))
    (trouble,) = troubles([plan_of(config, ModelConfig(path="dense"))], None)
    assert said in trouble.error.message


@pytest.mark.parametrize("teacher", [False, True])
def test_weights_that_are_not_there_are_known_before_anything_runs(at_workshop: Path, teacher: bool) -> None:
    """A teacher's were found missing once the model was pruned."""
    folder = Path("other")
    shutil.copytree("dense", folder)
    plan = plan_of(PruneConfig(method="magnitude"), ModelConfig(path="other"))
    if teacher:
        data = TuneDataConfig(dataset="rows.jsonl", max_length=256)
        plan = plan_of(replace(TUNE, data=data, distill=DistillConfig(teacher="other")), ModelConfig(path="dense"))
    assert troubles([plan], None) == []
    weights = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert ["only pickled weights" in trouble.error.message for trouble in troubles([plan], None)] == [True]
    weights.rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ["has no model-2.safetensors" in trouble.error.message for trouble in troubles([plan], None)] == [True]


def test_owl_goes_through_the_dense_model_first() -> None:
    size = size_of("HuggingFaceTB/SmolLM2-135M")
    even = PruneConfig(method="wanda", pattern="unstructured", sparsity=0.5,
                       calibration=CalibrationConfig(num_samples=2, sequence_length=8))  # fmt: skip
    more = operations(replace(even, layer_sparsity="owl"), size) - operations(even, size)
    assert more == forward(size, 16, 8, head=False)


def test_every_stream_of_hidden_states_counts(build: Any, tmp_path: Path) -> None:
    network = build("Gemma3n")
    network.save_pretrained(tmp_path)
    size = model_size(ModelConfig(path=str(tmp_path)))
    assert size is not None
    assert network.config.altup_num_inputs > 1
    config = PruneConfig(method="wanda", calibration=CalibrationConfig(num_samples=2, sequence_length=8))
    hidden = 2 * 8 * network.config.altup_num_inputs * size.hidden_size * size.bytes_a_weight
    assert memory_parts(config, size)["hidden_states"] == hidden
    less = replace(size, num_streams=1)
    assert estimate(config, size).disk - estimate(config, less).disk == 2 * (
        hidden - memory_parts(config, less)["hidden_states"]
    )


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(path="meta-llama/Meta-Llama-3-8B", device="cpu")
    size = size_of(model.path)
    config = PruneConfig(method="admm", calibration=CalibrationConfig(num_samples=128, sequence_length=2048))
    monkeypatch.setattr(pruning_estimate, "free_memory", lambda _: 40 * GIB)
    assert shortage(config, model, size) is None
    monkeypatch.setattr(pruning_estimate, "free_memory", lambda _: 10 * GIB)
    message, hint = shortage(config, model, size) or ("", "")
    assert "of memory, 10.0 GiB are free (activations" in message
    assert hint == "This would fit: calibration.offload=disk calibration.batch_size=1 true_sequential=false"
    with pytest.raises(ResourceError, match=r"10\.0 GiB are free"):
        check_memory(plan_of(config, model))
    check_memory(replace(plan_of(config, model), status="done"))
    wanda = PruneConfig(method="wanda", calibration=CalibrationConfig(num_samples=1024, batch_size=1))
    assert shortage(wanda, model, size) is None  # 16 GiB of hidden states go to disk by themselves
    monkeypatch.setattr(preflight, "free_memory", lambda _: 10 * GIB)
    assert not any("of memory" in trouble.error.message for trouble in troubles([plan_of(wanda, model)], None))
    kept, on_cpu = (
        replace(wanda, calibration=replace(wanda.calibration, offload=place)) for place in ("device", "cpu")
    )
    assert shortage(kept, model, size) is not None
    assert shortage(on_cpu, model, size) is not None
    monkeypatch.setattr(pruning_estimate, "resolve_device", lambda name: torch.device("cuda"))
    assert shortage(on_cpu, replace(model, device="auto"), size) is None
    monkeypatch.setattr(pruning_estimate, "free_memory", lambda _: 1 * GIB)
    assert "use a larger machine" in (shortage(config, model, size) or ("", ""))[1]
    check_memory(plan_of(TUNE, model))
    check_memory(plan_of(config, ModelConfig(path="nobody/nothing")))


def test_what_is_read_whole_lies_beside_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was held against the GPU's memory, which sees two of its blocks, and not against the CPU's."""
    model = ModelConfig(path="meta-llama/Meta-Llama-3-8B")  # 15 GiB
    size = replace(size_of(model.path), streamed=False)
    config = PruneConfig(method="wanda", calibration=CalibrationConfig(batch_size=1, offload="cpu"))
    monkeypatch.setattr(pruning_estimate, "resolve_device", lambda name: torch.device("cuda"))

    def found(on_gpu: int, on_cpu: int, num_processes: int = 1) -> str:
        monkeypatch.setattr(pruning_estimate, "free_memory", lambda _: on_gpu * GIB)
        monkeypatch.setattr(pruning_estimate, "available_memory", lambda: on_cpu * GIB)
        return (shortage(config, model, size, num_processes) or ("",))[0]

    assert found(8, 20) == ""
    assert "GiB of the CPU's memory; 10.0 GiB are free" in found(8, 10)
    assert "of the CPU's memory; 10.0 GiB" in found(8, 20, num_processes=2)
    assert found(8, 40, num_processes=2) == ""
    assert "of memory, 1.0 GiB are free" in found(1, 20)


def test_memory_is_judged_as_it_will_be_by_the_processes_that_are_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(path="meta-llama/Meta-Llama-3-8B", device="cpu")
    kept = CalibrationConfig(num_samples=1024, sequence_length=2048, batch_size=1, offload="device")
    prune, tune = plan_of(PruneConfig(method="wanda", calibration=kept), model), plan_of(TUNE, model)
    for module in (preflight, pruning_estimate):
        monkeypatch.setattr(module, "free_memory", lambda _: 10 * GIB)

    def refused(plan: StagePlan, number: int) -> bool:
        found = troubles([replace(plan, num_processes=number)], None)
        return any("of memory" in trouble.error.message for trouble in found)

    assert [refused(prune, number) for number in (1, 8)] == [True, True]  # all on this CPU
    with monkeypatch.context() as patch:
        patch.setattr(pruning_estimate, "resolve_device", lambda name: torch.device("cuda"))
        assert [refused(prune, number) for number in (1, 8)] == [True, False]
    assert [refused(tune, number) for number in (1, 8)] == [True, False]  # which may hold it in shards
    fsdp = replace(tune, config=replace(TUNE, parallelism="fsdp"))
    for stage, shrinks in ((prune, True), (tune, False), (fsdp, True)):
        one, eight = (try_estimate(replace(stage, num_processes=number))[0] for number in (1, 8))
        assert one is not None
        assert eight is not None
        assert (eight.memory < one.memory / 2) == shrinks


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(path="meta-llama/Meta-Llama-3-8B", device="cpu")
    size = size_of(model.path)
    config = PruneConfig(method="wanda", reconstruct_epochs=1, reconstruct_batch_size=32,
                         calibration=CalibrationConfig(num_samples=128, sequence_length=2048))  # fmt: skip
    monkeypatch.setattr(pruning_estimate, "free_memory", lambda _: 50 * GIB)
    assert shortage(config, model, size) is None
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    message, hint = shortage(config, model, size, 4) or ("", "")
    assert "12.5 GiB are free" in message
    assert hint == "This would fit: calibration.offload=disk reconstruct_batch_size=4"
    monkeypatch.setattr(pruning_estimate, "resolve_device", lambda name: torch.device("cuda"))
    assert shortage(config, model, size, 4) is None


def test_a_file_of_tokens_counts_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"input_ids": torch.zeros(10, 24, dtype=torch.int32)}, tmp_path / "t.safetensors")
    size = size_of("HuggingFaceTB/SmolLM2-135M")
    parts = memory_parts(PruneConfig(calibration=CalibrationConfig(dataset=str(tmp_path / "t.safetensors"))), size)
    assert parts["hidden_states"] == 10 * 24 * 576 * 2


def test_magnitude_with_refit_looks_at_inputs() -> None:
    size = size_of("HuggingFaceTB/SmolLM2-135M")
    assert memory_parts(PruneConfig(method="magnitude"), size)["statistics"] == 0
    assert memory_parts(PruneConfig(method="magnitude", refit=True), size)["statistics"] > 0


def test_a_rank_above_a_layer_s_inputs_is_known_before_pruning() -> None:
    """It was found once the pruned model was loaded."""
    size = model_size(ModelConfig(path="HuggingFaceTB/SmolLM2-135M"))
    assert size is not None
    least = min(columns for _, columns in size.linears)
    fits = STAGES["tune"].fits
    fits(TuneConfig(rank=least), size)
    fits(TuneConfig(rank=least + 1, init="kaiming"), size)
    with pytest.raises(UsageError, match=f"rank: {least + 1} is above the {least} inputs of model.layers.0"):
        fits(TuneConfig(rank=least + 1), size)
    fits(TuneConfig(rank=least + 1, skip=("*.[qkvogu]*_proj",)), size)
