"""Packages that settings of tuning need, looked for before a model is loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lors_cli.errors import MissingError
from lors_cli.tuning.training.trackers import check_installed

if TYPE_CHECKING:
    from lors_cli.recipe.schema import TuneConfig


def require_packages(config: TuneConfig) -> None:
    """Refuse to begin where a package is not installed.

    Raises:
        MissingError: naming it.
    """
    check_installed(config.report_to)
    if config.optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            "optim: adamw_8bit needs the package bitsandbytes, which is not installed.",
            "pip install bitsandbytes, or set optim: adamw.",
        )
