"""Tokens and passwords: never shown, never written."""

from __future__ import annotations

import os
import re

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SHORTEST = 8
"""Characters below which a variable's value is no token, and would be found in any text."""
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=://)[^/\s@]+(?=@)")
MASK = "[hidden]"


def redact(text: str) -> str:
    """`text` without hub tokens, the tokens of this process's environment, and what stands before @ in a URL."""
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, MASK)
    return _SECRET.sub(MASK, text)
