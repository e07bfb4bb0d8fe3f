"""Inputs of a decoder block that channel permutation may reorder without a trace.

Only inputs whose order nothing else sees are moved: between a producer and its consumer within a block (the MLP's
hidden channels; the channels of an attention head between v_proj and o_proj). The producer's output rows move along,
so the block computes what it did and the checkpoint stays an ordinary one. The inputs of q, k, v, gate and up are the
residual stream, whose order all layers, norms and the embeddings share: one permutation would have to serve every
linear of the model at once, and a permutation each would have to be run at inference. They are left alone. So are
attention inputs where q, k and v are one fused weight (Phi-3, GPT-NeoX, GPT-2), and modules with any child that is not
known here, which might tell channels apart (a norm before down_proj, a gate on the attention's output).

Legend: R out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.pruning.methods.permutation import find_permutation
from lors_cli.sparsity import Pattern

if TYPE_CHECKING:
    import torch
    from torch import nn

MLPS = (
    (("gate_proj", "up_proj"), 1, "down_proj"),
    (("gate_up_proj",), 2, "down_proj"),
    (("fc1",), 1, "fc2"),
    (("dense_h_to_4h",), 1, "dense_4h_to_h"),
    (("c_fc",), 1, "c_proj"),
)
"""Producers, how many times the hidden channels each puts out, and the consumer."""
MLP_CHILDREN = {
    "act_fn", "act", "activation_fn", "activation", "gelu_impl", "dropout",
    "self_attn", "self_attn_layer_norm", "final_layer_norm",  # OPT has fc1 and fc2 in the block itself
}  # fmt: skip
ATTENTION_CHILDREN = {"q_norm", "k_norm", "rotary_emb"}
"""What may be there besides the linears; anything else keeps the module's inputs where they are."""


@dataclass(frozen=True)
class Producer:
    """A linear (GPT-2's is a Conv1D) whose output channels reach the consumer."""

    module: nn.Module
    rows: torch.Tensor
    """(C,) int64, the output row that feeds each of the consumer's inputs."""


@dataclass(frozen=True)
class FreeInput:
    """A linear of a block whose inputs, made by its producers channel by channel, may be permuted."""

    name: str
    """Within the block (“mlp.down_proj”)."""
    consumer: nn.Module
    producers: tuple[Producer, ...]
    segments: tuple[tuple[range, ...], ...]
    """Ranges within which inputs may move; the ranges of one entry are permuted alike (the query heads that share a KV
    head). Together they are all the inputs."""


def free_inputs(block: nn.Module) -> list[FreeInput]:
    """The linears of a decoder block whose inputs can be permuted without a trace.

    MLPs of Llama, Mistral, Qwen2/3, Gemma (down_proj), Phi-3 (fused gate_up_proj), OPT (fc2), GPT-NeoX (dense_4h_to_h)
    and GPT-2 (c_proj); attention with separate v_proj and o_proj or out_proj, within each head.
    """
    found = (find(name, module) for name, module in block.named_modules() for find in (_free_mlp, _free_attention))
    return [free for free in found if free is not None]


def _free_mlp(name: str, module: nn.Module) -> FreeInput | None:
    import torch

    for keys, parts, consumer in MLPS:
        linears = _linears(module, (*keys, consumer), MLP_CHILDREN)
        width = _weight(linears[consumer]).shape[1] if linears else 0
        if linears and all(len(_weight(linears[key])) == parts * width for key in keys):
            rows = torch.arange(parts * width).split(width)
            producers = tuple(Producer(linears[key], part) for key in keys for part in rows)
            return FreeInput(f"{name}.{consumer}".lstrip("."), linears[consumer], producers, ((range(width),),))
    return None


def _free_attention(name: str, module: nn.Module) -> FreeInput | None:
    import torch

    consumer = "o_proj" if hasattr(module, "o_proj") else "out_proj"
    linears = _linears(module, ("q_proj", "k_proj", "v_proj", consumer), ATTENTION_CHILDREN)
    head_dim = getattr(module, "head_dim", None)
    if not linears or not isinstance(head_dim, int):
        return None
    queries, keys, values = (len(_weight(linears[key])) for key in ("q_proj", "k_proj", "v_proj"))
    if _weight(linears[consumer]).shape[1] != queries or keys != values or values % head_dim or queries % values:
        return None
    shared = queries // values  # query heads a KV head
    heads = [range(start, start + head_dim) for start in range(0, queries, head_dim)]
    rows = torch.arange(values).view(-1, head_dim).repeat_interleave(shared, dim=0).flatten()
    segments = tuple(tuple(heads[i : i + shared]) for i in range(0, len(heads), shared))
    return FreeInput(f"{name}.{consumer}", linears[consumer], (Producer(linears["v_proj"], rows),), segments)


def _linears(module: nn.Module, names: Sequence[str], others: set[str]) -> dict[str, nn.Module]:
    """The named children; none where one is missing or the module holds more that might tell channels apart."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    children = dict(module.named_children())
    known = children.keys() - others <= set(names) <= children.keys() and not [*module.parameters(recurse=False)]
    found = {name: children[name] for name in names} if known else {}
    return found if all(isinstance(linear, (nn.Linear, Conv1D)) for linear in found.values()) else {}


def _weight(module: Any) -> torch.Tensor:
    """A view (out_features, in_features) of the weight; Conv1D stores it transposed."""
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


def find_for(free: FreeInput, scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """A permutation with a high retained score that keeps every input within its segment.

    Ranges that are permuted alike are searched as one, their rows stacked; one that is no multiple of M long stays.
    `scores` (R, C) are the consumer's.
    """
    import torch

    assert pattern.m is not None
    permutation = torch.arange(scores.shape[1], device=scores.device)
    for tied in free.segments:
        if len(tied[0]) % pattern.m:
            continue
        local = find_permutation(torch.cat([scores[:, part.start : part.stop] for part in tied]), pattern)
        for part in tied:
            permutation[part.start : part.stop] = local + part.start
    return permutation


def apply_permutation(free: FreeInput, permutation: torch.Tensor) -> None:
    """Permute the consumer's inputs, and the producers' rows and biases to match, in place.

    The block's output is the same up to the order of a sum. Statistics of the consumer's inputs are the caller's, and
    whatever else there is for each row of a producer (`row_orders`).
    """
    weight = _weight(free.consumer)
    weight.copy_(weight[:, permutation.to(weight.device)])
    for module, rows in row_orders(free, permutation):
        weight, bias = _weight(module), getattr(module, "bias", None)
        order = rows.to(weight.device)
        weight.copy_(weight[order])
        if bias is not None:
            bias.data.copy_(bias.data[order])


def row_orders(free: FreeInput, permutation: torch.Tensor) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """What a permutation (C,) of the inputs does to the producers' rows: new row j is old order[j]."""
    import torch

    order = permutation.cpu()
    for producer in free.producers:
        rows = torch.arange(len(_weight(producer.module)))
        rows[producer.rows] = producer.rows[order]
        assert torch.equal(rows[producer.rows], producer.rows[order]), "heads that share a KV head are permuted alike"
        yield producer.module, rows
