"""Thousands of training steps of a tiny model: memory flat, the disk bounded, the last steps as fast as the first.

`make soak` runs 20,000 steps (`STEPS=1000` fewer), prints the figures, and ends with exit code 1 if they are not so.
Memory and disk are looked at once a `save_steps`, in the process that trains. Memory grows for some 1,600 steps, as
samples come that are longer than all before and libraries keep something for each shape: fewer than 10,000 are no test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from byte_tokens import byte_tokenizer

from lors_cli.machine.memory import memory_in_use
from lors_cli.models.blocks import prunable_weights
from lors_cli.recipe.schema import ModelConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.stage import tune
from lors_cli.tuning.training.trainer import AdapterTrainer

SAVE_STEPS = 50
SPEED, GROWTH = 0.98, 1.02
"""Least share of the first steps' throughput, and most of the memory after the first fifth."""


def main() -> None:
    """Run it and judge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory(prefix="lors-soak-") as name:
        rows, watched = run(Path(name), steps)
    found = figures(rows, watched)
    print(json.dumps(found, indent=2))
    sys.exit(0 if all(found["right"].values()) else 1)


def run(folder: Path, steps: int) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The log of so many steps, and memory and disk in bytes each time that a checkpoint was saved."""
    model, data = folder / "model", folder / "rows.jsonl"
    make_model(model, byte_tokenizer(64))
    lines = [
        {"instruction": f"say {n}", "input": "", "output": f"it is {n * 7 % 97} " * (1 + n % 9)} for n in range(512)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    watched: list[tuple[int, int]] = []
    save = AdapterTrainer.save

    def watching(trainer: AdapterTrainer) -> None:
        save(trainer)
        disk = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.name != "log.jsonl")
        watched.append((memory_in_use(), disk))

    AdapterTrainer.save = watching  # type: ignore[method-assign]
    config = TuneConfig(
        rank=4, max_steps=steps, batch_size=2, per_device_batch_size=2, save_steps=SAVE_STEPS, learning_rate=1e-4,
        data=TuneDataConfig(dataset=str(data), max_length=192),
    )  # fmt: skip
    tune(config, ModelConfig(path=str(model)), folder / "out")
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()], watched


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A sparse Llama of two blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=257, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for weight in prunable_weights(model).values():
        weight.matrix[:, 0::2] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def figures(rows: list[dict[str, Any]], watched: list[tuple[int, int]]) -> dict[str, Any]:
    """What came of it; the first tenth warms up, the median step is compared, so that a pause counts once."""
    part = min(1000, len(rows) // 3)
    warm = min(1000, len(rows) // 10)
    first, last = (statistics.median(row["tokens_per_s"] for row in few)
                   for few in (rows[warm : warm + part], rows[-part:]))  # fmt: skip
    memory, disk = ([pair[place] for pair in watched] for place in (0, 1))
    settled, size = memory[len(memory) // 5 :], len(memory) // 5 or 1
    early, late = statistics.median(settled[:size]), statistics.median(settled[-size:])
    return {
        "steps": len(rows),
        "tokens_per_s": {"first": round(first, 1), "last": round(last, 1), "ratio": round(last / first, 4)},
        "memory_mib": {"early": round(early / 2**20, 1), "late": round(late / 2**20, 1),
                       "ratio": round(late / early, 4)},
        "disk_kib": {"early": round(disk[len(disk) // 5] / 1024, 1), "most": round(max(disk) / 1024, 1)},
        "right": {"fast": last >= SPEED * first, "flat": late <= GROWTH * early,
                  "bounded": max(disk) <= GROWTH * disk[len(disk) // 5]},
    }  # fmt: skip


if __name__ == "__main__":
    main()
