"""A linear whose sparse weight stays packed, and how a network's linears are exchanged for such."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lors_cli.errors import UsageError
from lors_cli.grid import Grid, GridSpec
from lors_cli.models.packed.format import PADDING, Packed, check, mask_words, row_starts
from lors_cli.models.packed.kernels.choice import linear, unpack
from lors_cli.sparsity import Pattern


class PackedLinear(nn.Module):
    """Y = X·Wᵀ + bias with W (R, C) held as its kept values, or their codes on a grid, and their mask.

    Args:
        num_stored: values of the weight that are kept, or bytes of their codes.
        pattern: N:M that its mask keeps to, None where rows keep what they like.
        plain: class of the linear that it stands for (Falcon has its own).
        spec: what the grid looks like; None where values are held.
    """

    weight_scale: nn.Parameter | None
    weight_zero: nn.Parameter | None
    starts: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, num_stored: int, *, bias: bool = False,
        pattern: Pattern | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        plain: type[nn.Linear] = nn.Linear, spec: GridSpec | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.plain, self.spec = pattern, plain, spec

        def frozen(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        groups = (out_features, spec.num_groups(in_features)) if spec is not None else ()
        self.weight = frozen(num_stored + PADDING, dtype=torch.uint8 if spec is not None else dtype)
        self.weight_mask = frozen(out_features, mask_words(in_features), dtype=torch.int32)
        self.register_parameter("weight_scale", frozen(*groups) if groups else None)
        has_zeros = spec is not None and not spec.symmetric
        self.register_parameter("weight_zero", frozen(*groups, dtype=torch.uint8) if has_zeros else None)
        self.register_parameter("bias", frozen(out_features) if bias else None)

    @classmethod
    def of(cls, packed: Packed, bias: torch.Tensor | None = None) -> PackedLinear:
        """Of a packed weight."""
        (rows, columns), grid = packed.shape, packed.grid
        made = cls(columns, rows, len(packed.values) - PADDING, bias=bias is not None, pattern=packed.pattern,
                   device="meta", spec=None if grid is None else grid.spec)  # fmt: skip
        tensors = {"weight": packed.values, "weight_mask": packed.mask, "bias": bias}
        if grid is not None:
            tensors |= {"weight_scale": grid.scales, "weight_zero": grid.zeros}
        for name, tensor in tensors.items():
            setattr(made, name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
        made.register_buffer("starts", packed.starts, persistent=False)
        return made

    def ready(self, name: str) -> None:
        """Check what was loaded into it, and find where rows start.

        Raises:
            UsageError: naming the weight and what is wrong with it.
        """
        check(name, self.weight, self.weight_mask, (self.out_features, self.in_features), self.pattern, grid=self.grid)
        self.register_buffer("starts", row_starts(self.weight_mask, self.spec), persistent=False)
        self.requires_grad_(False)

    @property
    def grid(self) -> Grid | None:
        """What its codes stand for; None where values are held."""
        if self.spec is None or self.weight_scale is None:
            return None
        return Grid(self.spec, self.weight_scale, self.weight_zero)

    @property
    def packed(self) -> Packed:
        """The weight as it is held."""
        return Packed(self.weight, self.weight_mask, self.starts, self.in_features, self.pattern, self.grid)

    def unpacked(self) -> nn.Linear:
        """The plain linear."""
        linear = self.plain(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(unpack(self.packed), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, R)."""
        return linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """What `repr` says of it."""
        kept = f"{(len(self.weight) - PADDING) / (self.in_features * self.out_features):.1%} kept"
        if self.spec is not None:
            kept = f"{self.spec.bits} bits in groups of {self.spec.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def pack_skeleton(
    model: nn.Module, modules: dict[str, int], pattern: Pattern | None, specs: Mapping[str, GridSpec]
) -> None:
    """Put packed linears in place of a network's, whose weights are not there yet.

    Args:
        modules: full names, as a file gives them, and how many values, or bytes of codes, each holds.
        specs: grids of those that hold codes.

    Raises:
        UsageError: a name is that of no linear, or one keeps more than it has places.
    """
    if not modules:
        raise UsageError("quantization_config of a packed model names no modules with their kept values.")
    for name, stored in modules.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or stored > linear.weight.numel():
            raise UsageError(f"quantization_config names {name} with {stored:,} values, no linear of this model.")
        model.set_submodule(name, PackedLinear(
            linear.in_features, linear.out_features, stored, bias=linear.bias is not None, pattern=pattern,
            dtype=linear.weight.dtype, device="meta", plain=type(linear), spec=specs.get(name),
        ))  # fmt: skip


def unpack_linears(model: nn.Module) -> None:
    """Make the packed linears of a model plain ones, in place; one at a time."""
    for name in list(packed_linears(model)):
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        model.set_submodule(name, packed.unpacked())
