"""The settings of `eval`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from lors_cli.errors import UsageError
from lors_cli.recipe.columns import Name, Positive
from lors_cli.recipe.section import Section

ModelRole = Literal["dense", "pruned", "tuned"]
SEVEN_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a model may be called in the results, whose files are called so."""
TAKEN = ("stage", "samples")
"""Names of other files in the folder of results."""


def check_label(label: str) -> None:
    """Refuse a name that a model cannot have in the results.

    Raises:
        UsageError: it can be no file's, or is another file's.
    """
    if not LABEL.fullmatch(label) or label in TAKEN:
        raise UsageError(f"{label!r} cannot be a model's name in the results.", "Use letters, digits, . _ -")


def _count_or_share(value: float) -> float:
    """200.0 as the whole number that it is."""
    return int(value) if value.is_integer() else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shots(value: Any) -> Any:
    """A number of examples, or such numbers by task."""
    if value is None or _is_count(value) or (isinstance(value, dict) and value and all(map(_is_count, value.values()))):
        return value
    raise PydanticCustomError("num_fewshot", "must be a whole number, or whole numbers by task, such as {mmlu: 5}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Tasks and perplexities to measure."""

    models: Annotated[tuple[ModelRole, ...], Field(min_length=1)] | None = None
    """Which of dense, pruned, tuned. Default: those that the recipe makes."""
    tasks: tuple[Name, ...] = SEVEN_TASKS
    """lm-evaluation-harness tasks by name, its groups (mmlu), tags, wildcards (blimp_*), or pydoc_choice."""
    perplexity: tuple[Name, ...] = ()
    """Texts for token perplexity: wikitext2 (the papers' join), wikitext2-lines, pydoc, c4, slimpajama, a file, or a
    dataset on the hub (its validation or test split)."""
    limit: Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_count_or_share)] | None = None
    """At most so many documents a task; below 1, that share of each task's documents, rounded up."""
    num_fewshot: Annotated[int | dict[str, int], BeforeValidator(_shots)] | None = None
    """Examples before each question, for all tasks, or by task or group: {mmlu: 5}. Default: 0 for the seven and
    pydoc_choice, else what the task's definition says. As in lm-eval one number for all leaves tasks alone whose
    definition says 0."""
    apply_chat_template: bool = False
    """Put the prompts of tasks into the model's own chat template."""
    fewshot_as_multiturn: bool | None = None
    """With the chat template: each example is a turn of its own. Default, as in lm-eval: true."""
    system_instruction: Name | None = None
    """Stands before every prompt of a task; with the chat template it is the system's turn."""
    include_path: Name | None = None
    """Folder with task definitions of your own in lm-eval's YAML, which win over lm-eval's of the same name."""
    batch_size: Positive = 8
    """Sequences a forward pass; of choices that share their context, as many as have no more tokens than so many of
    the longest sequence. Scores move slightly with it, so it is part of the results' fingerprint."""
    perplexity_windows: Positive | None = None
    """At most so many windows of each text."""
    perplexity_length: Positive | None = None
    """Tokens a window. Default 2048 or the model's limit."""
    generations: bool = True
    """Have each model continue three short prompts too (48 new tokens each, greedy), for the report. Not part of a
    stage's fingerprint."""
