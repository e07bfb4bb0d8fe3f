"""Tiny random models of many architectures, and a checkpoint with its tokenizer on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
FOUR_EXPERTS = {**GATED, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
TWO_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {**GATED, **TWO_WINDOWS, "head_dim": 8, "hidden_size_per_layer_input": 8,
             "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 4}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GATED),
    "Mistral": ("MistralConfig", {**GATED, "sliding_window": 6}),
    "Qwen2": ("Qwen2Config", GATED),
    "Qwen3": ("Qwen3Config", {**GATED, "head_dim": 8}),
    "Gemma": ("GemmaConfig", {**GATED, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", {**GATED, "head_dim": 8, **TWO_WINDOWS}),
    "Gemma3": ("Gemma3TextConfig", {**GATED, "head_dim": 8, **TWO_WINDOWS}),
    "Phi3": ("Phi3Config", GATED),
    "OPT": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "GPT-NeoX": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 64}),
    "GPT-2": ("GPT2Config", {**SIZES, "n_inner": 64}),
    "Mixtral": ("MixtralConfig", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**FOUR_EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**FOUR_EXPERTS, "head_dim": 8}),
    "BLOOM": ("BloomConfig", SIZES),
    "Falcon": ("FalconConfig", SIZES),
    "Falcon-40B": ("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "Falcon-RW": ("FalconConfig", {**SIZES, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "MPT": ("MptConfig", {**{key: size for key, size in SIZES.items() if key != "max_position_embeddings"},
                          "max_seq_len": 64}),
    "GPT-J": ("GPTJConfig", {**SIZES, "rotary_dim": 4}),
    "CodeGen": ("CodeGenConfig", {**SIZES, "rotary_dim": 4}),
    "Gemma3n": ("Gemma3nTextConfig", {**PER_LAYER, "laurel_rank": 8}),
    "Gemma4": ("Gemma4TextConfig", {**PER_LAYER, "global_head_dim": 16}),
    "Gemma3-vision": ("Gemma3Config", {"text_config": {**GATED, "head_dim": 8, **TWO_WINDOWS}, "vision_config": VISION,
                                       "mm_tokens_per_image": 4, "image_token_id": 62, "boi_token_id": 61,
                                       "eoi_token_id": 60}),
    "GPT-OSS": ("GptOssConfig", {**GATED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **TWO_WINDOWS}),
}  # fmt: skip
MIXTURES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GPT-OSS"]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random model of an architecture; keyword arguments change its configuration."""

    def make(name: str = "Llama", **changes: Any) -> PreTrainedModel:
        config_class, settings = ARCHITECTURES[name]
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**settings, **changes})
        config.pad_token_id, config.eos_token_id = SIZES["pad_token_id"], SIZES["eos_token_id"]  # of a wrapper too
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        if (
            name == "Gemma3n"
        ):  # it is made with zeros, where its gradients are not finite, and its last inputs are zeros
            model.get_input_embeddings().weight.data[0] = 0.1
            for block in model.model.layers:
                block.altup.correct_output_scale.data.fill_(1.0)
        return model

    return make


@pytest.fixture(scope="session")
def batches() -> list[torch.Tensor]:
    """Ten sequences of 24 tokens; the last batch is smaller."""
    tokens = torch.randint(2, VOCABULARY, (10, 24), generator=torch.Generator().manual_seed(1))
    return list(tokens.split(4))


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def checkpoint(tmp_path: Path, build: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny float32 Llama saved with its tokenizer."""
    folder = tmp_path / "dense"
    build(num_hidden_layers=3).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def token_file(tmp_path: Path, batches: list[torch.Tensor]) -> Path:
    """The sequences of `batches` as a pre-tokenised file."""
    path = tmp_path / "calibration.safetensors"
    save_file({"input_ids": torch.cat(batches)}, path)
    return path
