"""The language-model head and its loss in chunks of tokens, so that all logits are never in memory at once.

The loss is cross-entropy with the labels, or a mixture of it and the divergence from a dense teacher's predictions.

Legend: H (tokens, hidden_size) the head's inputs, V (vocabulary, hidden_size) its weight, dH the gradient of H, T the
temperature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lors_cli.data.samples import IGNORED
from lors_cli.models.blocks import has_plain_head
from lors_cli.tuning.divergence import AllTokens, Predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[[Any, dict[str, torch.Tensor], Any], torch.Tensor]
"""A model's loss on a batch with labels, a sum over the labels divided by the third argument."""
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Of float32 logits at a time."""
CHECKED_TOKENS = 64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative difference of plain and chunked loss that is rounding; 0.01 for half-precision dtypes."""


class AnyTeacher(Protocol):
    """Whose predictions are to be matched.

    Args:
        weight: share of the divergence in the loss, above 0 and at most 1; the rest is cross-entropy.
        temperature: T of both softmaxes; the divergence is multiplied by T², so that its gradient keeps its size.

    Source: Hinton et al. §2, arXiv:1503.02531.
    """

    @property
    def weight(self) -> float: ...

    @property
    def temperature(self) -> float: ...

    def predictions(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor) -> Predictions:
        """What it says at these positions of the flattened batch, those with a label.

        Args:
            inputs: of a base model.
            labels: (samples × tokens,), the token each position should predict.
        """
        ...


@dataclass(frozen=True)
class Teacher:
    """A frozen dense model, with the student's vocabulary and a plain head."""

    model: Any
    weight: float
    temperature: float

    @torch.no_grad()
    def predictions(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor) -> AllTokens:
        """Those of all tokens."""
        hidden = self.model.base_model(**inputs, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        return AllTokens(_picked(hidden, chosen, head.weight.dtype), head.weight, head.bias)


def chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """Tokens whose logits are in memory at a time."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocab_size))


class _HeadLoss(torch.autograd.Function):
    """The summed loss; dH is made on the way forward, chunk by chunk, and is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        num_items: float, teacher: Predictions | None, share: float, temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                            device=hidden.device)  # fmt: skip
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = chunk_tokens(hidden.device, weight.shape[0])
        for first in range(0, hidden.shape[0], size):
            tokens = slice(first, first + size)
            logits = F.linear(hidden[tokens], weight, bias).to(total.dtype)
            slope = None
            if teacher is not None:
                divergence, slope = teacher.divergence(tokens, logits, temperature)
                total += share * divergence
                slope.mul_(share)
            if share < 1:
                entropy, entropy_slope = _cross_entropy(logits, labels[tokens, None])
                total += (1 - share) * entropy
                slope = entropy_slope if slope is None else slope.add_(entropy_slope, alpha=1 - share)
            assert slope is not None
            if gradient is not None:
                torch.mm(slope.div_(num_items).to(weight.dtype), weight, out=gradient[tokens])
        ctx.gradient = gradient
        return total / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient.mul_(upstream), *[None] * 7


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over tokens, and its gradient in the memory of the logits (tokens, vocabulary); labels are (tokens, 1)."""
    top, chosen = logits.amax(1, keepdim=True), logits.gather(1, labels)
    slope = logits.sub_(top).exp_()  # logsumexp would take as much memory again
    sums = slope.sum(1, keepdim=True)
    total = (sums.log() + top - chosen).sum()
    slope.div_(sums)
    slope.scatter_add_(1, labels, slope.new_full((1, 1), -1.0).expand_as(labels))
    return total, slope


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items: float | torch.Tensor | None = None,
    *,
    teacher: AnyTeacher | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Cross-entropy of a linear head's float32 logits, which never exist all at once.

    Tokens without a label take no part at all. The head itself gets no gradient.

    Args:
        hidden: (…, hidden_size).
        labels: (…), the token each position should predict, -100 for none.
        num_items: what the summed loss is divided by; default: the number of labels.
        teacher: whose predictions at the labelled positions are mixed into the loss.
        inputs: what the teacher's base model takes; needed with a teacher, and labels of their shape.

    Returns:
        The loss, float32 (float64 for float64 inputs); one backward pass can be made of it.

    Source: chunked linear cross-entropy as in Liger, arXiv:2410.10989 §3.2.
    """
    labels = labels.reshape(-1)
    chosen = (labels != IGNORED).nonzero().squeeze(1)
    divisor = float(len(chosen) if num_items is None else num_items)
    with torch.autocast(hidden.device.type, enabled=False):
        mixture: tuple[Predictions | None, float, float] = (None, 0.0, 1.0)
        if teacher is not None:
            assert inputs is not None
            mixture = (teacher.predictions(inputs, labels, chosen), teacher.weight, teacher.temperature)
        picked = _picked(hidden, chosen, weight.dtype)
        return _HeadLoss.apply(picked, weight, bias, labels[chosen], divisor, *mixture)


