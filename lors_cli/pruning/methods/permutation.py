"""Channel permutation for N:M: inputs of a linear are reordered so that groups of M lose less.

Only inputs whose order nothing else sees are moved: between a producer and its consumer within a block (the MLP's
hidden channels; the channels of an attention head between v_proj and o_proj). The producer's output rows move along,
so the block computes what it did and the checkpoint stays an ordinary one. The inputs of q, k, v, gate and up are the
residual stream, whose order all layers, norms and the embeddings share: one permutation would have to serve every
linear of the model at once, and a permutation each would have to be run at inference. They are left alone. So are
attention inputs where q, k and v are one fused weight (Phi-3, GPT-NeoX, GPT-2), and modules with any child that is not
known here, which might tell channels apart (a norm before down_proj, a gate on the attention's output).

Legend: R out_features, C in_features, S (C, R) scores channel by channel, T (K, R) thresholds of K = C / M groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.sparsity import Pattern

if TYPE_CHECKING:
    import torch
    from torch import nn

ROUNDS = 24
PATIENCE = 3
TOLERANCE = 3e-4
"""The search ends after PATIENCE rounds (more where groups are few) that each add less than this share of the score."""
MAX_GROUPS = 512
"""Groups that exchange channels in one assignment; its costs are MAX_GROUPS² numbers."""

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


def retained(scores: torch.Tensor, pattern: Pattern, permutation: torch.Tensor | None = None) -> float:
    """The sum of the scores that stay when the N highest of every M consecutive inputs of a row are kept.

    Args:
        scores: (R, C), not negative.
        pattern: N:M.
        permutation: (C,) int64, input j is taken from input permutation[j]; None for the order as it is.

    Returns:
        The sum, added up in float64.
    """
    import torch

    assert pattern.m is not None
    order = torch.arange(scores.shape[1], device=scores.device) if permutation is None else permutation
    members = (scores[:, order[slot :: pattern.m]] for slot in range(pattern.m))
    return sum(float(kept.cpu().sum(dtype=torch.float64)) for kept in _largest(members, pattern))


def find_permutation(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """An order of the inputs with a high retained score, found by dealing and then by linear sum assignments.

    Channels are sorted by their total score and dealt to the groups in turn, to and fro. Then, over and over, every
    group gives up one channel and the best assignment of these channels to the groups is solved exactly. At most
    `MAX_GROUPS` groups, drawn anew each round, exchange channels at a time, which bounds time (C·R·MAX_GROUPS a round)
    and memory (a copy of the scores). The draws are seeded: the result depends on the arguments alone.

    Args:
        scores: (R, C), not negative, C a multiple of M.
        pattern: N:M.

    Returns:
        (C,) int64 on the scores' device: new input j is old input permutation[j]. The identity, unless another order
        retains more.

    Source: RIA §4 (channel permutation), ICLR 2024, “Plug-and-Play: an efficient post-training pruning method for large
    language models”; after Pool and Yu, NeurIPS 2021, “Channel permutations for N:M sparsity”.
    """
    import torch

    assert pattern.m is not None
    scores = scores.detach()
    S = scores.T.float().contiguous()
    dealt = S.sum(1).argsort(descending=True, stable=True).view(pattern.m, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    groups = dealt.T
    generator = torch.Generator().manual_seed(0)
    enough, idle, patience = TOLERANCE * float(S.sum()), 0, PATIENCE + 32 // len(groups)
    for _ in range(ROUNDS):
        groups, gain = _shuffle(groups, generator), 0.0
        for slot in range(pattern.m):
            gain += sum(_exchange(S, part, slot, pattern) for part in groups.split(MAX_GROUPS))
        idle = 0 if gain > enough else idle + 1
        if idle == patience:
            break
    found = groups.flatten()
    if retained(scores, pattern, found) > retained(scores, pattern):
        return found
    return torch.arange(len(S), device=scores.device)


def _largest(members: Iterator[torch.Tensor], pattern: Pattern) -> list[torch.Tensor]:
    """Element by element, the N largest of several tensors, highest first."""
    import torch

    assert pattern.n is not None
    best: list[torch.Tensor] = []
    for value in members:
        for i, held in enumerate(best):
            best[i], value = torch.maximum(held, value), torch.minimum(held, value)
        if len(best) < pattern.n:
            best.append(value)
    return best


def _shuffle(groups: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same groups in another order, the channels of each in another order."""
    import torch

    num_groups, m = groups.shape
    by_group = torch.randperm(num_groups, generator=generator).to(groups.device)
    by_slot = torch.rand(num_groups, m, generator=generator).argsort(dim=1).to(groups.device)
    return groups[by_group].gather(1, by_slot)


