"""Kinds of values in a recipe, and the section that names a file's columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from lors_cli.recipe.section import Section

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig(Section):
    """The columns of a file of rows by their names there: `{instruction: question, output: answer}`."""

    text: Name | None = None
    """Plain text."""
    messages: Name | None = None
    """Conversations: lists of role and content, or of from and value."""
    instruction: Name | None = None
    """Questions."""
    input: Name | None = None
    """What a question is about; may be absent."""
    output: Name | None = None
    """Answers."""
    system: Name | None = None
    """System prompts, of instructions or messages; may be absent."""
    history: Name | None = None
    """Lists of [question, answer] before an instruction; may be absent."""

    @property
    def names(self) -> dict[str, str]:
        """Our names to the file's, those that are given."""
        return {key: name for key, name in asdict(self).items() if name is not None}
