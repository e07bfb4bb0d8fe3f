"""What the linear layers of all tuning methods share."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from lors_cli.grid import Grid, GridSpec
from lors_cli.tuning.kernels.rounding import Rounding


class AdapterLinear(nn.Module):
    """A frozen linear with a trainable low-rank update; at its start it computes what the linear did.

    Args:
        linear: (C → R); its weight and bias are taken over, not copied, and frozen.
        use_rslora: scale s = alpha/√r (rsLoRA, arXiv:2312.03732), else alpha/r.
        grid: that the weight lies on, where it does.

    `lora_A` (r, C) is drawn Kaiming-uniform and `lora_B` (R, r) is zero, both float32 (float64 for a float64 weight).
    """

    keeps_zeros = True
    """Whether the merged weight is zero wherever the base is."""

    rounding: Rounding = "nearest"
    """Of merged weights to bfloat16, or to a grid."""
    quantization_aware = False
    """Whether the merged weight is rounded to the grid that the weight lies on."""
    grid_spec: GridSpec | None = None
    grid_scales: torch.Tensor
    grid_zeros: torch.Tensor | None

    weight: torch.Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, *, use_rslora: bool = True, grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        linear.requires_grad_(False)
        if grid is not None:
            self.take_grid(grid, linear.weight.device)
        self.take_weight(linear.weight)
        self.bias = linear.bias
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        self.make_adapters()

    def take_weight(self, weight: torch.Tensor) -> None:
        """Hold the linear's weight, so that `self.weight` gives it."""
        self.weight = weight

    def take_grid(self, grid: Grid, device: torch.device) -> None:
        """Hold the weight's grid, so that `self.base_grid` gives it."""
        self.grid_spec = grid.spec
        self.register_buffer("grid_scales", grid.scales.to(device), persistent=False)
        self.register_buffer("grid_zeros", None if grid.zeros is None else grid.zeros.to(device), persistent=False)

    @property
    def base_grid(self) -> Grid | None:
        """What the weight lies on."""
        return None if self.grid_spec is None else Grid(self.grid_spec, self.grid_scales, self.grid_zeros)

    @property
    def grid(self) -> Grid | None:
        """What the merged weight is rounded to; None where it leaves its grid, or has none."""
        return self.base_grid if self.quantization_aware else None

    def make_adapters(self) -> None:
        """Draw `lora_A` and `lora_B`, on the CPU: the draw is the same wherever the weight is."""
        like = self.weight
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        drawn = torch.empty(self.rank, self.in_features, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(like.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.rank, dtype=dtype, device=like.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R): one product with the merged weight, its gradients left to autograd."""
        return F.linear(x.to(self.weight.dtype), self.merged_weight(), self.bias)

    def merged_weight(self) -> torch.Tensor:
        """The weight that gives the layer's outputs as an ordinary linear, (R, C) in the base's dtype."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """An ordinary linear with the merged weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scale={self.scale:g}"
        )
