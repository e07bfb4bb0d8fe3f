"""A linear whose sparse weight stays packed, and how a network's linears are exchanged for such."""

from __future__ import annotations

import torch
from torch import nn

from lors_cli.errors import UsageError
from lors_cli.models.packed.format import PADDING, Packed, check, mask_words, row_starts
from lors_cli.models.packed.kernels.choice import linear, unpack
from lors_cli.sparsity import Pattern


class PackedLinear(nn.Module):
    """Y = X·Wᵀ + bias with W (R, C) held as its kept values and their mask.

    Args:
        num_kept: values of the weight that are kept.
        pattern: N:M that its mask keeps to, None where rows keep what they like.
        plain: class of the linear that it stands for (Falcon has its own).
    """

    starts: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, num_kept: int, *, bias: bool = False,
        pattern: Pattern | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        plain: type[nn.Linear] = nn.Linear,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.plain = pattern, plain

        def frozen(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = frozen(num_kept + PADDING)
        self.weight_mask = frozen(out_features, mask_words(in_features), dtype=torch.int32)
        self.register_parameter("bias", frozen(out_features) if bias else None)

    @classmethod
    def of(cls, packed: Packed, bias: torch.Tensor | None = None) -> PackedLinear:
        """Of a packed weight."""
        rows, columns = packed.shape
        made = cls(columns, rows, len(packed.values) - PADDING, bias=bias is not None, pattern=packed.pattern,
                   device="meta")  # fmt: skip
        tensors = {"weight": packed.values, "weight_mask": packed.mask, "bias": bias}
        for name, tensor in tensors.items():
            setattr(made, name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
        made.register_buffer("starts", packed.starts, persistent=False)
        return made

    def ready(self, name: str) -> None:
        """Check what was loaded into it, and find where rows start.

        Raises:
            UsageError: naming the weight and what is wrong with it.
        """
        check(name, self.weight, self.weight_mask, (self.out_features, self.in_features), self.pattern)
        self.register_buffer("starts", row_starts(self.weight_mask), persistent=False)
        self.requires_grad_(False)

    @property
    def packed(self) -> Packed:
        """The weight as it is held."""
        return Packed(self.weight, self.weight_mask, self.starts, self.in_features, self.pattern)

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
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def pack_skeleton(model: nn.Module, modules: dict[str, int], pattern: Pattern | None) -> None:
    """Put packed linears in place of a network's, whose weights are not there yet.

    Args:
        modules: full names, as a file gives them, and how many values each keeps.

    Raises:
        UsageError: a name is that of no linear, or one keeps more than it has places.
    """
    if not modules:
        raise UsageError("quantization_config of a packed model names no modules with their kept values.")
    for name, kept in modules.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or kept > linear.weight.numel():
            raise UsageError(f"quantization_config names {name} with {kept:,} values, no linear of this model.")
        model.set_submodule(name, PackedLinear(
            linear.in_features, linear.out_features, kept, bias=linear.bias is not None, pattern=pattern,
            dtype=linear.weight.dtype, device="meta", plain=type(linear),
        ))  # fmt: skip


def unpack_linears(model: nn.Module) -> None:
    """Make the packed linears of a model plain ones, in place; one at a time."""
    for name in list(packed_linears(model)):
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        model.set_submodule(name, packed.unpacked())
