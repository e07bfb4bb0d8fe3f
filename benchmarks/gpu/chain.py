"""Step 6: the chain for real: SmolLM2 pruned, tuned and scored by the stages a user calls, on this device.

The model lies in parts in .carried or /tmp/carried (carried.py); a rehearsal makes a tiny one. Ten steps are compared
with the CPU's, where `benchmarks/results/gpu-chain-cpu.json` is there (chain.json of `run.py --cpu --only chain`); 300
are for speed and for what they recover. `lors run` through two processes needs two devices, and is not tried here.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu.box import Box, Figures
from gpu.carried import put_together
from gpu.tiny import write_checkpoint
from safetensors.torch import load_file

from lors_cli.evaluation.perplexity import token_perplexity
from lors_cli.models.loading import load_model
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig, TuneConfig, TuneDataConfig

CARRIED = (Path(".carried"), Path("/tmp/carried"))
FEW, MANY = 10, 300


def checkpoint(box: Box, folder: Path) -> Figures:
    """The dense model as a checkpoint folder, and its data."""
    if box.rehearse:
        write_checkpoint(folder, sparse=False)
        return {"model": "tiny"}
    found = [path for path in CARRIED if path.is_dir()]
    if not found:
        raise FileNotFoundError(f"SmolLM2 lies in none of {', '.join(map(str, CARRIED))} (benchmarks/gpu/carried.py)")
    put_together(found[0], folder)
    return {"model": "SmolLM2-135M-Instruct"}


def scored(box: Box, folder: Path, windows: torch.Tensor) -> Figures:
    """Perplexity of a checkpoint."""
    model = load_model(ModelConfig(path=str(folder), dtype="bfloat16", device=box.device.type))
    found = token_perplexity(model, windows, batch_size=8)
    return {"perplexity": found["value"], "nll": found["nll"], "tokens": found["tokens"]}


def tuning(dense: Path, num_steps: int, rehearse: bool) -> TuneConfig:
    """LoRS with its defaults, on instructions."""
    return TuneConfig(
        rank=16, alpha=16, learning_rate=1e-3, max_steps=num_steps, batch_size=16, per_device_batch_size=8,
        warmup_steps=num_steps // 10, save_steps=num_steps, merged_cache="on",
        data=TuneDataConfig(dataset=str(dense / "train.jsonl"), max_length=32 if rehearse else 256),
    )  # fmt: skip


def run(box: Box) -> None:
    """Dense, pruned, tuned a little, tuned."""
    with tempfile.TemporaryDirectory() as name:
        _run(box, Path(name))


def _run(box: Box, work: Path) -> None:
    from lors_cli.pruning.stage import prune
    from lors_cli.tuning.stage import tune

    dense = work / "dense"
    if box.item("model", lambda: checkpoint(box, dense)) is None:
        return
    windows = load_file(dense / "windows.safetensors")["input_ids"].long()
    box.item("dense", lambda: scored(box, dense, windows))

    def pruned() -> Figures:
        config = PruneConfig(
            method="sparsegpt", calibration=CalibrationConfig(dataset=str(dense / "calibration.safetensors"))
        )
        record = prune(config, _source(box, dense), work / "pruned")
        return {"elapsed_s": record.elapsed_s, "phases_s": record.metrics["phases_s"],
                "violations": record.metrics["violations"], **scored(box, work / "pruned", windows)}  # fmt: skip

    def tuned(num_steps: int) -> Figures:
        out = work / f"tuned-{num_steps}"
        record = tune(tuning(dense, num_steps, box.rehearse), _source(box, work / "pruned"), out)
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        metrics: dict[str, Any] = record.metrics
        return {"elapsed_s": record.elapsed_s, "tokens_per_s": metrics["tokens_per_s"], "losses": losses[:FEW],
                "last_loss": metrics["last_loss"], "violations": metrics["violations"],
                **scored(box, out, windows)}  # fmt: skip

    if box.item("pruned", pruned, 20 if not box.rehearse else 1) is None:
        return
    box.item(f"tuned {FEW}", lambda: tuned(FEW if not box.rehearse else 2), 15 if not box.rehearse else 1)
    if not box.cpu:
        box.item(f"tuned {MANY}", lambda: tuned(MANY if not box.rehearse else 3), 40 if not box.rehearse else 1)


def _source(box: Box, folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="bfloat16", device=box.device.type)  # type: ignore[arg-type]
