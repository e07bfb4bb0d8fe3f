"""Channel permutation for N:M: inputs of a linear are reordered so that groups of M lose less.

Which inputs of a block may be reordered is known in `free_inputs`.

Legend: R out_features, C in_features, S (C, R) scores channel by channel, T (K, R) thresholds of K = C / M groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lors_cli.sparsity import Pattern

ROUNDS = 24
PATIENCE = 3
TOLERANCE = 3e-4
"""The search ends after PATIENCE rounds (more where groups are few) that each add less than this share of the score."""
MAX_GROUPS = 512
"""Groups that exchange channels in one assignment; its costs are MAX_GROUPS² numbers."""


def retained(scores: torch.Tensor, pattern: Pattern, permutation: torch.Tensor | None = None) -> float:
    """The sum, in float64, of the scores (R, C) that stay when the N highest of every M inputs of a row are kept.

    `permutation` (C,): input j is taken from input permutation[j]; None for the order as it is.
    """
    assert pattern.m is not None
    order = torch.arange(scores.shape[1], device=scores.device) if permutation is None else permutation
    members = (scores[:, order[slot :: pattern.m]] for slot in range(pattern.m))
    return sum(float(kept.cpu().sum(dtype=torch.float64)) for kept in _largest(members, pattern))


def find_permutation(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """An order of the inputs with a high retained score, found by dealing and then by linear sum assignments.

    Channels are sorted by their total score and dealt to the groups in turn, to and fro. Then, over and over, every
    group gives up one channel and the best assignment of these channels to the groups is solved exactly, among at most
    `MAX_GROUPS` groups drawn anew each round: time is C·R·MAX_GROUPS a round. The draws are seeded.

    Args:
        scores: (R, C), not negative, C a multiple of M.

    Returns:
        (C,) int64 on the scores' device: new input j is old input permutation[j]. The identity, unless another order
        retains more.

    Source: RIA §4 (channel permutation), ICLR 2024, “Plug-and-Play: an efficient post-training pruning method for large
    language models”; after Pool and Yu, NeurIPS 2021, “Channel permutations for N:M sparsity”.
    """
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
    num_groups, m = groups.shape
    by_group = torch.randperm(num_groups, generator=generator).to(groups.device)
    by_slot = torch.rand(num_groups, m, generator=generator).argsort(dim=1).to(groups.device)
    return groups[by_group].gather(1, by_slot)


def _exchange(S: torch.Tensor, groups: torch.Tensor, slot: int, pattern: Pattern) -> float:
    """Assign the channels in one slot anew over the groups, in place; how much more is retained.

    With T the N-th largest of a group's other M − 1 scores, a channel s adds Σ max(0, s − T) to what the others retain.
    That is half of Σs − ΣT + ‖s − T‖₁, and the first two do not depend on who gets what: the best assignment is the
    one of the greatest L1 distances.

    `S` is (C, R), `groups` (k, M) channel numbers, changed; `slot` is which of the M is given up.
    """
    from scipy.optimize import linear_sum_assignment

    given = groups[:, slot].clone()
    T = _largest((S[groups[:, other]] for other in range(groups.shape[1]) if other != slot), pattern)[-1]
    distances = torch.cdist(T, S[given], p=1).cpu().double().numpy()
    _, chosen = linear_sum_assignment(distances, maximize=True)
    gain = float(distances[range(len(chosen)), chosen].sum() - distances.trace()) / 2
    if gain > 0:
        groups[:, slot] = given[torch.from_numpy(chosen).to(given.device)]
    return max(0.0, gain)
