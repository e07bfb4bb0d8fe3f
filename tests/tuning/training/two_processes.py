"""What two processes do together for test_distributed.py: one start, many jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lors_cli.evaluation.perplexity import token_perplexity
from lors_cli.evaluation.prefix_tree import Choice
from lors_cli.evaluation.scoring import score_choices
from lors_cli.machine import processes
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning import attach
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training import preparation
from lors_cli.tuning.training.trainer import AdapterTrainer
from lors_cli.tuning.training.validation import Validation


def tune_config(settings: dict[str, Any]) -> TuneConfig:
    """A TuneConfig from plain data."""
    return TuneConfig(**{**settings, "data": TuneDataConfig(**settings["data"])})


@contextmanager
def stopped_after(step: int, within: str) -> Iterator[None]:
    """The last process, and no other, is interrupted in this step, or in the measurement after it."""
    original = getattr(AdapterTrainer, within)

    def interrupted(self: AdapterTrainer, *args: Any) -> Any:
        done = step - 1 if within == "micro_batch" else step
        if self.step == done and processes.process_index() == processes.num_processes() - 1:
            self.stop.asked = True
        return original(self, *args)

    with mock.patch.object(AdapterTrainer, within, interrupted):
        yield


@contextmanager
def worse_after(step: int) -> Iterator[None]:
    """The best held-out loss is that of this step at the latest."""
    original = Validation.judge

    def judge(self: Validation, at: int, loss: float) -> None:
        original(self, at, loss + 10 * (at > step))

    with mock.patch.object(Validation, "judge", judge):
        yield


def tune_and_stop(settings: dict[str, Any], model: str, out: Path, step: int, within: str = "micro_batch") -> None:
    """Tune until an interruption after `step`."""
    try:
        with stopped_after(step, within):
            tune(tune_config(settings), ModelConfig(path=model), out)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not stopped")


def shard_shares(settings: dict[str, Any], model: str, out: Path) -> list[float]:
    """Tune with sharded weights; of a block's frozen matrices, what share of the numbers this process held."""
    found: list[float] = []
    original = preparation.shard

    def observed(network: Any, *args: Any) -> None:
        original(network, *args)
        for layer in attach.adapter_layers(network).values():
            found.append(layer.weight.to_local().numel() / layer.weight.numel())  # type: ignore[attr-defined]
            assert layer.lora_A.dtype == torch.float32

    with mock.patch.object(preparation, "shard", observed):
        tune(tune_config(settings), ModelConfig(path=model), out)
    return found


def scores(model: str) -> dict[str, Any]:
    """Log-likelihoods and perplexity of random tokens."""
    network = load_model(ModelConfig(path=model))
    generator = torch.Generator().manual_seed(0)
    choices = []
    for document in range(7):
        context = torch.randint(250, (9 + 3 * document,), generator=generator).tolist()
        for _ in range(3):
            target = torch.randint(250, (2 + document % 4,), generator=generator).tolist()
            choices.append(Choice([*context, *target][:-1], target, document))
    counted: list[int] = []
    found = score_choices(network, choices, batch_size=2, on_progress=counted.append)
    windows = torch.randint(250, (11, 32), generator=generator)
    return {"choices": found, "counted": sum(counted), "perplexity": token_perplexity(network, windows, batch_size=2)}


def generated(model: str) -> dict[str, Any]:
    """What lm-eval's requests to generate are answered, and how many of them this process answered itself."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lors_cli.evaluation.shown_model import ShownModel

    config, mine = ModelConfig(path=model), []
    lm = ShownModel(load_model(config), load_tokenizer(config), 2, "t")
    requests = [Instance("generate_until", {}, (f"say {'a' * number}", {"until": ["zz"], "max_gen_toks": 6}), number)
                for number in range(7)]  # fmt: skip
    original = HFLM.generate_until

    def counted(self: HFLM, asked: list[Instance], **options: Any) -> list[str]:
        mine.extend(asked)
        return original(self, asked, **options)

    with mock.patch.object(HFLM, "generate_until", counted):
        return {"texts": lm.generate_until(requests), "mine": len(mine)}


def failure(rank: int) -> str:
    """What everyone hears of a main process that cannot go on."""
    from lors_cli.errors import UsageError

    def refuse() -> None:
        assert rank == 0
        raise UsageError("no", "never")

    try:
        processes.from_main(refuse)
    except UsageError as error:
        return f"{error.message} {error.hint}"
    raise AssertionError("nothing was heard")


def main(jobs: dict[str, Any], folder: Path) -> None:
    """Every job, in the order of the file; what process N found goes to N.json."""
    rank = processes.process_index()
    found: dict[str, Any] = {}
    with processes.joined():
        for name, settings in jobs["tune"].items():
            tune(tune_config(settings), ModelConfig(path=jobs["model"]), folder / name)
        with worse_after(jobs["best"]):
            tune_and_stop(jobs["validated"], jobs["model"], folder / "validated", jobs["measured"], "validate")
            found["stopped"] = sorted(path.name for path in (folder / "validated/checkpoints").iterdir())
            tune(tune_config(jobs["validated"]), ModelConfig(path=jobs["model"]), folder / "validated")
        tune_and_stop(jobs["stop"], jobs["model"], folder / "stop", jobs["step"])
        tune(tune_config(jobs["aware"]), ModelConfig(path=jobs["grid_model"]), folder / "aware")
        found["shares"] = shard_shares(jobs["fsdp"], jobs["half_model"], folder / "fsdp")
        with mock.patch.object(preparation, "why_not_chunked", return_value="of the test"):
            tune(tune_config(jobs["plain"]), ModelConfig(path=jobs["model"]), folder / "plain")
        found["scores"] = scores(jobs["model"])
        found["generated"] = generated(jobs["model"])
        found["failure"] = failure(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
