"""Where a model lies, loading, saving, its blocks, its size, its card."""
