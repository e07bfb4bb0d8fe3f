"""Fixtures of the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_folder import SweepFolder, shares


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """sparsegpt and wanda, each with lors, spp and sqft; wanda-spp failed while tuning, wanda-sqft is pending."""
    made = SweepFolder(tmp_path / "llama3", "llama3", {"prune.method": ["sparsegpt", "wanda"],
                                                       "tune.method": ["lors", "spp", "sqft"]})  # fmt: skip
    dense = made.score("stages/eval-d", "dense", shares(0.5), 6.125)
    drop = {"sparsegpt": 0.10, "wanda": 0.15}
    gain = {"lors": 0.06, "spp": 0.04, "sqft": 0.02}
    for prune, loss in drop.items():
        pruned = made.prune(f"stages/prune-{prune}", prune)
        scored = made.score(f"stages/eval-{prune}", "pruned", shares(0.5 - loss), 16 + 100 * loss)
        for tune, won in gain.items():
            name, tuned = f"{prune}-{tune}", f"stages/tune-{prune}-{tune}"
            values = {"prune.method": prune, "tune.method": tune}
            stages, models = {"prune": pruned, "tune": tuned}, {"dense": dense, "pruned": scored}
            models["tuned"] = f"stages/eval-{name}"
            if name == "wanda-spp":
                error = "Not enough memory: 3.1 GiB are missing."
                made.cell(name, values, stages=stages, models=models, status="failed", error=error)
                continue
            if name == "wanda-sqft":
                made.cell(name, values, stages=stages, models=models, status="pending")
                continue
            made.tune(tuned, tune)
            made.score(models["tuned"], "tuned", shares(0.5 - loss + won), 16 + 100 * (loss - won))
            made.cell(name, values, stages=stages, models=models)
    return made.close()