def _exchange(S: torch.Tensor, groups: torch.Tensor, slot: int, pattern: Pattern) -> float:
    """Assign the channels in one slot anew over the groups, in place; how much more is retained.

    With T the N-th largest of a group's other M − 1 scores, a channel s adds Σ max(0, s − T) to what the others retain.
    That is half of Σs − ΣT + ‖s − T‖₁, and the first two do not depend on who gets what: the best assignment is the
    one of the greatest L1 distances.

    Args:
        S: (C, R).
        groups: (k, M) channel numbers, changed.
        slot: which of the M is given up.
        pattern: N:M.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    given = groups[:, slot].clone()
    T = _largest((S[groups[:, other]] for other in range(groups.shape[1]) if other != slot), pattern)[-1]
    distances = torch.cdist(T, S[given], p=1).cpu().double().numpy()
    _, chosen = linear_sum_assignment(distances, maximize=True)
    gain = float(distances[range(len(chosen)), chosen].sum() - distances.trace()) / 2
    if gain > 0:
        groups[:, slot] = given[torch.from_numpy(chosen).to(given.device)]
    return max(0.0, gain)


@dataclass(frozen=True)
class Producer:
    """A linear whose output channels reach the consumer.

    Args:
        module: nn.Linear, or GPT-2's Conv1D.
        rows: (C,) int64, the output row that feeds each of the consumer's inputs.
    """

    module: nn.Module
    rows: torch.Tensor


@dataclass(frozen=True)
class FreeInput:
    """A linear of a block whose inputs may be permuted.

    Args:
        name: the consumer's, within the block (“mlp.down_proj”).
        consumer: nn.Linear, or GPT-2's Conv1D.
        producers: what makes its inputs, channel by channel.
        segments: ranges within which inputs may move; the ranges of one entry are permuted alike (the query heads
            that share a KV head). Together they are all the inputs.
    """

    name: str
    consumer: nn.Module
    producers: tuple[Producer, ...]
    segments: tuple[tuple[range, ...], ...]


def free_inputs(block: nn.Module) -> list[FreeInput]:
    """The linears of a decoder block whose inputs can be permuted without a trace.

    MLPs of Llama, Mistral, Qwen2/3, Gemma (down_proj), Phi-3 (fused gate_up_proj), OPT (fc2), GPT-NeoX (dense_4h_to_h)
    and GPT-2 (c_proj); attention with separate v_proj and o_proj or out_proj, within each head.

    Args:
        block: a decoder block.
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

    Args:
        free: from `free_inputs`.
        scores: (R, C) of the consumer.
        pattern: N:M.

    Returns:
        (C,) int64, for `apply_permutation`.
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

    The block's output is the same up to the order of a sum. Statistics of the consumer's inputs are the caller's.

    Args:
        free: from `free_inputs`.
        permutation: (C,) int64, from `find_for`.
    """
    import torch

    weight = _weight(free.consumer)
    order = permutation.to(weight.device)
    weight.copy_(weight[:, order])
    for producer in free.producers:
        weight, bias = _weight(producer.module), getattr(producer.module, "bias", None)
        source = producer.rows.to(weight.device)
        rows = torch.arange(len(weight), device=weight.device)
        rows[source] = source[order]
        assert torch.equal(rows[source], source[order]), "heads that share a KV head are permuted alike"
        weight.copy_(weight[rows])
        if bias is not None:
            bias.data.copy_(bias.data[rows])
