"""The pruning stage."""
