"""Training the scales and shifts of normalisation layers beside the adapters.

A normalisation's parameter p becomes p + u·shift, rounded to its own dtype, with p frozen, the shift in float32 and u
the root mean square of p: small steps add up in the shift and are not lost in a bfloat16 parameter, and one learning
rate fits layers whose scales are near 0.02 and near 2.

Source: PERP §3.1, arXiv:2312.15230.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize


class NormShift(nn.Module):
    """What is added to one parameter (hidden_size,) of a normalisation layer."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.shift = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=parameter.device))
        self.unit = float(parameter.detach().to(dtype).square().mean().sqrt()) or 1.0  # a bias may be all zeros

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter as the layer uses it, in its own dtype."""
        return torch.add(parameter.to(self.shift.dtype), self.shift, alpha=self.unit).to(parameter.dtype)


def norm_parameters(model: nn.Module) -> list[str]:
    """Full names of the parameters of a model's normalisation layers.

    A normalisation layer is a module that owns a one-dimensional weight, whatever it is called.
    """
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None and weight.ndim == 1
        for key in ("weight", "bias")
        if module._parameters.get(key) is not None
    ]


def train_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Give parameters of normalisation layers a trained shift, in place; an AttributeError if one is not there."""
    for name in names:
        path, _, key = name.rpartition(".")
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        parametrize.register_parametrization(model.get_submodule(path), key, NormShift(parameter))


def trained_norms(model: nn.Module) -> dict[str, NormShift]:
    """What makes the trained norms of a model out of its frozen ones, by full name of the parameter."""
    found = {}
    for name, module in model.named_modules():
        for key, steps in getattr(module, "parametrizations", {}).items():
            if isinstance(steps[0], NormShift):
                found[f"{name}.{key}"] = steps[0]
    return found


def norm_shifts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained shifts of a model, (hidden_size,) each, by full name of the parameter they are added to."""
    return {name: norm.shift for name, norm in trained_norms(model).items()}


def merge_norms(model: nn.Module) -> None:
    """Make every trained norm an ordinary one with the very parameter of the forward pass, in place."""
    for name in norm_shifts(model):
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        with torch.no_grad():
            merged = getattr(module, key).detach().clone()
        parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        module._parameters[key] = nn.Parameter(merged, requires_grad=False)
