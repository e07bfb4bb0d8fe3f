"""The run in at most 60 lines: what is right, what the goals came to, and where the figures are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
LINES = 60
BLOCKS = 32
ROWS, TOKENS_A_ROW, EPOCHS = 52002, 120, 3
"""Of the flagship recipe: Alpaca's rows, about so many tokens each."""
CPU_CHAIN = Path(__file__).resolve().parents[1] / "results/gpu-chain-cpu.json"
MAIN_CELL = "2048 tokens, rank 16"


def summary(document: Figures, steps: dict[str, Figures]) -> str:
    """The text.

    Args:
        document: of run.json.
        steps: items by step.
    """
    lines = [f"{document['device']}, torch {document['torch']}, transformers {document['transformers']}"]
    writers = {
        "right": _right,
        "steps": _steps,
        "kernel": _kernel,
        "decode": _decode,
        "pruning": _pruning,
        "chain": _chain,
    }
    for name, ended in document["steps"].items():
        items = steps.get(name, {})
        lines.append(f"== {name}: {ended['ended']}, {ended['elapsed_s']:.0f} of {ended['box_s']:.0f} s")
        lost = [f"   {item}: {found.get('failed') or 'left out: ' + found['left_out']}"[:150]
                for item, found in sorted(items.items(), key=lambda named: "failed" not in named[1])
                if "failed" in found or "left_out" in found]  # fmt: skip
        shown = lost[:4] + ([f"   and {len(lost) - 4} more without figures"] if len(lost) > 4 else [])
        lines += [f"   {line}" for line in writers[name](items)] + shown
    lines += _hours(steps)
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], "… the rest is in the .json files"])


def _right(items: Figures) -> list[str]:
    if not items:
        return ["no check was begun"]
    missing = [name for name, found in items.items() if "left_out" in found]
    good = sum("failed" not in found for found in items.values()) - len(missing)
    return [f"{good} of {len(items)} checks are right" + (f"; missing: {', '.join(missing)}" if missing else "")]


def _goal(text: str, value: float, limit: float, *, at_most: bool) -> str:
    met = value <= limit if at_most else value >= limit
    return f"{text} {value:.3f} (goal {'≤' if at_most else '≥'} {limit:g}: {'met' if met else 'MISSED'})"


def _steps(items: Figures) -> list[str]:
    cells: dict[str, dict[str, Figures]] = items.get("compared", {})
    lines = [f"{cell}: " + "  ".join(f"{method} {row['step_s'] * 1000:.1f} ms {row['peak_gib']:.1f} GiB"
                                     for method, row in rows.items())
             for cell, rows in cells.items()]  # fmt: skip
    rows = cells.get(MAIN_CELL, {})
    lors = rows.get("lors")
    if lors and "over_lora" in lors:
        lines.append(_goal("step, LoRS / LoRA", lors["over_lora"], 1.0, at_most=True))
        if "lors-cached" in rows:
            lines.append(_goal("step, LoRS kept / LoRA", rows["lors-cached"]["over_lora"], 1.0, at_most=True))
        lines.append(f"peak, LoRS / LoRA with bfloat16 adapters {lors['peak_gib'] / rows['lora']['peak_gib']:.3f}")
    if lors and "lora-float32" in rows:
        quotient = lors["peak_gib"] / rows["lora-float32"]["peak_gib"]
        lines.append(_goal("peak, LoRS / LoRA with float32 adapters, as LoRS's", quotient, 1.0, at_most=True))
    if lors and "spp-gc" in rows:
        lines.append(_goal("throughput, LoRS / SPP-gc", rows["spp-gc"]["step_s"] / lors["step_s"], 1.6, at_most=False))
    if lors and "sqft" in rows:
        lines.append(_goal("peak, LoRS / SQFT", lors["peak_gib"] / rows["sqft"]["peak_gib"], 0.6, at_most=True))
    return lines


