"""What a checkpoint's files hold, held against the network of its configuration; every way of loading passes here.

A configuration may say one thing and the files another. Numbers of a quantised checkpoint that are taken for weights,
names that a wrapper of the network left behind, tensors that have no place: each is refused or said in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.models.checks import load_error, loading, safetensors_files
from lors_cli.models.quantised import DENSE_HINT, FLOATS, LEFT_BY_QUANTISING, Quantised
from lors_cli.models.tensor_files import torch_type
from lors_cli.output import console

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lors_cli.recipe.schema import ModelConfig

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module|base_model\.model)\."
)
_WRAPPED_BY = {"module.": "DataParallel", "_orig_mod.": "torch.compile", "base_model.model.": "PEFT"}

Sources = dict[str, list[tuple[str, Any]]]
"""For every parameter of a network the names and slices of files that make it."""


def weight_files(config: ModelConfig) -> list[Path]:
    """The checkpoint's safetensors files, downloaded if they are on the hub.

    Raises:
        UsageError: there are none, or the index names one outside the checkpoint's folder.
    """
    from lors_cli.models.hub import here

    folder = here(config, weights=True).folder
    assert folder is not None, config.path
    return safetensors_files(folder, config.path)


def check_files(settings: Any, config: ModelConfig) -> Quantised | None:
    """Hold a checkpoint's files against its configuration before memory is taken for weights.

    Returns:
        How they are quantised, where transformers can undo that; None for plain weights.

    Raises:
        UsageError, MissingError: they cannot be loaded, or would be loaded as what they are not.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lors_cli.models.quiet import quiet_libraries

    quantised, tensors = Quantised.of(settings), open_tensors(weight_files(config), config.path)
    if quantised is not None:
        quantised.check(tensors, config.path)
        return quantised
    with loading(config.path, "the checkpoint"), quiet_libraries(), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    find_sources(network, tensors, conversions_of(network), config.path)
    return None


def open_tensors(files: Iterable[Path], path: str) -> dict[str, Any]:
    """Every tensor of safetensors files by its name, as a slice that is read when it is asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = [safe_open(file, framework="pt") for file in files]
    except SafetensorError as error:
        raise load_error(path, "the checkpoint", error) from error
    return {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118 - no mapping


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The number format of a folder's safetensors, by their first floats, as transformers finds it for `auto`.

    None where there are no whole files, or theirs is none of torch's usual ones.
    """
    from lors_cli.models.hub import is_whole

    if not is_whole(folder):
        return None
    tensors = open_tensors(safetensors_files(folder, str(folder))[:1], str(folder))
    found = map(torch_type, tensors.values())
    return next((dtype for dtype in found if dtype is not None and dtype.is_floating_point), None)


def conversions_of(network: PreTrainedModel) -> Any:
    """transformers' renamings and converters from a family's checkpoints to its network."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(network)


def find_sources(network: PreTrainedModel, tensors: dict[str, Any], conversions: Any, path: str) -> Sources:
    """What makes each parameter of a network.

    Raises:
        UsageError: a tensor is missing or misshapen, or what the files hold are no plain weights.
    """
    state, tied = network.state_dict(), network.all_tied_weights_keys
    matches = match(tensors, state, conversions, network.base_model_prefix)
    taken = {key for found in matches.values() for key, _ in found}
    _refuse_quantised(path, network, tensors, taken)
    bad = set()
    for name, found in matches.items():
        for key, is_converted in found:
            number_format = tensors[key].get_dtype()
            if state[name].is_floating_point() and number_format not in FLOATS:
                raise UsageError(
                    f"{path}: {key} holds {number_format}, which is no number format of weights.", DENSE_HINT
                )
            if not is_converted and tuple(tensors[key].get_shape()) != tuple(state[name].shape):
                bad.add(name)
    sources = {name: [(key, tensors[key]) for key, _ in found] for name, found in matches.items()}
    for name, source in tied.items():  # a checkpoint may hold either of two tied weights
        if source not in sources and name in sources:
            sources[source] = [(source, tensor) for _, tensor in sources[name]]
    missing = state.keys() - sources.keys() - tied.keys()
    if missing:
        _refuse_wrapped(path, tensors, matches.keys(), state)
    refuse(path, bad | missing)
    _say_left_out(path, network, set(tensors) - taken)
    return sources


def match(
    keys: Iterable[str], state: dict[str, Any], conversions: Sequence[Any], base_prefix: str
) -> dict[str, list[tuple[str, bool]]]:
    """For every tensor of a network the checkpoint's keys that make it, each with whether it is converted.

    A key that conversions lead out of the network goes by its own name; one that has no place there is left out.

    Args:
        keys: of the checkpoint.
        state: the network's tensors by name.
        conversions: transformers' renamings and converters for this network; they remember that they were used.
        base_prefix: what a checkpoint of the network without its head leaves out before names.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    found: dict[str, list[tuple[str, bool]]] = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, base_prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], base_prefix, state)
        if name in state:
            found.setdefault(name, []).append((key, converter is not None))
    return found


