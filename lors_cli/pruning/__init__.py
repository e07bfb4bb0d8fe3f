"""The pruning stage: `prune` turns a dense checkpoint into a sparse one."""

from lors_cli.pruning.stage import prune

__all__ = ["prune"]
