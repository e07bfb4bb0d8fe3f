"""The eval stage: zero-shot tasks and perplexities of several models, side by side, and whether they differ."""

from lors_cli.evaluation.pieces import eval_fingerprint, pending_pieces, samples_path, take_over
from lors_cli.evaluation.significance import compare_models
from lors_cli.evaluation.stage import evaluate
from lors_cli.evaluation.summary import recovered
from lors_cli.evaluation.tasks import check_tasks

__all__ = [
    "check_tasks", "compare_models", "eval_fingerprint", "evaluate", "pending_pieces", "recovered", "samples_path",
    "take_over",
]  # fmt: skip
