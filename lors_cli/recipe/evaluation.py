"""The settings of `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lors_cli.recipe.columns import Name, Positive
from lors_cli.recipe.rules import Section

ModelRole = Literal["dense", "pruned", "tuned"]
SEVEN_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Zero-shot tasks and perplexities to measure."""

    models: Annotated[tuple[ModelRole, ...], Field(min_length=1)] | None = None
    """Which of dense, pruned, tuned. Default: those that the recipe makes."""
    tasks: tuple[Name, ...] = SEVEN_TASKS
    """Names of lm-evaluation-harness tasks, or pydoc_choice."""
    perplexity: tuple[Name, ...] = ()
    """Texts for token perplexity: wikitext2 (the papers' join), wikitext2-lines, pydoc, c4, slimpajama, a file, or a
    dataset on the hub (its validation or test split)."""
    limit: Positive | None = None
    """At most so many documents a task."""
    batch_size: Positive = 8
    """Sequences a forward pass; of choices that share their context, as many as have no more tokens than so many of
    the longest sequence. Scores move slightly with it, so it is part of the results' fingerprint."""
    perplexity_windows: Positive | None = None
    """At most so many windows of each text."""
    perplexity_length: Positive | None = None
    """Tokens a window. Default 2048 or the model's limit."""
