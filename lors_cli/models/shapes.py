"""Sizes of well-known models, so that plans and benchmarks need no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama-architecture model's sizes, as its config.json on the hub states them."""

    hub_ids: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_length: int
    tied: bool = False

    def config(self) -> Any:
        """A transformers configuration of this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=self.tied,
            dtype="bfloat16",
        )


SHAPES: dict[str, Shape] = {
    "llama3-8b": Shape(
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
        4096, 14336, 32, 32, 8, 128256, 8192,
    ),
    "llama2-7b": Shape(("meta-llama/Llama-2-7b-hf",), 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": Shape(("meta-llama/Llama-2-13b-hf",), 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama3.2-1b": Shape(
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"), 2048, 8192, 16, 32, 8, 128256, 131072, True
    ),
    "tinyllama": Shape(("TinyLlama/TinyLlama-1.1B-Chat-v1.0",), 2048, 5632, 22, 32, 4, 32000, 2048),
    "smollm2-135m": Shape(
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"), 576, 1536, 30, 9, 3, 49152, 8192, True
    ),
}  # fmt: skip
