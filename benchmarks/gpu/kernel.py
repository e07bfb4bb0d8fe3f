"""Step 3: the kernels alone: the merge against a copy, products with packed weights against F.linear.

Timed over several weights in turns, so that none is found in the cache. A product reads the weight; a merge reads W and
writes W_t; tokens and adapters are left out of the bytes, as they stay in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gpu.box import Box, Figures, graphed, seconds_of
from torch.nn import functional as F

from lors_cli.bench.model import _make_two_of_four
from lors_cli.models.packed.format import Packed, pack
from lors_cli.models.packed.kernels import triton_linear
from lors_cli.sparsity import TWO_OF_FOUR
from lors_cli.tuning.kernels import triton_merge
from lors_cli.tuning.kernels.rounding import Rounding

SHAPE, RANK, COPIES, REPEATS = (4096, 14336), 16, 4, 40
TINY_SHAPE = (64, 64)
WAYS: tuple[tuple[str, Rounding], ...] = (
    ("plain", "stochastic"), ("plain", "nearest"), ("packed", "stochastic"), ("packed", "nearest"),
)  # fmt: skip


def block(rows: int, columns: int, warps: int, tiles: int | None = None, stages: int = 1) -> dict[str, int]:
    """A tile's shape; `tiles`: that one program walks over."""
    made = {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    return made if tiles is None else {**made, "TILES": tiles}


BLOCKS = (
    block(64, 64, 8, 1), block(64, 64, 8, 4), block(64, 64, 8, 16), block(64, 64, 4, 8), block(64, 64, 8, 8, 2),
    block(64, 128, 8, 1), block(64, 128, 8, 4), block(64, 128, 16, 8), block(64, 128, 4, 1), block(64, 256, 16, 4),
    block(128, 64, 8, 4), block(128, 64, 16, 4),
)  # fmt: skip
"""Tried besides the one in use."""
BATCHES = (1, 2, 4, 8)
PRODUCTS = (((4096, 14336), 4), ((4096, 4096), 10))
"""Shapes, and how many weights of each: what the packed ones hold is more than an L2 does."""
TINY_PRODUCTS = (((6, 64), 2),)
PRODUCT_BLOCKS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 8))
"""Rows a program and warps beside each other, tried besides the ones in use."""


def copied(box: Box, shape: tuple[int, int]) -> Figures:
    """A copy of such weights: the ceiling."""
    sources = [torch.randn(shape, device=box.device).bfloat16() for _ in range(COPIES)]
    targets = [torch.empty_like(source) for source in sources]
    taken = seconds_of(lambda number: targets[number % COPIES].copy_(sources[number % COPIES]), box.device,
                       REPEATS if not box.rehearse else 1)  # fmt: skip
    return {"seconds": taken, "gb_per_s": 2 * sources[0].nbytes / taken / 1e9}


class Weights:
    """Several weights, plain and packed, with adapters and room for results."""

    def __init__(self, device: torch.device, shape: tuple[int, int], rank: int) -> None:
        torch.manual_seed(0)
        plain = [torch.randn(shape, device=device).bfloat16() for _ in range(COPIES)]
        for weight in plain:
            _make_two_of_four(weight)
        self.bases: dict[str, list[Any]] = {"plain": plain, "packed": [pack(weight, TWO_OF_FOUR) for weight in plain]}
        self.A, self.B = torch.randn(rank, shape[1], device=device), torch.randn(shape[0], rank, device=device) / 100
        self.merged = [torch.empty_like(weight) for weight in plain]

    def timed(self, kind: str, rounding: Rounding, shape: dict[str, int], repeats: int) -> Figures:
        """Seconds and bytes a second of one way, and what the compiled kernel takes."""
        bases = self.bases[kind]
        calls = [triton_merge.launch(base, self.A, self.B, 0.5, merged, rounding, shape)
                 for base, merged in zip(bases, self.merged, strict=True)]  # fmt: skip
        compiled = [triton_merge._merge[grid](**arguments) for grid, arguments in calls[:1]]

        def merge(number: int) -> None:
            grid, arguments = calls[number % COPIES]
            triton_merge._merge[grid](**arguments)

        device = self.merged[0].device
        taken = seconds_of(merge, device, repeats)
        held = bases[0]
        read = held.values.nbytes + held.mask.nbytes if isinstance(held, Packed) else held.nbytes
        figures = {"seconds": taken, "gb_per_s": (read + self.merged[0].nbytes) / taken / 1e9}
        if device.type == "cuda":
            figures |= {"registers": compiled[0].n_regs, "spills": compiled[0].n_spills}
        return figures


