"""Texts packed into one sequence: each has the logits it has alone, and models that mix them are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)  # fmt: skip

from lors_cli.data.samples import PadCollator, isolated_sample
from lors_cli.errors import UsageError
from lors_cli.tuning.training.isolation import refuse_mixing, why_mixed

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLD = {"vocab_size": 97, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
APART = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4),
    "neox": GPTNeoXConfig(**SIZES),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
MIXED = {
    "opt": OPTConfig(**{**OLD, "init_std": 0.3}, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64),
    "falcon": FalconConfig(**OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "bloom": BloomConfig(**OLD, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(**OLD, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
}  # fmt: skip


def _model(config: Any, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _texts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_packed_texts_have_the_logits_they_have_alone(name: str, attention: str) -> None:
    model = _model(APART[name], attention)
    rows = [_texts((9, 3, 11), 1), _texts((2, 12, 1, 5), 2)]  # longer than the windows, of unequal length: 23 and 20
    samples = [isolated_sample([{"input_ids": ids, "labels": ids} for ids in row]) for row in rows]
    batch = PadCollator(0)(samples)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, texts in enumerate(rows):
            first = 0
            for ids in texts:
                alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, first : first + len(ids)], alone, rtol=1e-4, atol=1e-4)
                first += len(ids)
    assert why_mixed(model) == ""


@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_texts_are_refused(name: str) -> None:
    model = _model(MIXED[name])
    with pytest.raises(UsageError, match=f"isolated cannot be had with {type(model).__name__}: its"):
        refuse_mixing(model)


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    assert why_mixed(_model(APART["llama"]).to(torch.bfloat16)) == ""
    assert why_mixed(_model(MIXED["opt"]).to(torch.bfloat16)) != ""


@pytest.mark.parametrize("own", [None, True, False], ids=["chunked", "own", "own mean"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_loss_and_gradient_of_a_pack_are_those_of_its_texts(name: str, own: bool | None) -> None:
    """A model's own mean once made a cache, and with one transformers looks for no texts in a sequence."""
    from lors_cli.tuning.head import causal_lm_loss, model_loss

    model = _model(APART[name])
    model.accepts_loss_kwargs = own
    loss_of = causal_lm_loss if own is None else model_loss
    texts = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in _texts((7, 5, 8), 3)]
    weight = model.model.layers[0].self_attn.v_proj.weight
    gradients, losses = [], []
    for samples in (texts, [isolated_sample(texts)]):
        model.zero_grad()
        batch = PadCollator(0)(samples)  # type: ignore[arg-type]
        loss = loss_of(model, batch, 14)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
