"""Packages that settings of tuning need, looked for before a model is loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lors_cli.errors import MissingError

if TYPE_CHECKING:
    from lors_cli.recipe.schema import TuneConfig


def require_packages(config: TuneConfig) -> None:
    """Refuse to begin where a package is not installed; a folder of its name, as wandb makes it, is none.

    Raises:
        MissingError: naming what to install.
    """
    found = {name: importlib.util.find_spec(name) for name in config.report_to}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if missing:
        raise MissingError(
            f"report_to: {', '.join(missing)} is not installed.", f"pip install {' '.join(missing)}, or leave it out."
        )
    if config.optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            "optim: adamw_8bit needs the package bitsandbytes, which is not installed.",
            "pip install bitsandbytes, or set optim: adamw.",
        )
