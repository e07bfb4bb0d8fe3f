"""How models, methods and tasks are written in reports, as the papers write them."""

from __future__ import annotations

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


def method_name(method: str) -> str:
    """`sparsegpt` as SparseGPT; a method that is not known here keeps its own spelling."""
    return METHODS.get(method, method)


def task_name(task: str) -> str:
    """`arc_challenge` as ARC-c; a task that is not known here keeps its own spelling."""
    return TASKS.get(task, task)
