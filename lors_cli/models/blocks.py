"""What can be pruned in a decoder block: linears, Conv1D and each expert of a mixture, all of them as matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Children of a mixture of experts that say which experts a token goes to; they stay dense."""
STREAM_MIXERS = ("altup",)
"""Children of a block that say how its streams of hidden states are mixed (Gemma 3n), four by four; they stay dense."""


@dataclass(frozen=True)
class PrunableWeight:
    """One matrix of a decoder block: a module's whole parameter, or one expert's slice of it.

    Args:
        name: full name, “model.layers.0.mlp.up_proj” or “model.layers.0.mlp.experts.3.gate_up_proj”.
        module: that holds the parameter.
        key: the parameter's name in the module.
        expert: which slice of a 3-D parameter; None where the parameter is the matrix.
        transposed: whether it is stored (in_features, out_features).
    """

    name: str
    module: nn.Module
    key: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def matrix(self) -> torch.Tensor:
        """A (out_features, in_features) view of the parameter as it is now: what is copied into it is stored."""
        stored = getattr(self.module, self.key).detach()
        if self.expert is not None:
            stored = stored[self.expert]
        return stored.T if self.transposed else stored

    @property
    def is_linear(self) -> bool:
        """Whether it is a plain linear's, which alone can be packed."""
        from torch import nn

        return isinstance(self.module, nn.Linear)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.matrix.shape
        return out_features, in_features


def block_weights(block: nn.Module, prefix: str) -> dict[str, PrunableWeight]:
    """The prunable weights of one decoder block (on meta too) by full name, in the block's order, without routers.

    Raises:
        UsageError: the block holds a kind of weight that is not supported, which is named.
    """
    mixtures = [name.rpartition(".")[0] for name, module in block.named_modules() if _holds_experts(name, module)]
    weights = {}
    for name, module in block.named_modules():
        mixes = name.partition(".")[0] in STREAM_MIXERS
        if not mixes and not any(_is_router(name, mixture) for mixture in mixtures):
            for weight in _module_weights(module, f"{prefix}.{name}".removesuffix(".")):
                weights[weight.name] = weight
    return weights


def prunable_weights(model: PreTrainedModel) -> dict[str, PrunableWeight]:
    """Every prunable weight of the model's decoder blocks by full name; embeddings and head are not among them.

    Raises:
        UsageError: a block holds a kind of weight that is not supported, which is named.
    """

    prefix, blocks = decoder_blocks(model)
    return {name: weight for index, block in enumerate(blocks)
            for name, weight in block_weights(block, f"{prefix}.{index}").items()}  # fmt: skip


def expert_keys(module: nn.Module) -> tuple[str, ...]:
    """The 3-D parameters of fused experts in the order they are applied; empty for any other module.

    They are known by what transformers' `use_experts_implementation` sets on a class that keeps to its contract:
    (experts, out_features, in_features), or the last two swapped where `is_transposed`.
    """
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _module_weights(module: nn.Module, name: str) -> Iterator[PrunableWeight]:
    """The weights that a module itself holds."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        if hasattr(module, "n_groups"):
            raise UsageError(f"not supported: parts of {name} are multiplied by different inputs.")
        yield PrunableWeight(name, module, transposed=isinstance(module, Conv1D))
        return
    keys = expert_keys(module)
    largest = 1 if not keys and "experts" in name.split(".") else 2
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > largest and key not in keys:
            shape = " × ".join(str(size) for size in parameter.shape)
            raise UsageError(
                f"not supported: {name}.{key} ({shape}) is no matrix of a linear, but a convolution, or several "
                "experts in one tensor of an unknown layout."
            )
    for expert in range(len(getattr(module, keys[0])) if keys else 0):
        for key in keys:
            yield PrunableWeight(f"{name}.{expert}.{key}", module, key, expert, bool(module.is_transposed))


def _holds_experts(name: str, module: nn.Module) -> bool:
    from torch import nn

    is_list = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    return is_list or bool(expert_keys(module))


def _is_router(name: str, mixture: str) -> bool:
    """Whether a module is, or lies in, the router of a mixture of experts, by their names in the block."""
    inside = name.removeprefix(f"{mixture}.") if mixture else name
    return (inside != name or not mixture) and inside.partition(".")[0] in ROUTERS


def model_max_length(model_or_config: Any) -> int:
    """The longest sequence, in tokens, that the model was built for (2048 where it does not say)."""
    config = getattr(model_or_config, "config", model_or_config)
    text_config = config.get_text_config()
    found = [
        getattr(text_config, key, None) for key in ("max_position_embeddings", "max_seq_len")
    ]  # MPT's is the latter
    return int(next(filter(None, found), 2048))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks and their prefix in parameter names (“model.layers”), towers for images left out.

    Raises:
        UsageError: no list of `num_hidden_layers` like blocks is found.
    """
    from torch import nn

    expected, decoder = model.config.get_text_config().num_hidden_layers, set(model.get_decoder().modules())
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == expected and module in decoder
             and len({type(block) for block in module}) == 1]  # fmt: skip
    if not found:
        raise UsageError(f"{type(model).__name__} is not supported: it has no list of {expected} decoder blocks.")
    return max(found, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def left_out(model: PreTrainedModel) -> list[str]:
    """The parts of a model for images or sound that stay as they are: what is neither its decoder nor its head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {parameter for module in (decoder, head) if module is not None for parameter in module.parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = set(module.parameters())
        if parameters and not parameters & inside and not any(name.startswith(f"{part}.") for part in found):
            found.append(name)
    return found


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a plain linear on a base model makes the logits. What else is done to them only a trial shows."""
    from torch import nn

    return type(model.get_output_embeddings()) is nn.Linear and model.base_model is not model