class Products:
    """Several 2:4 weights as F.linear takes them, packed by their pattern, or without; no two kinds held at once."""

    def __init__(self, device: torch.device, shape: tuple[int, int], copies: int) -> None:
        torch.manual_seed(0)
        self.device, self.shape = device, shape
        self.weights: list[Any] = [torch.randn(shape, device=device).bfloat16() for _ in range(copies)]
        for weight in self.weights:
            _make_two_of_four(weight)

    def become(self, kind: str) -> None:
        """Dense as they are made; from then on packed, as 2:4 or unstructured."""
        if kind != "dense":
            packed = (weight if isinstance(weight, Packed) else pack(weight, TWO_OF_FOUR) for weight in self.weights)
            self.weights = [replace(weight, pattern=TWO_OF_FOUR if kind == "2:4" else None) for weight in packed]

    def timed(self, tokens: int, block: dict[str, int] | None, repeats: int) -> Figures:
        """Seconds of one product, from a graph of one with every weight, and bytes of the weight a second."""
        x = torch.randn(tokens, self.shape[1], device=self.device).bfloat16()
        y = x.new_empty(tokens, self.shape[0])
        held = self.weights[0]
        if isinstance(held, Packed):
            calls = [triton_linear.launch_linear(x, weight, None, y, block) for weight in self.weights]
            read = held.values.nbytes + held.mask.nbytes

            def run() -> None:
                for grid, arguments in calls:
                    triton_linear._linear[grid](**arguments)
        else:
            read = held.nbytes

            def run() -> None:
                for weight in self.weights:
                    F.linear(x, weight)

        replay = graphed(run, self.device)
        taken = seconds_of(lambda _: replay(), self.device, repeats) / len(self.weights)
        return {"seconds": taken, "gb_per_s": read / taken / 1e9}


def run(box: Box) -> None:
    """The copy and every way to merge, products by batch; last the search for faster blocks, and rank 64."""
    shape, repeats = (SHAPE, REPEATS) if not box.rehearse else (TINY_SHAPE, 1)
    copy, weights = box.item("copy", lambda: copied(box, shape)), Weights(box.device, shape, RANK)

    def merge(name: str, of: Weights, kind: str, rounding: Rounding, tile: dict[str, int] = triton_merge.BLOCK) -> None:
        def measure() -> Figures:
            figures = of.timed(kind, rounding, tile, repeats)
            return {**figures, "of_copy": figures["gb_per_s"] / copy["gb_per_s"] if copy else None}

        box.item(name, measure, needs_s=3 if not box.rehearse else 0.1)

    for kind, rounding in WAYS:
        merge(f"{kind} {rounding}", weights, kind, rounding)
    made = [Products(box.device, *case) for case in (PRODUCTS if not box.rehearse else TINY_PRODUCTS)]
    for products in made:
        for kind in ("dense", "2:4", "unstructured"):
            for tokens in BATCHES:
                product(box, products, kind, tokens)
    for kind, rounding in (("plain", "stochastic"), ("packed", "stochastic")):
        for tile in BLOCKS if not box.rehearse else BLOCKS[:1]:
            merge(f"{kind} {rounding} {'x'.join(map(str, tile.values()))}", weights, kind, rounding, tile)  # type: ignore[arg-type]
    for products in made:
        for kind in ("2:4", "unstructured"):
            for rows, warps in PRODUCT_BLOCKS if not box.rehearse else PRODUCT_BLOCKS[:1]:
                tile = {"ROWS": rows, "OCTETS": 32 * warps, "num_warps": warps}
                product(box, products, kind, 1, tile, f", {rows} rows x {warps} warps")
    if not box.rehearse:
        wide = Weights(box.device, shape, 64)
        for kind, rounding in WAYS[:1] + WAYS[2:3]:
            merge(f"{kind} {rounding} rank 64", wide, kind, rounding)


def product(
    box: Box, weights: Products, kind: str, tokens: int, block: dict[str, int] | None = None, named: str = ""
) -> None:
    """A product by one way; in the block in use it is compared with the dense one."""
    name = f"{weights.shape[0]}x{weights.shape[1]}"
    dense = box.items.get(f"dense {name}, batch {tokens}", {}).get("seconds")
    repeats, needs_s = (REPEATS, 2.0) if not box.rehearse else (1, 0.1)

    def measure() -> Figures:
        weights.become(kind)
        figures = weights.timed(tokens, block, repeats)
        return {**figures, "over_dense": dense / figures["seconds"]} if dense and not named else figures

    box.item(f"{kind} {name}, batch {tokens}{named}", measure, needs_s)
