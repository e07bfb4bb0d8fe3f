"""Two processes tune, and score, like one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from killed_runs import log
from on_grids import save_on_grids
from safetensors.torch import load_file
from transformers import PreTrainedModel
from two_processes import generated, scores, tune_and_stop, tune_config, worse_after

from lors_cli.cli.launch import launch
from lors_cli.data.samples import IGNORED
from lors_cli.errors import UsageError
from lors_cli.models.grids import load_grids
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training import preparation
from lors_cli.tuning.training.distributed import describe, micro_batch_size
from lors_cli.tuning.training.sampling import BLANK, micro_batches, sample_at, step_samples

STEPS = 22
STOP = 7
BEST = 9
MEASURED = 6


def settings(rows: Path, **changes: Any) -> dict[str, Any]:
    """A run over 42 rows, 8 a step: every sixth step has but two samples."""
    data = {"dataset": str(rows), "max_length": 320}
    return {"rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "max_steps": STEPS, "batch_size": 8,
            "per_device_batch_size": 2, "save_steps": 3, "data": data, **changes}  # fmt: skip


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, sparse_llama: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> tuple[dict[str, Any], Path, Path]:
    """The jobs; the folder in which one process did them; the folder in which two did."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, dtype in (("model", torch.float32), ("half_model", torch.bfloat16)):
        sparse_llama(dtype).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    rows, texts = folder / "rows.jsonl", folder / "texts.jsonl"
    with open(rows, "w") as file:
        for number in range(42):
            row = {"instruction": f"say {number}", "input": "", "output": f"it is {number} " * (1 + number % 5)}
            file.write(json.dumps(row) + "\n")
    with open(texts, "w") as file:
        file.writelines(json.dumps({"text": f"fox {number * 7 % 31} jumps. " * 9}) + "\n" for number in range(60))
    text = {"dataset": str(texts), "max_length": 64, "shuffle_buffer": 8}
    jobs = {
        "model": str(folder / "model"), "half_model": str(folder / "half_model"), "step": STOP, "best": BEST,
        "measured": MEASURED,
        "tune": {
            "rows": settings(rows, train_norms=True, loraplus_lr_ratio=2.0),
            "tokens": settings(rows, max_steps=None, max_tokens=64 * 22 + 20, batch_size=6, per_device_batch_size=1,
                               gradient="rotating", data=text),
            "continued": settings(rows),
            "cached": settings(rows, max_steps=4, distill={"teacher": str(folder / "model"), "cache": {"top_k": 64}}),
            "mixed": settings(rows, max_steps=6, val_size=5, data={
                "dataset": str(rows), "max_length": 320,
                "mix": [{"dataset": str(texts), "weight": 0.3, "stream": "on", "packing": "isolated"}],
            }),
        },
        "validated": settings(rows, val_size=5, eval_steps=3, early_stopping_patience=2),
        "stop": settings(rows),
        "fsdp": settings(rows, parallelism="fsdp", gradient_checkpointing=True, train_norms=True, max_steps=6,
                         gradient="exact",
                         val_size=5, load_best_model_at_end=True),
        "plain": settings(rows, method="sqft", max_steps=7),
        "grid_model": str(save_on_grids(sparse_llama(torch.float32), tiny_tokenizer, folder / "grid_model")),
        "aware": settings(rows, quantization_aware=True, parallelism="fsdp", max_steps=4),
    }  # fmt: skip
    one, two = folder / "one", folder / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORS_CACHE_DIR", str(folder / "cache"))
        model, half = ModelConfig(path=jobs["model"]), ModelConfig(path=jobs["half_model"])
        for name, job in jobs["tune"].items():
            tune(tune_config(job), model, one / name)
        tune(tune_config(jobs["fsdp"]), half, one / "fsdp")
        tune(tune_config(jobs["aware"]), ModelConfig(path=jobs["grid_model"]), one / "aware")
        with worse_after(BEST):
            tune(tune_config(jobs["validated"]), model, one / "validated")
        with mock.patch.object(preparation, "why_not_chunked", return_value="of the test"):
            tune(tune_config(jobs["plain"]), model, one / "plain")
        two.mkdir()
        tune_and_stop(jobs["tune"]["continued"], jobs["model"], two / "continued", STOP)  # one begins, two go on
        (folder / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("two_processes.py")
        patch.setenv("LORS_CACHE_DIR", str(folder / "cache_of_two"))
        assert launch([sys.executable, str(script), str(folder / "jobs.json"), str(two)], 2) == 0
    return jobs, one, two


def assert_alike(one: Path, two: Path, tolerance: float) -> None:
    """Losses, norms of gradients and weights of two runs."""
    first, second = log(one), log(two)
    assert [row["step"] for row in first] == [row["step"] for row in second] != []
    for key in ("loss", "learning_rate"):
        assert [row[key] for row in second] == pytest.approx([row[key] for row in first], abs=tolerance)
    assert [row["grad_norm"] for row in second] == pytest.approx([row["grad_norm"] for row in first], rel=1e-3)
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        expected, found = load_file(one / name), load_file(two / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype
            assert torch.equal(tensor == 0, found[key] == 0), key
            torch.testing.assert_close(found[key].float(), tensor.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("job", ["rows", "tokens", "continued", "cached", "mixed", "validated", "plain"])
def test_two_processes_tune_like_one(both: tuple[dict[str, Any], Path, Path], job: str) -> None:
    _, one, two = both
    assert_alike(one / job, two / job, 1e-4)
    records = [json.loads((folder / job / "stage.json").read_text()) for folder in (one, two)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[0]["metrics"]["base_mask"] == records[1]["metrics"]["base_mask"]
    names = [sorted(path.relative_to(folder / job) for path in (folder / job).rglob("*.*")) for folder in (one, two)]
    assert names[0] == names[1]


@pytest.mark.parametrize(("job", "tolerance"), [("validated", 1e-4), ("fsdp", 2e-2)])
def test_two_processes_find_the_held_out_loss_of_one(
    both: tuple[dict[str, Any], Path, Path], job: str, tolerance: float
) -> None:
    _, one, two = both
    found = [
        [(row["step"], row["val_loss"]) for row in log(folder / job) if "val_loss" in row] for folder in (one, two)
    ]
    assert [step for step, _ in found[0]] == [step for step, _ in found[1]]
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in found[0]], abs=tolerance)
    first, second = (json.loads((folder / job / "stage.json").read_text())["metrics"] for folder in (one, two))
    if job == "validated":
        assert (first["steps"], first["model_step"]) == (second["steps"], second["model_step"]) == (BEST + 6, BEST)
    else:
        assert first["model_step"] == second["model_step"] == min(found[0], key=lambda pair: pair[1])[0]


def test_a_stop_within_a_measurement_saves_at_once(both: tuple[dict[str, Any], Path, Path]) -> None:
    """And is measured when they go on: the run is one of those that tune like one process."""
    found = json.loads((both[2] / "0.json").read_text())["stopped"]
    assert found == ["checkpoint-3", f"checkpoint-{MEASURED}"]


def test_sharded_weights_train_like_whole_ones(both: tuple[dict[str, Any], Path, Path]) -> None:
    _, one, two = both
    assert_alike(one / "fsdp", two / "fsdp", 2e-2)  # bfloat16
    shares = [json.loads((two / f"{rank}.json").read_text())["shares"] for rank in (0, 1)]
    assert shares == [[0.5] * 14, [0.5] * 14]


def test_sharded_weights_stay_on_their_grids(both: tuple[dict[str, Any], Path, Path]) -> None:
    """A sum in another order may carry a weight over a threshold, and then by a whole step: seldom."""
    _, one, two = both
    first, second = (load_file(folder / "aware/model.safetensors") for folder in (one, two))
    for name, grid in load_grids(two / "aware").items():
        tuned, expected = second[f"{name}.weight"], first[f"{name}.weight"]
        assert torch.equal(torch.where(tuned != 0, grid.rounded(tuned), 0), tuned)
        assert (tuned != expected).float().mean() < 0.005
    assert [row["loss"] for row in log(two / "aware")] == pytest.approx([row["loss"] for row in log(one / "aware")],
                                                                      abs=1e-2)  # fmt: skip


def test_one_process_goes_on_where_two_were_stopped(both: tuple[dict[str, Any], Path, Path]) -> None:
    jobs, one, two = both
    kept = sorted(path.name for path in (two / "stop" / "checkpoints").iterdir())
    assert kept[-1] == f"checkpoint-{STOP}"  # though one of them alone was interrupted
    files = {path.name for path in (two / "stop" / "checkpoints" / kept[-1]).iterdir()}
    alone = {path.name for path in (one / "rows" / "checkpoints" / f"checkpoint-{STEPS}").iterdir()}
    assert files == alone
    tune(tune_config(jobs["stop"]), ModelConfig(path=jobs["model"]), two / "stop")
    assert_alike(one / "continued", two / "stop", 1e-4)


def test_scores_of_two_processes_are_those_of_one(both: tuple[dict[str, Any], Path, Path]) -> None:
    jobs, _, two = both
    expected = json.loads(json.dumps(scores(jobs["model"])))
    assert expected["counted"] == len(expected["choices"]) == 21
    for rank in (0, 1):
        found = json.loads((two / f"{rank}.json").read_text())
        assert found["scores"] == expected
        assert found["failure"] == "no never"


def test_requests_to_generate_are_shared_out_and_answered_alike(both: tuple[dict[str, Any], Path, Path]) -> None:
    jobs, _, two = both
    expected = generated(jobs["model"])
    assert expected["mine"] == 7
    assert len(set(expected["texts"])) > 1
    found = [json.loads((two / f"{rank}.json").read_text())["generated"] for rank in (0, 1)]
    assert [each["texts"] for each in found] == [expected["texts"]] * 2
    assert [each["mine"] for each in found] == [4, 3]  # batches of 2, 2, 2 and 1


# ---- without a second process


def test_processes_take_every_sample_of_a_step_once_and_blanks_fill_up() -> None:
    samples = [{"input_ids": [0] * ((7 * index) % 23)} for index in range(29)]
    for step in range(6):
        order = step_samples(samples, step, batch_size=12, seed=5)
        taken = [list(chain.from_iterable(micro_batches(order, 2, rank, 3))) for rank in range(3)]
        assert {len(mine) for mine in taken} == {2 if step % 3 == 2 else 4}
        assert sorted(index for mine in taken for index in mine if index != BLANK) == sorted(order)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3), (12, 1)])