def _kernel(items: Figures) -> list[str]:
    timed = {name: found for name, found in items.items() if "gb_per_s" in found}
    ways = ("copy", "plain nearest", "plain stochastic", "packed nearest", "packed stochastic",
            "plain stochastic rank 64", "packed stochastic rank 64")  # fmt: skip
    lines = ["  ".join(f"{name} {timed[name]['gb_per_s']:.0f} GB/s" for name in ways if name in timed)]
    for way in ("plain stochastic", "packed stochastic"):
        tried = {
            name: found["gb_per_s"] for name, found in timed.items() if name.startswith(way) and "rank" not in name
        }
        if tried:
            best = max(tried, key=tried.__getitem__)
            lines.append(f"fastest {best}: {tried[best]:.0f} GB/s (rows x columns x warps x stages x tiles)")
    for shape in ("4096x14336", "4096x4096"):
        for kind in ("2:4", "unstructured"):
            if quotients := _over_dense(items, f"{kind} {shape}, batch"):
                lines.append(f"{kind} {shape} over F.linear by batch: {quotients}")
    best_block = {name: found["gb_per_s"] for name, found in timed.items() if "batch 1" in name and "dense" not in name}
    if best_block:
        best = max(best_block, key=best_block.__getitem__)
        lines.append(f"fastest product {best}: {best_block[best]:.0f} GB/s")
    if "over_dense" in items.get("2:4 4096x14336, batch 1", {}):
        quotient = items["2:4 4096x14336, batch 1"]["over_dense"]
        lines.append(_goal("product, 2:4 / F.linear, batch 1", quotient, 1.5, at_most=False))
    return lines


def _over_dense(items: Figures, prefix: str) -> str:
    """Of the items that begin so, which end in the batch: how many times faster than dense they are."""
    return "  ".join(f"{name.rpartition(' ')[2]}: {found['over_dense']:.2f}" for name, found in items.items()
                     if name.startswith(prefix) and "over_dense" in found)  # fmt: skip


def _decode(items: Figures) -> list[str]:
    items = {name: found for name, found in items.items() if "failed" not in found}
    dense = [f"batch {name.rpartition(' ')[2]}: {found['tokens_per_s']:.0f}" for name, found in items.items()
             if name.startswith("dense") and "tokens_per_s" in found]  # fmt: skip
    lines = [f"Llama-3-8B's shape, dense, tokens/s: {'  '.join(dense)}"] if dense else []
    for kind in ("2:4", "unstructured"):
        if quotients := _over_dense(items, f"{kind}, batch"):
            lines.append(f"{kind} over dense by batch: {quotients}")
    if "over_dense" in items.get("2:4, batch 1", {}):
        lines.append(_goal("decode, 2:4 / dense, batch 1", items["2:4, batch 1"]["over_dense"], 1.5, at_most=False))
    return lines


def _pruning(items: Figures) -> list[str]:
    lines = ["  ".join(f"{arm} {found['pruning_s']:.2f} s {found['peak_gib'] or 0:.1f} GiB"
                       for arm, found in items.items() if "pruning_s" in found)]  # fmt: skip
    for method, row in items.get("compared", {}).items():
        equal = f", equal masks ≥ {min(row['equal_masks'].values()):.4f}" if "equal_masks" in row else ""
        quotients = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "equal_masks")
        lines.append(f"{method}: {quotients}{equal}")
    return lines


def _chain(items: Figures) -> list[str]:
    cpu = json.loads(CPU_CHAIN.read_text()) if CPU_CHAIN.is_file() else {}
    lines = [] if cpu else [f"no figures of a CPU to compare with ({CPU_CHAIN.name}): the goal of 1 % is not judged"]
    for name, found in items.items():
        if "perplexity" in found:
            speed = f", {found['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in found else ""
            lines.append(f"{name}: perplexity {found['perplexity']:.3f}{speed}")
            if "perplexity" in cpu.get(name, {}):
                there = cpu[name]["perplexity"]
                far = abs(found["perplexity"] / there - 1)
                lines[-1] = _goal(f"{lines[-1]}, on the CPU {there:.3f}, apart", far, 0.01, at_most=True)
    return [*lines, "lors run through two processes needs two GPUs: not tried"]


def _hours(steps: dict[str, Figures]) -> list[str]:
    """The flagship recipe's hours without its evaluation, from one block and from the step at 512 tokens."""
    block = steps.get("pruning", {}).get("lors sparsegpt", {}).get("elapsed_s")
    row = steps.get("steps", {}).get("compared", {}).get("512 tokens, rank 16", {}).get("lors")
    lines = []
    if block:
        lines.append(
            f"llama3-8b-2of4: SparseGPT about {block * BLOCKS / 3600:.2f} h ({BLOCKS} blocks, nothing written)"
        )
    if row:
        tokens = ROWS * TOKENS_A_ROW * EPOCHS
        lines.append(
            f"llama3-8b-2of4: LoRS about {tokens * row['step_s'] / 512 / 3600:.1f} h ({tokens / 1e6:.0f} M tokens)"
        )
    return lines
