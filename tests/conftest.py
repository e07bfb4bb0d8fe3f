"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data and models beside the checkout; tests that need it are skipped without it."""
    folder = Path(os.environ.get("LORS_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set LORS_SHARED")
    return folder


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the developer's own data folder."""
    monkeypatch.delenv("LORS_DATA_DIR", raising=False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
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
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )
