"""Load and save checkpoints, find decoder blocks and the linears in them.

A model is named by a folder, a hub id, a .gguf file, or package://module/file.gguf. Weights come from safetensors
or GGUF, never from pickle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.files.revisions import known_commit
from lors_cli.machine.devices import cpu_has_bfloat16, resolve_device
from lors_cli.models.checks import check_size, check_token_ids, check_vocabulary, forget_own_code, loading
from lors_cli.models.hub import here, is_whole
from lors_cli.models.quantised import BITSANDBYTES, PACKED, Quantised
from lors_cli.models.quiet import library_bars, quiet_libraries
from lors_cli.models.sources import ModelSource, locate
from lors_cli.models.stored import check_files, check_plain, refuse, settle_ties, stored_dtype
from lors_cli.output import console, progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lors_cli.recipe.schema import ModelConfig

MAX_SHARD_SIZE = "5GB"


def resolve_dtype(config: ModelConfig, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format the weights are loaded in.

    Args:
        config: its `dtype` decides; `auto` keeps `stored`.
        stored: the checkpoint's own format, None of a .gguf, or where neither config.json nor plain weights say it.
        device: a CPU gets bfloat16 for float16, and float32 where it has no bfloat16 instructions.
    """
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    dtype = stored if stored in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
    if device.type == "cpu" and dtype != torch.float32 and not cpu_has_bfloat16():
        console.info("  this CPU has no bfloat16 instructions: weights are loaded as float32")
        return torch.float32
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    if stored not in (None, dtype):
        said = f"  weights are stored in {stored} and loaded in {dtype}; dtype chooses another"
        console.info(said.replace("torch.", ""))
    return dtype


def load_config(config: ModelConfig) -> Any:
    """The model's transformers configuration.

    Raises:
        MissingError: not there or not reachable.
        UsageError: its config.json cannot be read, or the weights are stored in a way that nothing here undoes.
    """
    from transformers import AutoConfig

    source, repo = here(config), locate(config.path).repo
    with quiet_libraries():
        with loading(config.path, "its configuration"):
            settings = AutoConfig.from_pretrained(source.name_or_path, **_where(source))
            forget_own_code(settings)
            if repo is not None:
                settings._commit_hash = known_commit(repo, config.revision)
            if source.folder is not None and source.gguf_file is None and (repo is None or is_whole(source.folder)):
                check_size(settings, source.folder, config.path)
    quantised = Quantised.of(settings) if source.gguf_file is None else None
    if quantised is not None:
        quantised.check_method(config.path)
    if source.gguf_file is None and source.folder is not None:
        add_dtype(settings, source.folder)
    return settings


def add_dtype(settings: Any, folder: Path) -> None:
    """The number format of a folder's weights into settings that do not say it."""
    quantised = Quantised.of(settings)
    if getattr(settings, "dtype", None) is None and (quantised is None or quantised.method == PACKED):
        settings.dtype = stored_dtype(folder)


def load_model(
    config: ModelConfig, *, device: torch.device | None = None, keep_packed: bool = False
) -> PreTrainedModel:
    """The causal LM in evaluation mode, on its device, without gradients.

    Args:
        config: its device decides the number format that `dtype: auto` means.
        device: where to put it; by default the config's.
        keep_packed: leave packed weights packed where a kernel computes with them.

    Raises:
        MissingError: not there or not reachable.
        UsageError: only pickled weights, or weights that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    source = here(config, weights=True)
    computing = resolve_device(config.device)
    options, quantised = _where(source), None
    if source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
        dtype = resolve_dtype(config, None, computing)
    else:
        settings = load_config(config)
        dtype = resolve_dtype(config, getattr(settings, "dtype", None), computing)
        quantised = check_files(settings, config)
        if quantised is not None:
            settings.dtype = dtype
            options["config"] = settings
            if keep_packed and quantised.method == PACKED:
                settings.quantization_config = {**quantised.settings, "device": str(device or computing)}
            else:
                console.info(f"  {config.path} is {quantised.what}: its weights, and what is made of them, become "
                             f"{str(dtype).removeprefix('torch.')}")  # fmt: skip
                if quantised.method == BITSANDBYTES:
                    options["device_map"] = "cpu"  # else it takes the first GPU, whatever the device is
                else:
                    settings.quantization_config = {**quantised.settings, "dequantize": True}
        options["use_safetensors"] = True
    reading = progress.busy("reading the .gguf") if source.gguf_file else library_bars("loading", "weights")
    with quiet_libraries(), reading:
        with loading(config.path, "the checkpoint"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.name_or_path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
            model, report = loaded
            if quantised is not None and quantised.method == BITSANDBYTES:
                model = model.dequantize(dtype)
    refuse(config.path, {*report["missing_keys"], *(str(item[0]) for item in report["mismatched_keys"])})
    settle_ties(model, config.path)
    check_token_ids(model, config.path)
    if quantised is not None:
        if quantised.method != PACKED:
            check_plain(model, config.path)
        _cast(model, dtype)
        model._weight_conversions = None  # saved under the names of its family's plain checkpoints
    model.requires_grad_(False)
    forget_own_code(model.config)
    if hasattr(model.config, "_model_name_or_path"):  # a .gguf's general.name, which is no setting
        del model.config._model_name_or_path
    return model.to(device or computing).eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring what was not quantised into the number format of the rest: transformers leaves it as it is stored."""
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(re.search(pattern, name) for pattern in kept):
            parameter.data = parameter.data.to(dtype)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token (its EOS where it has none).

    Tokens that the model has no embedding for are in its `beyond_embedding`, by id, where there are any.

    Raises:
        MissingError: not there or not reachable, or a package that reads it is not installed.
        UsageError: there is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    source = here(config)
    with quiet_libraries():
        with loading(config.path, "its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **_where(source))
    for how_it_was_found in ("is_local", "local_files_only"):  # transformers would save it with results
        tokenizer.init_kwargs.pop(how_it_was_found, None)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{config.path}: its tokenizer has no EOS token, which separates documents.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.add_bos_token is not None:
        _set_bos(tokenizer, config)
    if source.gguf_file is None:
        check_vocabulary(tokenizer, load_config(config).get_text_config().vocab_size, config.path)
    return tokenizer


def _set_bos(tokenizer: Any, config: ModelConfig) -> None:
    """Let the tokenizer put its BOS token before texts, or not; it is saved so."""
    tokenizer.add_bos_token = config.add_bos_token
    ids, bos = tokenizer("").input_ids, tokenizer.bos_token_id
    if (bos is not None and list(ids[:1]) == [bos]) is not config.add_bos_token:
        why = "has none" if bos is None else f"is a {type(tokenizer).__name__}, which cannot be told so"
        raise UsageError(f"model.add_bos_token: {str(config.add_bos_token).lower()}: the tokenizer {why}.")


def _where(source: ModelSource) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": False}  # None would ask on the terminal
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    return options


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint: safetensors (sharded above 5 GB), configuration, tokenizer."""
    with quiet_libraries(), library_bars("writing", "files"):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all of a checkpoint but its weights."""
    with quiet_libraries():
        model.save_pretrained(folder, state_dict={})
        (folder / "model.safetensors").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