def test_a_step_takes_the_same_positions_on_any_number_of_processes(world_size: int, micro_batch_size: int) -> None:
    for step in (0, 5):
        positions = list(range(12 * step, 12 * step + 12))
        shares = [
            list(chain.from_iterable(micro_batches(positions, micro_batch_size, rank, world_size)))
            for rank in range(world_size)
        ]
        assert sorted(chain.from_iterable(shares)) == positions
        assert len({len(share) for share in shares}) == 1


def test_processes_share_a_step_as_accelerate_deals_batches() -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    for rank in range(3):
        dealt = list(BatchSamplerShard(BatchSampler(SequentialSampler(range(36)), 2, False), 3, rank))  # type: ignore[arg-type]
        own = [micro_batches(list(range(first, first + 12)), 2, rank, 3) for first in (0, 12, 24)]
        assert dealt == list(chain.from_iterable(own))


def test_a_blank_sample_has_no_label() -> None:
    samples = [{"input_ids": [4, 5], "labels": [4, 5], "position_ids": [0, 1]}]
    assert sample_at(samples, 0)["input_ids"] == [4, 5]
    assert sample_at(samples, BLANK) == {"input_ids": [4], "labels": [IGNORED], "position_ids": [0]}


@pytest.mark.parametrize(("batch_size", "per_device", "processes", "expected"), [
    (8, None, 1, 4), (8, None, 2, 4), (8, None, 8, 1), (12, None, 2, 3), (8, 2, 2, 2), (8, 4, 2, 4),
])  # fmt: skip
def test_a_step_is_shared_evenly(batch_size: int, per_device: int | None, processes: int, expected: int) -> None:
    config = TuneConfig(batch_size=batch_size, per_device_batch_size=per_device)
    assert micro_batch_size(config, processes) == expected


@pytest.mark.parametrize(("batch_size", "per_device", "processes", "message"), [
    (9, None, 2, "9 samples a step cannot be shared by 2 processes"),
    (2, None, 4, "2 samples a step cannot be shared by 4 processes"),
    (8, 4, 4, "not a multiple of per_device_batch_size: 4 times 4 processes"),
])  # fmt: skip
def test_a_step_that_cannot_be_shared_is_refused(
    batch_size: int, per_device: int | None, processes: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        micro_batch_size(TuneConfig(batch_size=batch_size, per_device_batch_size=per_device), processes)


def test_fsdp_in_one_process_says_so() -> None:
    assert "this is one" in describe(TuneConfig(parallelism="fsdp"))
    assert describe(TuneConfig()) == ""


@pytest.mark.parametrize("other", [{"init": "gradient-exact"}, {"base": "packed"}, {"merged_cache": "on"}])
def test_fsdp_refuses_what_needs_whole_weights(other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"parallelism: fsdp shards the weights, and {next(iter(other))}"):
        TuneConfig(parallelism="fsdp", **other)  # type: ignore[arg-type]
