"""How transformers loads packed checkpoints: its registries know them once `lors_cli` is imported."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lors_cli.errors import UsageError
from lors_cli.grid import GridSpec
from lors_cli.models.packed.format import GRID_VERSION, VERSION, grid_keys, mask_key, specs_of
from lors_cli.models.packed.kernels.choice import why_none
from lors_cli.models.packed.linear import pack_skeleton, packed_linears, unpack_linears
from lors_cli.models.quantised import PACKED
from lors_cli.output import console
from lors_cli.sparsity import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_LOADING = ("dequantize", "device")
"""What says how to load, and is of no file."""


@register_quantization_config(PACKED)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        pattern: N:M that every mask keeps to, or unstructured.
        modules: full names of the packed linears and how many values each keeps; on a grid, how many bytes of codes.
        dequantize: load plain linears, bit for bit those that were packed, as `model.dequantize()` makes them later.
        bits: of the codes; `group_size` inputs of a row share a scale; `symmetric`: no zero points are stored.
        floats: those of `modules` that are packed as values though others are on a grid.
        device: where the model is to compute, if not where it is loaded; of no file.
    """

    def __init__(
        self, version: int = VERSION, pattern: str = "unstructured", modules: dict[str, int] | None = None,
        dequantize: bool = False, bits: int | None = None, group_size: int | None = None,
        symmetric: bool | None = None, floats: list[str] | None = None, device: str | None = None, **_: Any,
    ) -> None:  # fmt: skip
        self.quant_method = PACKED  # type: ignore[assignment]  # transformers' enum has only its own
        self.version, self.pattern, self.modules, self.dequantize = version, pattern, modules or {}, dequantize
        self.bits, self.group_size, self.symmetric, self.floats = bits, group_size, symmetric, floats
        self.device = device
        self.post_init()

    def post_init(self) -> None:
        """Refuse what this version cannot read, or what no file of it says.

        Raises:
            UsageError: saying which.
        """
        if self.version not in (VERSION, GRID_VERSION):
            raise UsageError(f"a packed model of version {self.version}; this lors reads {VERSION} and {GRID_VERSION}.",
                             "pip install --upgrade lors-cli")  # fmt: skip
        named = isinstance(self.modules, dict) and all(
            isinstance(name, str) and type(kept) is int and kept >= 0 for name, kept in self.modules.items()
        )
        if not named:
            raise UsageError("quantization_config: modules is no list of names with their kept values.")
        specs_of(vars(self))
        if not isinstance(self.pattern, str):
            raise UsageError(f"quantization_config: {self.pattern!r} is no sparsity pattern.")

    @property
    def specs(self) -> dict[str, GridSpec]:
        """Grids of the linears that hold codes."""
        return specs_of(vars(self))

    @property
    def structured(self) -> Pattern | None:
        """The pattern N:M; None for unstructured."""
        return None if self.pattern == "unstructured" else Pattern.parse(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        said = {key: value for key, value in vars(self).items() if key not in _OF_LOADING and value is not None}
        return copy.deepcopy(said)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json says: all of it."""
        return self.to_dict()


@register_quantizer(PACKED)
class PackedQuantizer(HfQuantizer):
    """Packed linears in place of those that config.json names, checked once their tensors are there."""

    quantization_config: PackedConfig

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Floats where integers are due stay what they are, and are refused: transformers would cut them off."""
        cast = super().get_new_dtype(converter, param, dtype)
        return cast if cast is None or cast.is_floating_point else None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        pack_skeleton(model, config.modules, config.structured, config.specs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, linear in packed_linears(model).items():
            if linear.weight.is_meta:
                raise UsageError(
                    f"{name} has no room on the devices of device_map, and packed weights are not offloaded.",
                    'Load the model with device_map="cpu", or unpack it: lors pack --unpack',
                )
            for key in ("weight", mask_key("weight"), *grid_keys("weight", linear.spec)):
                if not getattr(getattr(linear, key), "_is_hf_initialized", False):  # as transformers marks what it read
                    raise UsageError(f"{name}.{key} is missing from the checkpoint.", "Pack the model again: lors pack")
            linear.ready(name)
        if self.quantization_config.dequantize:
            unpack_linears(model)
        elif slow := why_unpacked(model, self.quantization_config.device):
            console.warn(f"packed weights are unpacked: {slow}. The model runs at the dense one's speed and memory.")
            unpack_linears(model)
            self.remove_quantization_config(model)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        unpack_linears(model)
        return model

    def is_serializable(self) -> bool:
        """Packed linears are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """`lors tune` trains on packed weights; they themselves stay."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Its operations are torch's."""
        return True


def why_unpacked(model: nn.Module, device: str | None = None) -> str:
    """Why packed linears cannot be computed with as they are, there or where they lie, empty when they can."""
    for name, linear in packed_linears(model).items():
        place = linear.weight.device if device is None else torch.device(device)
        if reason := why_none(place, linear.packed.dtype, linear.spec):
            return f"no kernel for {name}: {reason}"
    return ""
