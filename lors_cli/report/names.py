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
