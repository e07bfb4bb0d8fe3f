"""How models, methods and tasks are written in reports, as the papers write them."""

from __future__ import annotations

import re

METHODS = {
    "magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "ria": "RIA", "admm": "ADMM",
    "lors": "LoRS", "sqft": "SQFT", "sqft-gc": "SQFT-gc", "spp": "SPP", "spp-gc": "SPP-gc", "hira": "HiRA",
    "lora": "LoRA",
}  # fmt: skip
TASKS = {
    "arc_challenge": "ARC-c", "arc_easy": "ARC-e", "boolq": "BoolQ", "hellaswag": "HellaSwag",
    "openbookqa": "OpenBookQA", "rte": "RTE", "winogrande": "WinoGrande",
}  # fmt: skip
"""In the order of the LoRS paper's tables."""
_IN_HUB_CACHE = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+$")


def method_name(method: str) -> str:
    """`sparsegpt` as SparseGPT; a method that is not known here keeps its own spelling."""
    return METHODS.get(method, method)


def task_name(task: str) -> str:
    """`arc_challenge` as ARC-c; a task that is not known here keeps its own spelling."""
    return TASKS.get(task, task)


def short_name(model: str) -> str:
    """A model's own name: `meta-llama/Llama-2-7b-hf` and its folder in the hub's cache are Llama-2-7b-hf."""
    path = model.replace("\\", "/").rstrip("/")
    cached = _IN_HUB_CACHE.search(path)
    return cached.group(1) if cached else path.rpartition("/")[2] or "model"
