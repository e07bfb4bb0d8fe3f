"""`lors push`: a model to the hub."""

from __future__ import annotations

import sys
from typing import Any

import typer

from lors_cli.cli import options as o
from lors_cli.cli.framework import SHARE, command
from lors_cli.errors import UsageError
from lors_cli.output import console

share_app = typer.Typer()


@command(
    share_app, SHARE, "lors push runs/mine me/sparse-llama --dry-run", "lors push tuned me/sparse-llama --private",
    "lors push tuned me/sparse-llama --scores scores --yes",
)  # fmt: skip
def push(
    folder: o.PushFolder, repo: o.Repo, private: o.Private = False, revision: o.Branch = "main",
    scores: o.ScoresFolder = None, yes: o.Yes = False, dry_run: o.PushDryRun = False,
) -> None:  # fmt: skip
    """Upload a model to the hub, with its card, after showing what goes."""
    from lors_cli.pipeline import pushing

    plan = pushing.prepare(pushing.chosen_checkpoint(folder), repo, private=private, revision=revision, scores=scores)
    document = show_push(plan)
    if dry_run:
        console.result("\nNothing was uploaded (--dry-run).")
        console.document({**document, "dry_run": True})
        return
    if not yes:
        if console.is_json() or not sys.stdin.isatty():
            raise UsageError("nobody is here to be asked whether to upload.", "Look at --dry-run, then add --yes.")
        if not typer.confirm("\nUpload?"):
            console.result("Nothing was uploaded.")
            return
    commit, address = pushing.push(plan)
    console.result(f"\nuploaded: {address}")
    console.document({**document, "dry_run": False, "commit": commit, "url": address})


def show_push(plan: Any) -> dict[str, Any]:
    """What goes where, and what stays here."""
    sizes, card = plan.sizes(), plan.card
    who = "private" if plan.is_private else "public"
    state = f"there already, {who}" if plan.exists else f"new, {who}"
    console.facts([("from", str(plan.folder)), ("to", f"{plan.repo} ({state}), branch {plan.revision}")])
    console.table(["file", "size"], [[name, console.gib(size)] for name, size in sizes.items()])
    console.result(f"{len(sizes)} files, {console.gib(sum(sizes.values()))}")
    console.result(f"stays here: {', '.join(plan.left_out) or 'nothing'}")
    if plan.removed:
        console.result(f"goes from there: {', '.join(plan.removed)}")
    if not card:
        console.warn("there is no model card: a README.md beside the weights would be one.")
    scores = sum(len(result["metrics"]) for entry in card.get("model-index", ()) for result in entry["results"])
    said = [f"{key} {_listed(card[key])}" for key in ("base_model", "license", "datasets", "tags") if card.get(key)]
    console.result(f"card: {'; '.join([*said, console.counted(scores, 'score') if scores else 'no scores'])}")
    return {
        "folder": str(plan.folder), "repo": plan.repo, "private": plan.is_private, "exists": plan.exists,
        "revision": plan.revision, "files": [{"path": name, "size": size} for name, size in sizes.items()],
        "left_out": plan.left_out, "removed": plan.removed, "card": card,
    }  # fmt: skip


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
