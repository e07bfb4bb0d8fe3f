"""A sweep's folder, made by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SEVEN = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BASE = "meta-llama/Meta-Llama-3-8B"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def eval_content(model: str, acc: dict[str, float], perplexity: float, stderr: float = 0.01) -> dict[str, Any]:
    """An eval file; `acc` are shares."""
    tasks = {task: {"acc": value, "acc_stderr": stderr, "num_samples": 100} for task, value in acc.items()}
    return {
        "model": model,
        "tasks": tasks,
        "average": {"metric": "acc", "value": sum(acc.values()) / len(acc), "tasks": list(acc)},
        "perplexity": {"wikitext2": {"value": perplexity, "tokens": 4096, "sequence_length": 2048}},
    }


class SweepFolder:
    """Writes the files of a sweep; `index` is the content of sweep.json until `close`."""

    def __init__(self, folder: Path, name: str, axes: dict[str, list[Any]]) -> None:
        self.folder = folder
        self.index: dict[str, Any] = {"name": name, "axes": axes, "cells": []}
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, path: str, stage: str, config: dict[str, Any], metrics: dict[str, Any], elapsed_s: float,
              origin: str = BASE) -> str:  # fmt: skip
        environment = {"python": "3.11.9", "platform": "Linux-test", "packages": {"torch": "2.8.0"}}
        write_json(self.folder / path / "stage.json", {
            "stage": stage, "fingerprint": path, "config": config, "inputs": {"path": origin}, "metrics": metrics,
            "environment": environment, "elapsed_s": elapsed_s, "files": {},
        })  # fmt: skip
        return path

    def prune(self, path: str, method: str, elapsed_s: float = 100.0, **config: Any) -> str:
        return self.stage(path, "prune", {"method": method, "pattern": "2:4", "sparsity": None, **config},
                          sparse_metrics(), elapsed_s)  # fmt: skip

    def tune(self, path: str, method: str, elapsed_s: float = 1000.0, data: str = "alpaca", **config: Any) -> str:
        metrics = {"steps": 60, "loss_before": 3.25, "loss_after": 1.875, "tokens_per_s": 1234.0,
                   "trainable_parameters": 4884480, **sparse_metrics()}  # fmt: skip
        self.stage(path, "tune", {"method": method, "rank": 16, "data": {"dataset": data}, **config}, metrics,
                   elapsed_s, origin="stages/prune")  # fmt: skip
        draw = random.Random(method + path)
        rows = [{"step": step, "loss": 1.8 + 1.4 * math.exp(-step / 12) + draw.gauss(0, 0.05), "tokens_per_s": 9.0}
                for step in range(1, 61)]  # fmt: skip
        (self.folder / path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def score(self, path: str, role: str, acc: dict[str, float], perplexity: float, elapsed_s: float = 50.0,
              limit: int | None = None) -> str:  # fmt: skip
        write_json(self.folder / path / f"{role}.json", eval_content(BASE, acc, perplexity))
        return self.stage(path, "eval", {"tasks": list(acc), "limit": limit}, {}, elapsed_s)

    def cell(self, name: str, values: dict[str, Any], *, stages: dict[str, str], models: dict[str, str],
             status: str = "done", error: str | None = None, recipe: str = "base") -> None:  # fmt: skip
        self.index["cells"].append({
            "name": name, "recipe": recipe, "values": values, "overrides": values, "status": status, "error": error,
            "stages": stages, "models": models,
        })  # fmt: skip

    def close(self) -> Path:
        write_json(self.folder / "sweep.json", self.index)
        (self.folder / "sweep.yaml").write_text(f"name: {self.index['name']}\n")
        return self.folder


def sparse_metrics() -> dict[str, Any]:
    layers = [
        {"name": f"model.layers.{block}.{kind}", "shape": [8, 8], "sparsity": 0.5 + 0.01 * (block % 3 - 1)}
        for block in range(16)
        for kind in KINDS
    ]
    return {"pattern": "2:4", "sparsity": 0.5, "violations": 0, "layers": layers}


def shares(start: float, step: float = 0.04) -> dict[str, float]:
    return {task: round(start + step * index, 4) for index, task in enumerate(SEVEN)}
