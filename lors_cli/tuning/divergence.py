"""How far a student's predictions are from a teacher's, which are all there or, from a cache, the likeliest alone.

Legend: T the temperature, p the teacher's and q the student's softmax of logits / T; k the tokens that are kept.

Source: Hinton et al. §2, arXiv:1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F


class Predictions(Protocol):
    """What a teacher says of the labelled tokens of a batch."""

    def divergence(self, tokens: slice, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """T²·KL(p ‖ q) summed over these tokens, whose `logits` (tokens, vocabulary) are the student's, and its
        gradient by them."""
        ...


@dataclass(frozen=True)
class AllTokens:
    """Predictions of every token, made a chunk at a time of the inputs of the teacher's head and its weights."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, tokens: slice) -> torch.Tensor:
        """In the head's dtype."""
        return F.linear(self.hidden[tokens], self.weight, self.bias)

    def divergence(self, tokens: slice, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient is T·(q − p)."""
        log_q = torch.log_softmax(logits / temperature, 1)
        log_p = torch.log_softmax(self.logits(tokens).to(logits.dtype).div_(temperature), 1)
        p = log_p.exp()
        total = temperature**2 * torch.sum(p * (log_p - log_q))
        return total, log_q.exp_().sub_(p).mul_(temperature)


@dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens and the rest as one: k + 1 events, whose divergence is at most that of all tokens.

    Logarithms of probabilities are those at T = 1. Both sides' events are flattened by T, as all tokens would be; with
    k the whole vocabulary that is the divergence of all tokens.

    Args:
        ids: (tokens, k) of the vocabulary.
        log_p: (tokens, k).
        log_rest: (tokens,), of all others together; -inf where there are none.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, top_k: int) -> TopTokens:
        """Of a teacher's logits (tokens, vocabulary)."""
        log_p = torch.log_softmax(logits, 1)
        kept, ids = log_p.topk(top_k, dim=1)
        return cls(ids, kept, log_p.scatter_(1, ids, -torch.inf).logsumexp(1))

    def divergence(self, tokens: slice, logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient is T·(q − p) at the kept tokens; the rest's is spread over its tokens as the student does."""
        ids = self.ids[tokens]
        rest = logits.scatter(1, ids, -torch.inf)
        log_sum = logits.logsumexp(1, keepdim=True)
        log_rest = rest.logsumexp(1, keepdim=True)
        teacher = torch.cat([self.log_p[tokens], self.log_rest[tokens, None]], 1).to(logits.dtype)
        student = torch.cat([logits.gather(1, ids) - log_sum, log_rest - log_sum], 1)
        log_p = torch.log_softmax(teacher / temperature, 1)
        log_q = torch.log_softmax(student / temperature, 1)
        p = log_p.exp()
        total = temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
        slope = log_q.exp_().sub_(p).mul_(temperature)
        empty = log_rest == -torch.inf  # no token is left in the rest
        gradient = rest.sub_(log_rest.masked_fill(empty, 0.0)).exp_().mul_(slope[:, -1:])
        return total, gradient.scatter_(1, ids, slope[:, :-1])