def check_plain(model: PreTrainedModel, path: str) -> None:
    """Refuse a network whose weights are not its family's plain ones, though they were to be made that.

    Layers that are no linears are put in by some libraries, and none of them is taken out: GPT-2's, turned round.
    """
    import torch

    with torch.device("meta"):
        family = type(model)(model.config)
    plain = {name: tuple(tensor.shape) for name, tensor in family.state_dict().items()}
    found = {name: tuple(tensor.shape) if tensor.is_floating_point() else None
             for name, tensor in model.state_dict().items()}  # fmt: skip
    odd = {name for name in plain.keys() | found.keys() if plain.get(name) != found.get(name)}
    if odd:
        raise UsageError(
            f"{path}: transformers does not make plain weights of {len(odd)} of its tensors, first: {min(odd)}",
            DENSE_HINT,
        )


def refuse(path: str, bad: set[str]) -> None:
    """Refuse a checkpoint of whose weights some are `bad`, if any."""
    if bad:
        raise UsageError(f"{path}: {len(bad)} weights are missing or of the wrong shape, first: {min(bad)}")


def _refuse_quantised(path: str, network: PreTrainedModel, tensors: dict[str, Any], taken: set[str]) -> None:
    """Refuse scales, zero points and packed weights beside the network's own: without them its weights are wrong."""
    modules = {key.rpartition(".")[0] for key in taken} | {name for name, _ in network.named_modules()}
    for key in sorted(set(tensors) - taken):
        if LEFT_BY_QUANTISING.search(key) and key.partition(".quant_state.")[0].rpartition(".")[0] in modules:
            raise UsageError(
                f"{path} holds {key}, as quantised checkpoints do, and its config.json has no quantization_config "
                "that says how to undo it.",
                DENSE_HINT,
            )


def _refuse_wrapped(path: str, tensors: Iterable[str], matched: Iterable[str], state: dict[str, Any]) -> None:
    """Refuse names that what was wrapped around the network left in a checkpoint, and say how to take them off."""
    wrapped = {key: plain for key in tensors if (plain := _unwrapped(key)) != key}
    if not wrapped or set(wrapped.values()) <= set(matched) or not set(wrapped.values()) & state.keys():
        return
    key = min(wrapped)
    prefix = _WRAPPERS.search(key)[0]  # type: ignore[index]  # it is wrapped
    strip = f"{{key.replace({prefix!r}, ''): value for key, value in load_file(FILE).items()}}"
    hint = f"Take it off: safetensors.torch.save_file({strip}, FILE, metadata={{'format': 'pt'}})."
    if prefix == "base_model.model.":
        hint = f"Merge the adapter before saving: model.merge_and_unload(). Or, where there is none: {hint}"
    raise UsageError(
        f"{path}: its weights' names hold {prefix!r}, which {_WRAPPED_BY.get(prefix, 'a wrapper')} put around the "
        f"network: {key}",
        hint,
    )


def _unwrapped(key: str) -> str:
    """A tensor's name without what wrappers put into it, however many there were."""
    while (shorter := _WRAPPERS.sub("", key)) != key:
        key = shorter
    return key


def _say_left_out(path: str, network: PreTrainedModel, keys: set[str]) -> None:
    """Warn of tensors that have no place in the network, but for those that its family is known to leave out."""
    known = "|".join(network._keys_to_ignore_on_load_unexpected or ()) or r"(?!)"
    left = sorted(key for key in keys if not re.search(rf"{known}|rotary_emb\.inv_freq$|position_ids$", key))
    if left:
        where = f"have no place in {type(network).__name__} and are left out"
        console.warn(f"{path}: {len(left)} tensors {where}, first: {left[0]}")


# ---- weights that config.json ties and the files keep apart


def untie(network: PreTrainedModel, sources: Sources, dtype: torch.dtype) -> None:
    """Give a network without weights a parameter of its own for each weight that is tied to another of other values.

    As transformers does when it loads a model whole.
    """
    import torch

    for name, source in list(network.all_tied_weights_keys.items()):
        if name in sources and source in sources and not _same(sources[name], sources[source], dtype):
            network.all_tied_weights_keys.pop(name)
            module, _, key = name.rpartition(".")
            empty = torch.empty_like(network.get_parameter(name), device="meta")
            setattr(network.get_submodule(module), key, torch.nn.Parameter(empty, requires_grad=False))


def _same(one: list[tuple[str, Any]], other: list[tuple[str, Any]], dtype: torch.dtype) -> bool:
    """Whether two weights are equal once they are loaded, read some rows at a time."""
    import torch

    (_, first), (_, second) = one[0], other[0]
    rows = first.get_shape()[0]
    step = max(1, (1 << 24) // max(1, rows and first.get_shape()[-1]))
    return first is second or all(
        torch.equal(first[start : start + step].to(dtype), second[start : start + step].to(dtype))
        for start in range(0, rows, step)
    )


def settle_ties(network: PreTrainedModel, path: str) -> None:
    """Have the configuration say that weights are not tied where files hold two, so that nothing ties them later."""
    expected = network.get_expanded_tied_weights_keys(all_submodels=True)
    untied = sorted(expected.keys() - network.all_tied_weights_keys.keys())
    if not untied:
        return
    console.warn(
        f"{path}: config.json says tie_word_embeddings, and its files hold {untied[0]} with values of its own, which "
        "are kept."
    )
    for settings in {id(item): item for item in (network.config, network.config.get_text_config())}.values():
        settings.tie_word_embeddings = False
