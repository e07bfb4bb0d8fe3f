"""A tiny Llama and what goes with it, made in code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lors_cli.bench.model import _make_two_of_four
from lors_cli.tuning.lors import LorsLinear

VOCABULARY = 258
END = VOCABULARY - 1


def llama() -> Any:
    """Two blocks, always the same weights, float32 on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, pad_token_id=END,
        bos_token_id=END - 1, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _linears(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules()
            if name.startswith("model.layers.") and isinstance(module, nn.Linear)}  # fmt: skip


def sparse_llama(device: torch.device) -> tuple[Any, list[nn.Parameter]]:
    """It with 2:4 weights and LoRS adapters, the same on every device, and the adapters."""
    model = llama()
    adapters = []
    for name, linear in _linears(model).items():
        _make_two_of_four(linear.weight)
        layer = LorsLinear(linear, 4, 8.0)
        nn.init.normal_(layer.lora_B, std=0.02)
        model.set_submodule(name, layer)
        adapters += [layer.lora_A, layer.lora_B]
    return model.to(device), adapters


def write_checkpoint(folder: Path, *, sparse: bool) -> None:
    """The model in bfloat16 as an ordinary checkpoint; beside it tokens to calibrate and score on, rows to tune on."""
    model = llama()
    if sparse:
        for linear in _linears(model).values():
            _make_two_of_four(linear.weight)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(END), pad_token=str(END)).save_pretrained(folder)
    tokens = torch.randint(1, END - 1, (16, 32), generator=torch.Generator().manual_seed(2))
    for name in ("calibration", "windows"):
        save_file({"input_ids": tokens}, folder / f"{name}.safetensors")
    rows = [{"instruction": "count", "input": "", "output": " ".join(map(str, row))} for row in tokens[:, :12].tolist()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
