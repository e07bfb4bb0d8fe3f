"""The eval stage: zero-shot tasks and perplexities of several models, side by side, and whether they differ."""

from lors_cli.evaluation.pieces import eval_fingerprint
from lors_cli.evaluation.significance import compare_models
from lors_cli.evaluation.stage import evaluate

__all__ = ["compare_models", "eval_fingerprint", "evaluate"]
