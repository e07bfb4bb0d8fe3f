"""What two processes do together for test_sharding.py: one start, many jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from two_processes import tune_config

from lors_cli.bench.live_memory import LiveBytes
from lors_cli.errors import UsageError
from lors_cli.machine import processes
from lors_cli.recipe.schema import ModelConfig
from lors_cli.tuning.attach import put_adapters
from lors_cli.tuning.block_merge import BlockMerge
from lors_cli.tuning.stage import sparse_layers, tune
from lors_cli.tuning.training.sharding import load_trainable, shard


def measured(settings: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Peaks of live bytes while a model is loaded into shards and while it is merged; whether shards are right."""
    config = tune_config(settings)
    with LiveBytes([]) as loading:
        network, source = load_trainable(config, ModelConfig(path=model))
        assert source is not None
        before = loading.current
        patterns = sparse_layers(source.weights(), Path(model))
        found = {"outside": before, "detecting": loading.peak - before}
        layers = list(patterns)
        put_adapters(config, network, layers, {})
        shard(network, source, torch.device("cpu"), {})
    found |= {"loading": loading.peak, "held": loading.current}
    stored, rank = load_file(Path(model) / "model.safetensors"), processes.process_index()
    for name in layers:
        local = network.get_submodule(name).weight.to_local()  # type: ignore[union-attr,operator]
        assert torch.equal(local, stored[f"{name}.weight"].chunk(2)[rank]), name
    if rank == 0:
        with LiveBytes([]) as merging:
            BlockMerge(config, source, network, layers, {}).write(folder, patterns)
        found["merging"] = merging.peak
        merged = load_file(folder / "model.safetensors")
        assert merged.keys() == stored.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in stored.items())  # lora_B is zero
    return found


def main(jobs: dict[str, Any], folder: Path) -> None:
    """Every job, in the order of the file; what process N found goes to N.json."""
    with processes.joined():
        for name, (model, settings) in jobs["tune"].items():
            tune(tune_config(settings), ModelConfig(path=model), folder / name)
        model, settings = jobs["refused"]
        try:
            tune(tune_config(settings), ModelConfig(path=model), folder / "refused")
        except UsageError as error:
            refused = error.message
        wide = folder / "wide"
        if processes.is_main():
            wide.mkdir()
        found = {**measured(jobs["wide"][1], jobs["wide"][0], wide), "refused": refused}
    (folder / f"{processes.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