def _picked(hidden: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """H at the chosen positions of the flattened batch, in the head's dtype."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen).to(dtype)


def causal_lm_loss(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    num_items: float | torch.Tensor | None = None,
    *,
    teacher: AnyTeacher | None = None,
) -> torch.Tensor:
    """The loss of a causal LM that `why_not_chunked` has nothing against, its head chunked."""
    inputs = dict(inputs)
    labels = F.pad(inputs.pop("labels"), (0, 1), value=IGNORED)[..., 1:]
    hidden = model.base_model(**inputs, use_cache=False)[0]
    head: Any = model.get_output_embeddings()
    return chunked_cross_entropy(hidden, head.weight, head.bias, labels, num_items, teacher=teacher, inputs=inputs)


def model_loss(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], num_items: float | torch.Tensor
) -> torch.Tensor:
    """The model's own loss, summed over the labels of a batch and divided by `num_items`; of its predictions alone."""
    inputs = {**inputs, **_without_routers(model)}
    takes_number = getattr(model, "accepts_loss_kwargs", None)
    if takes_number is None:
        parameters = inspect.signature(model.forward).parameters.values()
        takes_number = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters)
    if takes_number:
        return model(**inputs, use_cache=False, num_items_in_batch=num_items)["loss"]
    labels = (inputs["labels"][:, 1:] != IGNORED).sum()
    if not labels:  # a mean over none is not a number
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        return model(**unlabelled, use_cache=False).logits.float().mean() * 0.0
    return model(**inputs, use_cache=False)["loss"] * labels / num_items


def _without_routers(model: PreTrainedModel) -> dict[str, Any]:
    """What leaves out a loss that balances a mixture's routers: it is a batch's, not a label's, and none is trained."""
    has_one = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if has_one else {}


@torch.no_grad()
def why_not_chunked(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> str:
    """Why the head cannot be chunked: the model's own loss is not that of its head's plain outputs. Empty if it can.

    Soft-capped or scaled logits, and losses with further terms, are found by trying, on a few tokens.
    """
    head: Any = model.get_output_embeddings()
    if not has_plain_head(model):
        return "its head is no plain linear on top of its base model"
    if head.weight.requires_grad:
        return "its head is trained"
    length = int((inputs["labels"] != IGNORED).any(0).nonzero()[0]) + CHECKED_TOKENS
    few = {key: value[:, :length].to(model.device) for key, value in inputs.items()}
    was_training = model.training
    model.eval()
    try:
        plain = float(model(**few, **_without_routers(model), use_cache=False).loss)
        chunked = float(causal_lm_loss(model, few))
    finally:
        model.train(was_training)
    limit = TOLERANCE.get(head.weight.dtype, 1e-2)
    if abs(plain - chunked) > limit * abs(plain):
        return f"its loss has more in it than its head's outputs ({plain:.4f} against {chunked:.4f})"
    return ""
