"""What a model's files may hold: checks before memory is taken for them, or anything else is read that they name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lors_cli.errors import MissingError, UsageError, translate

PICKLE_HINT = (
    "Only safetensors are read, since unpickling runs code. Where you trust the file: AutoModelForCausalLM"
    ".from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes them, and AutoTokenizer the same way its tokenizer."
)
MAX_LAYERS = 2_000
"""Decoder blocks that a configuration may ask for; known models have up to a few hundred."""
SLACK = 1 << 24
"""Weights whose memory is not worth a question; of a file that was cut, safetensors says so itself."""


def safetensors_files(folder: Path, path: str) -> list[Path]:
    """A checkpoint's safetensors files: model.safetensors, or those that its index names; `path` names it in messages.

    Raises:
        UsageError: there are none, the index is broken, or it names a file that is not right in the folder.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UsageError(f"{index} is no index of a checkpoint.") from error
        odd = [name for name in names if not _is_file_name(name)]
        if odd:
            raise UsageError(f"{index} names {odd[0]!r}, which is not in the checkpoint's folder.")
        if not names:
            raise UsageError(f"{index} names no file.")
        if "model.safetensors" not in names and (folder / "model.safetensors").is_file():
            raise UsageError(
                f"{path} holds two checkpoints: model.safetensors, and {len(names)} files that its index names.",
                "transformers reads the first and takes no notice of the index. Remove the one that is out of date.",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
        what = f"{path} has no {missing[0]}" + (f", only pickled weights: {pickled[0]}" if pickled else "")
        raise UsageError(f"{what}.", PICKLE_HINT if pickled else "Only safetensors are read: are all files there?")
    return [folder / name for name in names]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _is_file_name(name: Any) -> bool:
    """Whether a shard's name is one of a safetensors file in the folder itself."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name) and len(name) < 256


def forget_own_code(settings: Any) -> None:
    """Take a model's own Python code out of its configuration: it is not run, and not saved with results."""
    if hasattr(settings, "auto_map"):
        del settings.auto_map


def check_vocabulary(tokenizer: Any, vocab_size: int, path: str) -> None:
    """Refuse a tokenizer that gives ids that the model has no embedding for.

    Tokens that were added and that no text holds unless it spells them out may lie beyond, in the tokenizer's
    `beyond_embedding`, and are refused where a text does (`tokenising.check_known`); of those a padding token gives
    way to EOS.

    Raises:
        UsageError: naming such a token.
    """
    if tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    added = set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if beyond:
        tokenizer.beyond_embedding = beyond
    of_its_own = {token: number for number, token in beyond.items() if token not in added}
    if of_its_own:
        token = min(of_its_own, key=of_its_own.__getitem__)
        raise UsageError(
            f"{path}: its tokenizer has {token!r} as {of_its_own[token]}, and the model knows ids below {vocab_size} "
            "only.",
            "Give the model its own tokenizer.",
        )


def check_token_ids(network: Any, path: str) -> None:
    """Refuse special tokens of generation_config.json that are no numbers: they are compared with the model's ids.

    Raises:
        UsageError: naming one.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(getattr(network, "generation_config", None), name, None)
        for found in given if isinstance(given, list) else [given]:
            if found is not None and type(found) is not int:
                raise UsageError(
                    f"{path}: generation_config.json has {found!r} as {name}, where a token's number belongs.",
                    "Write the number that the tokenizer has for it.",
                )


def check_size(settings: Any, folder: Path, path: str) -> None:
    """Refuse a config.json that describes a far larger model than its files hold, before memory is taken for it.

    Raises:
        UsageError: there are more weights than the files have bits.
    """
    text = settings.get_text_config()
    sizes = [getattr(text, key, 0) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")]
    vocab_size, hidden_size, layers, inner = (size if isinstance(size, int) else 0 for size in sizes)
    if min(vocab_size, hidden_size, layers, inner) < 0 or layers > MAX_LAYERS:
        raise UsageError(f"{path}: config.json has sizes that no model has, such as {layers} layers.")
    least = vocab_size * hidden_size + layers * hidden_size * inner
    present = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    if present and least > 8 * present + SLACK:
        raise UsageError(
            f"{path}: config.json describes at least {least:,} weights; its files hold {present:,} bytes.",
            "Is a shard missing, or is it the configuration of another model?",
        )


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over a user's files into the user's error.

    Broken files make it fail in every way that code fails (IndexError, AssertionError, a panic of its Rust parts), so
    all of them count as the files' fault; -vv shows where.
    """
    try:
        yield
    except Exception as error:
        raise load_error(path, what, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's, which is no Exception
            raise
        raise load_error(path, what, RuntimeError(str(error))) from error


def load_error(path: str, what: str, error: Exception) -> Exception:
    """What to raise when transformers cannot load `what`; full disks, missing files and the like stay themselves."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if type(error) is OSError and "safetensors" in first_line:
        return UsageError(f"{path}: {first_line}", PICKLE_HINT)
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{path}: {what} needs Python code that comes with the model, which lors does not run.",
            "Only architectures that transformers has itself are loaded; look for a converted checkpoint.",
        )
    if "is required to read a `tiktoken` file" in str(error):  # what transformers says where both are missing
        return MissingError(
            f"{path}: its tokenizer is a tokenizer.model, which needs the package sentencepiece.",
            "pip install sentencepiece protobuf (for a tiktoken one: tiktoken), or add a tokenizer.json.",
        )
    known = translate(error)
    if isinstance(known, MissingError) and Path(path).exists():
        return MissingError(f"{path}: {what} cannot be loaded: {known.message}", known.hint)
    if isinstance(known, MissingError):
        return MissingError(f"{path}: {known.message}", known.hint)
    return known or UsageError(f"{path}: {what} cannot be loaded: {first_line}")
