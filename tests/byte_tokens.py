"""A tokenizer that needs no files: one token a byte."""

from __future__ import annotations

from typing import Any


def byte_tokenizer(model_max_length: int) -> Any:
    """One token a byte (ids 0 to 255), `<s>` 256, `</s>` 257; pad is `</s>`, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet in byte order: printable bytes stand for themselves, the others follow from U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=model_max_length
    )
