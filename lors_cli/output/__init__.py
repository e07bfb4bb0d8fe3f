"""Console, progress, Markdown."""
