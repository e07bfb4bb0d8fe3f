"""Step 4: a decode step of Llama-3-8B's shape, whole: its linears dense, packed as 2:4, and packed as unstructured.

The step is made of transformers' own modules around a cache of fixed length, so that a CUDA graph holds all of it: what
is timed is the GPU's work and not Python's. One and the same random 2:4 weights are in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu.box import Box, Figures, graphed, seconds_of
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lors_cli.bench.model import sparse_model
from lors_cli.models import shapes
from lors_cli.models.packed.format import Packed, pack
from lors_cli.models.packed.kernels.cuda import linear_on_cuda
from lors_cli.models.shapes import Shape
from lors_cli.sparsity import TWO_OF_FOUR, Pattern

BATCHES, LENGTH, REPEATS = (1, 2, 4, 8), 512, 20
TINY, TINY_BATCHES, TINY_LENGTH = Shape((), 32, 32, 1, 2, 1, 50, 64), (2,), 8
LIMIT = 0.1
"""Of ‖logits − the dense model's‖ / ‖the dense model's‖: bfloat16 sums in another order; wrong, it is about 1."""


class OnCuda(nn.Module):
    """A linear by the packed kernels."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return linear_on_cuda(x, self.packed, self.bias)


class Step:
    """The next token of each sequence.

    Args:
        ids: (batch, 1), the tokens before it.
        cache: (blocks, 2, batch, key heads, length, head size): keys and values; this step's go to the last place.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        config, device = model.config, model.device
        torch.manual_seed(1)
        self.model = model
        self.ids = torch.randint(config.vocab_size, (batch, 1), device=device)
        self.cache = torch.randn(
            config.num_hidden_layers, 2, batch, config.num_key_value_heads, length,
            config.hidden_size // config.num_attention_heads, dtype=model.dtype, device=device,
        )  # fmt: skip
        self.place = torch.tensor([[length - 1]], device=device)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """(batch, vocabulary)."""
        decoder = self.model.get_decoder()
        hidden = decoder.embed_tokens(self.ids)
        turns = decoder.rotary_emb(hidden, self.place)
        for block, (keys, values) in zip(decoder.layers, self.cache, strict=True):
            hidden = hidden + self.attention(block.self_attn, block.input_layernorm(hidden), turns, keys, values)
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))[:, 0]

    def attention(
        self, attention: Any, x: torch.Tensor, turns: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """One token's attention to what the cache holds and to itself."""
        heads = (len(x), 1, -1, keys.shape[-1])
        q, k, v = (project(x).view(heads).transpose(1, 2)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
        q, k = apply_rotary_pos_emb(q, k, *turns)
        keys[:, :, -1:], values[:, :, -1:] = k, v
        found = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return attention.o_proj(found.transpose(1, 2).flatten(2))


def swap(model: Any, linears: dict[str, nn.Linear], pattern: Pattern | None) -> int:
    """Put packed linears in place of some; the bytes they hold. A weight that nothing else holds is freed."""
    held = 0
    for name in list(linears):
        linear: Any = linears.pop(name)
        packed = pack(linear.weight, pattern)
        held += packed.values.nbytes + packed.mask.nbytes
        model.set_submodule(name, OnCuda(packed, linear.bias))
    return held


def timed(model: Any, batch: int, length: int, repeats: int, expected: torch.Tensor | None) -> tuple[Figures, Any]:
    """A step's time in a graph and without, and its logits; figures are marked where they are not those expected."""
    step = Step(model, batch, length)
    logits = step().clone()
    replay: Callable[[], object] = graphed(step, model.device)
    taken = seconds_of(lambda _: replay(), model.device, repeats)
    plain = taken if replay is step else seconds_of(lambda _: step(), model.device, min(5, repeats))
    figures: Figures = {"step_s": taken, "tokens_per_s": batch / taken, "without_graph_s": plain}
    if expected is not None:
        figures["off_dense"] = float((logits.double() - expected.double()).norm() / expected.double().norm())
        if not figures["off_dense"] < LIMIT:
            figures["failed"] = f"wrong: its logits are {figures['off_dense']:.3g} off the dense model's"
    return figures, logits


def run(box: Box) -> None:
    """Every batch with dense linears, then packed ones."""
    batches, length, repeats = (TINY_BATCHES, TINY_LENGTH, 1) if box.rehearse else (BATCHES, LENGTH, REPEATS)
    shapes.SHAPES["tiny one"] = TINY
    model, linears = sparse_model("tiny one" if box.rehearse else "llama3-8b", None, None, torch.bfloat16, box.device)
    others = sum(parameter.nbytes for parameter in model.lm_head.parameters())
    held = {"dense": sum(linear.weight.nbytes for linear in linears.values())}
    logits: dict[int, torch.Tensor] = {}
    for kind in ("dense", "2:4", "unstructured"):
        if kind == "2:4":
            held[kind] = swap(model, linears, TWO_OF_FOUR)
        elif kind == "unstructured":
            held[kind] = sum(counted(module) for module in model.modules() if isinstance(module, OnCuda))
        for batch in batches:

            def measure(kind: str = kind, batch: int = batch) -> Figures:
                figures, found = timed(model, batch, length, repeats, logits.get(batch))
                logits.setdefault(batch, found)
                dense = box.items.get(f"dense, batch {batch}", {}).get("step_s")
                read = held[kind] + others
                figures |= {"weights_gib": read / 2**30, "gb_per_s": read / figures["step_s"] / 1e9}
                return {**figures, "over_dense": dense / figures["step_s"]} if dense else figures

            box.item(f"{kind}, batch {batch}", measure, needs_s=3 if not box.rehearse else 0.1)


def counted(linear: OnCuda) -> int:
    """Read a packed linear as unstructured from now on: counting bits, not by the pattern; its bytes."""
    packed = linear.packed
    linear.packed = Packed(packed.values, packed.mask, packed.starts, packed.columns)
    return packed.values.nbytes + packed.mask.nbytes + packed.starts.nbytes
