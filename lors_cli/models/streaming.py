"""A causal LM whose decoder blocks are read from disk one at a time, so that the model is never in memory whole.

The network is built without weights. What lies outside its blocks is read where it is needed, a block's weights when
its turn comes, each through transformers' own loader (which renames and fuses what a family stores differently), and
given up afterwards. A .gguf has to be read whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.machine.memory import give_back_memory
from lors_cli.models.blocks import PrunableWeight, decoder_blocks, prunable_weights
from lors_cli.models.tensor_files import Entry
from lors_cli.output import console

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from lors_cli.recipe.schema import ModelConfig


class BlockwiseModel:
    """A network, perhaps on the meta device, and the means to bring one of its blocks into memory on `device`.

    `weights` reads parameters by name; None when the network holds them all.
    """

    def __init__(self, network: PreTrainedModel, device: torch.device, weights: _Weights | None) -> None:
        self.network = network
        self.device = device
        self.prefix, self.blocks = decoder_blocks(network)
        self._weights = weights
        self._home = next(network.parameters()).device

    @property
    def streamed(self) -> bool:
        """Whether blocks are read one at a time."""
        return self._weights is not None

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block `index` with its weights, on the device, for as long as the context lasts."""
        prefix = f"{self.prefix}.{index}."
        with self._present(self.blocks[index], {prefix + name for name in self.blocks[index].state_dict()}):
            yield self.blocks[index]

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """What comes before the blocks, on the device, for as long as the context lasts.

        The output head stays where it is, unless it is tied to the input's embedding.
        """
        head = self.network.get_output_embeddings()
        blocks = set(self.blocks.modules())
        with ExitStack() as stack:
            for prefix, module in self.network.named_modules():
                if module in blocks or module is head or not _own_tensors(module):
                    continue
                names = {f"{prefix}.{key}" if prefix else key for key in _own_tensors(module)}
                stack.enter_context(self._present(module, names))
            yield

    def outer_tensors(self) -> list[tuple[Entry, Callable[[], torch.Tensor]]]:
        """Every tensor of the checkpoint outside the blocks: its entry, and how to read it."""
        return [(entry, partial(self.read, name)) for name, entry in self.outer_entries().items()]

    def outer_entries(self) -> dict[str, Entry]:
        """What every tensor outside the blocks takes in the checkpoint, by its name in the network."""
        from transformers.core_model_loading import revert_weight_conversion

        state = self.network.state_dict()
        tied, ignored = self.network.all_tied_weights_keys, self.network._keys_to_ignore_on_save or ()
        plan = self.network._get_dtype_plan(self.network.dtype)  # some families keep norms in float32
        found = {}
        for name, tensor in state.items():
            if name in tied or name in ignored or name.startswith(f"{self.prefix}."):
                continue
            (saved_name,) = revert_weight_conversion(self.network, {name: tensor})
            kept = next((dtype for pattern, dtype in plan.items() if re.search(pattern, name)), tensor.dtype)
            found[name] = Entry.of(saved_name, tensor.to(kept) if tensor.is_floating_point() else tensor)
        return found

    def checkpoint_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a block, as they are now, under the names and in the shapes of its family's checkpoints."""
        from transformers.core_model_loading import revert_weight_conversion

        prefix = f"{self.prefix}.{index}."
        state = {prefix + name: tensor for name, tensor in self.blocks[index].state_dict().items()}
        return dict(revert_weight_conversion(self.network, state))

    @contextmanager
    def _present(self, module: nn.Module, names: set[str]) -> Iterator[None]:
        """`module` on the device, with the parameters `names`, all its own or its children's."""
        if self._weights is None:
            module.to(self.device)
            try:
                yield
            finally:
                module.to(self._home)
            return
        with ExitStack() as stack:
            stack.callback(give_back_memory)
            stack.callback(_forget, module, names)
            self._weights.load(self.network, names, self.device)
            for child in module.modules():
                for key, buffer in child.named_buffers(recurse=False):
                    setattr(child, key, buffer.to(self.device))
            yield

    def read(self, name: str) -> torch.Tensor:
        """One parameter or stored buffer by its name in the network, whole, in CPU memory."""
        import torch

        if self._weights is not None:
            self._weights.load(self.network, {name}, torch.device("cpu"))
        tensor = self.network.state_dict()[name]
        if self._weights is not None:
            _forget(self.network.get_submodule(name.rpartition(".")[0]), {name})
        return tensor

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a parameter: nothing else of it is read, unless it is made of several tensors of the files."""
        stored = None if self._weights is None else self._weights.as_stored(self.network, name)
        if stored is None:
            return self.read(name)[rows].clone()
        part: torch.Tensor = stored[rows]
        return part.to(self.network.get_parameter(name).dtype)

    def weights(self) -> dict[str, PrunableWeight]:
        """The prunable weights by full name, each read when its `matrix` is asked for."""
        names = {module: name for name, module in self.network.named_modules()}
        return {name: _StoredWeight(**vars(weight), source=self, stored=f"{names[weight.module]}.{weight.key}")
                for name, weight in prunable_weights(self.network).items()}  # fmt: skip


@dataclass(frozen=True)
class _StoredWeight(PrunableWeight):
    """A matrix that is read from the files each time it is asked for; `stored` is its parameter's full name."""

    source: BlockwiseModel = field(kw_only=True)
    stored: str = field(kw_only=True)

    @property
    def matrix(self) -> torch.Tensor:
        """(out_features, in_features)."""
        if self.expert is None:
            tensor = self.source.read_rows(self.stored, slice(None))
        else:
            tensor = self.source.read_rows(self.stored, slice(self.expert, self.expert + 1))[0]
        return tensor.T if self.transposed else tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); nothing is read."""
        out_features, in_features = super().matrix.shape  # without memory
        return out_features, in_features


def _own_tensors(module: nn.Module) -> list[str]:
    """Names of a module's parameters and buffers that are not its children's."""
    parameters, buffers = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    return [key for key, _ in (*parameters, *buffers)]


def _forget(module: nn.Module, names: set[str]) -> None:
    """Put those parameters of a module which `names` ends in back on the meta device."""
    import torch

    endings = {name.rpartition(".")[2] for name in names}
    for child in module.modules():
        for key, parameter in child.named_parameters(recurse=False):
            if key in endings:
                empty = torch.empty_like(parameter, device="meta")
                setattr(child, key, torch.nn.Parameter(empty, requires_grad=False))


class _Weights:
    """A checkpoint's safetensors files and what each tensor in them becomes in the network."""

    def __init__(self, network: PreTrainedModel, files: list[Path], dtype: torch.dtype, path: str) -> None:
        from lors_cli.models.stored import conversions_of, find_sources, match, open_tensors, untie

        self.path = path
        self._dtype = dtype
        self._conversions: Any = conversions_of(network)
        tensors = open_tensors(files, path)
        self._sources = find_sources(network, tensors, self._conversions, path)
        found = match(tensors, network.state_dict(), self._conversions, network.base_model_prefix)
        self._made = {name for name, keys in found.items() if any(is_converted for _, is_converted in keys)}
        untie(network, self._sources, dtype)
        self._used = [conversion for conversion in self._conversions if conversion.was_used()]
        network._weight_conversions = self._used  # type: ignore[assignment]  # what `revert_weight_conversion` goes by

    def as_stored(self, network: PreTrainedModel, name: str) -> Any:
        """The slice of the files that is a parameter as it is; None where transformers has to make it."""
        if name in self._made or name not in self._sources or network._get_dtype_plan(self._dtype):
            return None
        ((_, stored),) = self._sources[name]
        return stored

    def load(self, network: PreTrainedModel, names: set[str], device: torch.device) -> None:
        """Read the named parameters into the network; what the files do not hold (computed buffers) is left out.

        Raises:
            UsageError: one of them is not in the files, or of the wrong shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        from lors_cli.models.quiet import quiet_libraries
        from lors_cli.models.stored import refuse

        wanted = {key: tensor for name in sorted(names & set(self._sources)) for key, tensor in self._sources[name]}
        if not wanted:
            return
        options = LoadStateDictConfig(
            device_map={"": device}, dtype=self._dtype, dtype_plan=network._get_dtype_plan(self._dtype),
            weight_mapping=self._conversions,
        )  # fmt: skip
        with quiet_libraries():
            report, _ = convert_and_load_state_dict_in_model(network, wanted, options, None)
        network._weight_conversions = self._used  # type: ignore[assignment]
        refuse(self.path, {str(item[0]) for item in report.mismatched_keys} | set(report.conversion_errors)
               | (set(report.missing_keys) & names & set(self._sources)))  # fmt: skip
        network.requires_grad_(False)


def open_blockwise(config: ModelConfig) -> BlockwiseModel:
    """The causal LM, its blocks to be read one at a time where its format allows, and computed on the config's device.

    Raises:
        MissingError: not there or not reachable.
        UsageError: no safetensors, or weights that do not fit the configuration.
    """
    import torch

    from lors_cli.machine.devices import resolve_device
    from lors_cli.models.loading import load_config, load_model, resolve_dtype
    from lors_cli.models.stored import settle_ties, weight_files

    device, kind = resolve_device(config.device), read_whole(config)
    if kind:
        console.detail(f"  {kind} is read whole: blocks are not streamed")
        return BlockwiseModel(load_model(config, device=torch.device("cpu")), device, None)
    files, settings = weight_files(config), load_config(config)
    dtype = resolve_dtype(config, getattr(settings, "dtype", None), device)
    network = network_without_weights(settings, dtype, config)
    weights = _Weights(network, files, dtype, config.path)
    settle_ties(network, config.path)
    return BlockwiseModel(network, device, weights)


def read_whole(config: ModelConfig) -> str:
    """What a checkpoint is whose blocks cannot be read one at a time; empty for one whose can be."""
    from lors_cli.models.loading import load_config
    from lors_cli.models.quantised import Quantised
    from lors_cli.models.sources import locate

    if locate(config.path).gguf_file is not None:
        return "a .gguf"
    quantised = Quantised.of(load_config(config))
    return "" if quantised is None else f"a quantised checkpoint ({quantised.method})"


def network_without_weights(settings: Any, dtype: torch.dtype, config: ModelConfig) -> PreTrainedModel:
    """The network of a configuration, its parameters on the meta device, its buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    from lors_cli.models.checks import check_token_ids, loading
    from lors_cli.models.quiet import quiet_libraries

    with loading(config.path, "the checkpoint"), quiet_libraries(), init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
        network.tie_weights()
        for module in network.modules():  # buffers are computed in float32, as `from_pretrained` does
            module._is_hf_initialized = False
        network.initialize_weights()
    if network.can_generate():
        with loading(config.path, "its generation_config.json"), quiet_libraries():
            try:
                found = GenerationConfig.from_pretrained(settings.name_or_path)
                network.generation_config = found
            except OSError:
                console.detail(f"  {config.path} has no generation_config.json")
        check_token_ids(network, config.path)
    return network.requires_grad_(False).eval()
