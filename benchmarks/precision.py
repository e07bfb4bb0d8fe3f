"""What bfloat16 weights cost LoRS: how much of the adapters' update survives rounding, and what that does to the loss.

python benchmarks/precision.py --data-dir DATA --work FOLDER --calibration FILE --out results.json

SmolLM2-135M, SparseGPT 2:4, tuned on Alpaca with the settings of `quality.py` (whose `--work` may be shared: what it
has pruned and tuned is taken over), at every learning rate of `--rates`, with a bfloat16 base whose merged weights are
rounded to the nearest or stochastically, and with a float32 base of the same values, where nothing is rounded: that
bounds what any remedy could bring. Every adapter is then merged in all three ways and scored on held-out responses.

Of a bfloat16 run's merge, over the kept weights: `changed`, the share that differ from the base; `realised`, the norm
of the update that is there over that of the update that is meant; `cosine` between the two. Their product is the share
of the meant update that is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import add_places, require_places
from quality import METHODS, Figures, Sweep, held_out_loss

from lors_cli.files import atomic
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.recipe.schema import Dtype, ModelConfig
from lors_cli.tuning.adapter import load_adapter
from lors_cli.tuning.attach import adapter_layers
from lors_cli.tuning.kernels.rounding import Rounding
from lors_cli.tuning.merge import merge_counted

RATES = (2e-5, 1e-3)
FLOAT32 = "lors-float32"
BASES = {"lors": "bfloat16, nearest", "lors-stochastic": "bfloat16, stochastic", FLOAT32: "float32"}
MERGES: tuple[tuple[str, Dtype, Rounding], ...] = (
    ("nearest", "bfloat16", "nearest"), ("stochastic", "bfloat16", "stochastic"), ("float32", "float32", "nearest"),
)  # fmt: skip


def with_adapter(base: Path, tuned: Path, dtype: Dtype, rounding: Rounding | None = None) -> Any:
    """The sparse model in a dtype with the adapter of a tuned folder on it, rounded as in training or as given."""
    model = load_adapter(load_model(ModelConfig(path=str(base), dtype=dtype)), tuned / "adapter")
    for layer in adapter_layers(model).values():
        layer.rounding = rounding or layer.rounding  # type: ignore[assignment]
    return model


@torch.no_grad()
def surviving(base: Path, tuned: Path) -> Figures:
    """How much of a bfloat16 run's update its merge holds.

    Args:
        base: the sparse model, bfloat16.
        tuned: stage folder.
    """
    kept = changed = 0
    meant_square = real_square = product = 0.0
    for layer in adapter_layers(with_adapter(base, tuned, "bfloat16")).values():
        mask = layer.weight != 0
        meant = (layer.scale * (layer.lora_B @ layer.lora_A))[mask].double()
        real = (layer.merged_weight().float() - layer.weight.float())[mask].double()
        kept += int(mask.sum())
        changed += int((real != 0).sum())
        meant_square += float(meant.square().sum())
        real_square += float(real.square().sum())
        product += float(meant @ real)
    return {
        "changed": round(changed / kept, 5),
        "realised": round((real_square / meant_square) ** 0.5, 5),
        "cosine": round(product / (real_square * meant_square) ** 0.5, 5),
    }


def merged_losses(sweep: Sweep, base: Path, tuned: Path) -> Figures:
    """Held-out loss of an adapter merged in bfloat16, rounded in both ways, and in float32, products in the same."""
    losses = {}
    for name, dtype, rounding in MERGES:
        model = with_adapter(base, tuned, dtype, rounding)
        merge_counted(model)
        folder = sweep.work / "merged"
        model.save_pretrained(folder)
        load_tokenizer(ModelConfig(path=str(base))).save_pretrained(folder)
        losses[name] = round(held_out_loss(folder, sweep.held_out), 5)
    return losses


def measure(sweep: Sweep, rates: list[float], methods: list[str]) -> None:
    """Every cell that the results file does not hold."""
    base = sweep.pruned("sparsegpt")
    for rate in rates:
        for method in methods:

            def cell(method: str = method, rate: float = rate) -> Figures:
                tuned = sweep.tuned(method, "sparsegpt", rate, 0)
                figures = {"held_out_loss": merged_losses(sweep, base, tuned)}
                return figures if method == FLOAT32 else {**figures, **surviving(base, tuned)}

            sweep.cell(f"{method} {rate:g}", cell)


def table(cells: dict[str, Figures]) -> Iterator[str]:
    """The cells as Markdown."""
    yield "| learning rate | in training | changed | realised | cosine | nearest merge | stochastic | float32 |"
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    for name, figures in cells.items():
        method, rate = name.split()
        columns = [f"{figures[key]:.3f}" if key in figures else "" for key in ("changed", "realised", "cosine")]
        columns += [f"{figures['held_out_loss'][name]:.4f}" for name, _, _ in MERGES]
        yield f"| {rate} | {BASES[method]} | " + " | ".join(columns) + " |"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    add_places(parser)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--methods", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    require_places(parser, options)
    options.budget = None
    METHODS["lors-stochastic"] = {**METHODS["lors"], "rounding": "stochastic"}
    METHODS[FLOAT32] = {**METHODS["lors"], "dtype": "float32"}
    measure(Sweep(options), options.rates, options.methods)
    print("\n".join(table(atomic.read_json(options.out))))


if __name__ == "__main__":
    main()
