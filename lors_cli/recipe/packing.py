"""The settings of `pack`: there is nothing to choose yet."""

from __future__ import annotations

from dataclasses import dataclass

from lors_cli.recipe.section import Section


@dataclass(frozen=True, kw_only=True)
class PackConfig(Section):
    """A copy of the sparse model that is smaller and decodes faster: of its weights the values that are not zero."""
