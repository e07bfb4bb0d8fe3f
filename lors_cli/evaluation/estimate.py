"""What an evaluation will need: memory and operations, by arithmetic."""

from __future__ import annotations

import math

from lors_cli.data import tokenising
from lors_cli.evaluation.entries import resolve, tasks_of
from lors_cli.evaluation.texts import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from lors_cli.models.needs import RUNTIME, Estimate
from lors_cli.models.size import ModelSize, forward
from lors_cli.recipe.schema import EvalConfig

TASK_LENGTH = 512
"""Tokens that few documents of a zero-shot task exceed."""
TASK_DOCUMENTS = {
    "arc_challenge": (1172, 163), "arc_easy": (2376, 141), "boolq": (3270, 296), "hellaswag": (10042, 349),
    "openbookqa": (500, 66), "rte": (277, 160), "winogrande": (1267, 50),
}  # fmt: skip
"""Documents of a task, and tokens of one with all its answers (4.4 characters a token)."""
OTHER_TASK = (1000, 300)
"""Of a task that is not among them."""
TEXT_TOKENS = {"wikitext2": 300_000, "wikitext2-lines": 300_000}
"""Tokens of a text that is measured whole."""


def needs(config: EvalConfig, size: ModelSize) -> Estimate:
    """Libraries, weights and a batch's logits."""
    tokens = config.batch_size * min(TASK_LENGTH, size.max_length)
    logits = tokens * size.vocab_size * (4 + size.bytes_a_weight)
    return Estimate(RUNTIME + size.num_bytes + logits, 64 << 20)


def operations(config: EvalConfig, size: ModelSize, num_models: int) -> float | None:
    """Floating-point operations, None where a text's length is not known."""
    total = 0.0
    for task in tasks_of(resolve(config)):
        documents, tokens = TASK_DOCUMENTS.get(task.name, OTHER_TASK)
        limit = config.limit or documents
        scored = min(documents, limit) if limit >= 1 else math.ceil(limit * documents)
        tokens = min(tokens * (1 + task.num_fewshot), size.max_length)
        total += forward(size, scored * tokens, tokens / 2)
    length = config.perplexity_length or min(tokenising.DEFAULT_LENGTH, size.max_length)
    for text in config.perplexity:
        at_most = config.perplexity_windows * length if config.perplexity_windows else math.inf
        measured = min(at_most, TEXT_TOKENS.get(text, math.inf))
        if measured == math.inf:
            return None
        total += forward(size, measured, length)
    if config.generations:
        total += forward(size, len(PROMPTS) * (PROMPT_TOKENS + NEW_TOKENS), PROMPT_TOKENS)
    return num_models * total
