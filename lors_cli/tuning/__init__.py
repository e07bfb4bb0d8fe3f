"""The tuning stage: `tune` recovers a sparse checkpoint with adapters."""

from lors_cli.tuning.stage import tune

__all__ = ["tune"]
