"""Quantised checkpoints: how one is known, and whether transformers can make its weights plain again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lors_cli.errors import MissingError, UsageError
from lors_cli.models.checks import is_installed

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the number formats that plain weights are in."""
PACKED = "lors_packed"
"""`quant_method` of what `lors pack` writes."""
BITSANDBYTES = "bitsandbytes"
DEQUANTISED: dict[str, tuple[str, ...]] = {
    "fp8": (), "mxfp8": (), "mxfp4": (), "compressed-tensors": ("compressed_tensors",), BITSANDBYTES: ("bitsandbytes",),
    PACKED: (),
}  # fmt: skip
"""What transformers turns back into plain weights, on any device: `quant_method` and the packages that it needs."""
DENSE_HINT = (
    "Give the checkpoint in bfloat16, float16 or float32 that it was made from; on the hub its page names it as the "
    "base model."
)

LEFT_BY_QUANTISING = re.compile(
    r"(scales?|scale_inv|scale_2|amax|zero_point|zeros|qweight|weight_mask|g_idx|weight_packed|bitmask|compressed|absmax|quant_map"
    r"|SCB|weight_format)$|\.quant_state\."
)
"""What scales, zero points and packed weights are called; not all that is called so is one."""


@dataclass(frozen=True)
class Quantised:
    """How config.json says that the weights are stored."""

    method: str
    settings: dict[str, Any]

    @property
    def what(self) -> str:
        """What that is, in words."""
        return "packed" if self.method == PACKED else f"quantised ({self.method})"

    @classmethod
    def of(cls, settings: Any) -> Quantised | None:
        """From a transformers configuration; None where it says nothing of the kind."""
        found = getattr(settings, "quantization_config", None) or getattr(settings, "compression_config", None)
        if found is None:
            return None
        values = found if isinstance(found, dict) else found.to_dict()
        return cls(str(values.get("quant_method", "unknown")), values)

    def check_method(self, path: str) -> None:
        """Refuse a kind that transformers cannot turn back into plain weights, before any weight is there.

        Args:
            path: names the checkpoint in messages.

        Raises:
            UsageError: it has no way to.
            MissingError: a package that it needs for that is not installed.
        """
        if self.method not in DEQUANTISED:
            raise UsageError(f"{path} is quantised ({self.method}); lors needs the weights themselves.", DENSE_HINT)
        lacking = [name.replace("_", "-") for name in DEQUANTISED[self.method] if not is_installed(name)]
        if lacking:
            raise MissingError(
                f"{path} is quantised ({self.method}); {' and '.join(lacking)}, which turns it back into plain "
                "weights, is not installed.",
                f"pip install {' '.join(lacking)}, or give the checkpoint that it was made from.",
            )

    def check(self, tensors: dict[str, Any], path: str) -> None:
        """Refuse files that transformers would not turn back into the weights that they stand for.

        Args:
            tensors: of the files, as safetensors' slices.

        Raises:
            UsageError: saying which, or that the weights are plain ones.
        """
        if self.method != PACKED and all(
            tensor.get_dtype() in FLOATS and not LEFT_BY_QUANTISING.search(key) for key, tensor in tensors.items()
        ):
            raise UsageError(
                f"{path}: config.json says that the weights are quantised ({self.method}), and the files hold plain "
                "ones.",
                "Take quantization_config out of config.json.",
            )
        if self.method in ("fp8", "mxfp8"):
            self._check_fp8(tensors, path)
        if self.method == "compressed-tensors":
            self._check_compressed(tensors, path)
        if self.method == BITSANDBYTES:
            self._check_bitsandbytes(tensors, path)

    def _check_fp8(self, tensors: dict[str, Any], path: str) -> None:
        """Refuse FP8 that transformers would load as other weights without a word.

        It knows some names of scales, and takes blocks that do not fill a weight for smaller ones.
        """
        sides: list[int] = self.settings.get("weight_block_size") or []
        for key, tensor in tensors.items():
            if not (key.endswith("weight") and tensor.get_dtype().startswith("F8_")):
                continue
            stem = key.removesuffix("weight")
            scale = next((tensors[name] for name in (f"{key}_scale_inv", f"{stem}scale", f"{stem}qscale_weight")
                          if name in tensors), None)  # fmt: skip
            if scale is None:
                raise UsageError(f"{path}: {key} is FP8 without a scale that transformers knows.", DENSE_HINT)
            shape, grid = tensor.get_shape(), scale.get_shape()
            if len(grid) == len(sides) == 2 and any(
                size % n or (n > 1 and size // n != side) for size, n, side in zip(shape, grid, sides, strict=True)
            ):
                raise UsageError(
                    f"{path}: {key} ({shape[0]} × {shape[1]}) is in FP8 blocks of {sides[0]} × {sides[1]} that do not "
                    "fill it, which transformers cannot turn back into plain weights.",
                    DENSE_HINT,
                )

    def _check_bitsandbytes(self, tensors: dict[str, Any], path: str) -> None:
        """Refuse 4-bit blocks that go over the ends of rows, of which its CPU code (0.50) makes other numbers."""
        for key, tensor in tensors.items():
            if ".quant_state." in key:
                state = json.loads(bytes(tensor[:].tolist()))
                if state["shape"][-1] % state["blocksize"]:
                    raise UsageError(
                        f"{path}: {key.partition('.quant_state.')[0]} has rows of {state['shape'][-1]} in blocks of "
                        f"{state['blocksize']}, which bitsandbytes does not turn back into plain weights on a CPU.",
                        DENSE_HINT,
                    )

    def _check_compressed(self, tensors: dict[str, Any], path: str) -> None:
        """Refuse compressed-tensors that transformers would load as other weights without a word.

        It takes one kind of numbers for all linears but experts, and columns for being in their order.
        """
        odd = next((key for key in sorted(tensors) if key.endswith(("_g_idx", ".bitmask", ".compressed"))), None)
        if odd is not None:
            what = "columns out of their order" if odd.endswith("_g_idx") else "kept values and where they stand"
            raise UsageError(f"{path} holds {what} ({odd}), which transformers does not undo.", DENSE_HINT)
        groups: dict[str, Any] = self.settings.get("config_groups") or {}
        kinds = [
            {"weights": group.get("weights"), "format": group.get("format") or self.settings.get("format")}
            for group in groups.values()
            if not any(target.startswith("re:") and "experts" in target for target in group.get("targets", ()))
        ]
        if any(kind != kinds[0] for kind in kinds):
            raise UsageError(
                f"{path} is quantised in several ways ({', '.join(groups)}); transformers takes one for all.",
                DENSE_HINT,
            )
