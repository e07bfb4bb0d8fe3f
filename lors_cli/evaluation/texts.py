"""Short texts of each model on the same prompts, for people to read beside the scores: `texts/<model>.json`.

They have a fingerprint of their own, which is not part of the scores'.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lors_cli.errors import UsageError
from lors_cli.files import atomic, hashes
from lors_cli.output import console
from lors_cli.recipe.schema import EvalConfig, ModelConfig

PROMPTS = (
    "The capital of France is",
    "Explain in one sentence why the sky is blue.",
    "Once upon a time there was a little girl who",
)
NEW_TOKENS = 48
PROMPT_TOKENS = 60
"""Of a prompt in its format, about."""
_VERSION = 1
_DIR = "texts"


def texts_path(out: Path, label: str) -> Path:
    """Where the texts of the model `label` are, below the stage's folder."""
    return out / _DIR / f"{label}.json"


def texts_fingerprint(model_fingerprint: str) -> str:
    """Of all that a model's texts depend on."""
    from importlib.metadata import version

    settings = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "transformers": version("transformers").split(".")[0]}
    return hashes.fingerprint("eval/texts", _VERSION, settings, {"model": model_fingerprint})


def read_texts(path: Path) -> dict[str, Any] | None:
    """A model's texts, None where there are none that can be read."""
    content = atomic.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("texts"), list):
        return None
    whole = all(isinstance(each, dict) and isinstance(each.get("prompt"), str) and isinstance(each.get("text"), str)
                for each in content["texts"])  # fmt: skip
    return content if whole else None


def lacking_texts(config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path) -> list[str]:
    """The models whose texts are asked for and not there, or those of another model."""
    if not config.generations:
        return []
    return [
        label for label, fingerprint in model_fingerprints.items()
        if (read_texts(texts_path(out, label)) or {}).get("fingerprint") != texts_fingerprint(fingerprint)
    ]  # fmt: skip


def write_texts(
    model: Any, tokenizer: Any, config: ModelConfig, label: str, model_fingerprint: str, out: Path
) -> None:  # fmt: skip
    """Have a loaded model continue each prompt, greedily; one that has no room or words for them says why."""
    from lors_cli.data.asked import prompt_format, question
    from lors_cli.models.generation import Sampling, generate_text

    started, texts, reason = time.monotonic(), [], None
    folder = Path(config.path)
    form = prompt_format(folder if folder.is_dir() else None, tokenizer)
    try:
        for prompt in PROMPTS:
            said = asdict(generate_text(model, tokenizer, form, question(prompt), Sampling(NEW_TOKENS)))
            texts.append({key: said[key] for key in ("prompt", "text", "tokens", "finish_reason")})
    except UsageError as error:  # the scores do not depend on it
        reason = error.message
        console.warn(f"{label}: no short texts: {reason}")
    content = {"fingerprint": texts_fingerprint(model_fingerprint), "format": form.name, "texts": texts}
    atomic.write_json(texts_path(out, label), content | ({"reason": reason} if reason else {}))
    console.info(f"  {label} {len(texts)} short texts in {time.monotonic() - started:.1f} s")


def published(config: EvalConfig, labels: Iterable[str], out: Path) -> dict[str, str]:
    """The files of texts that belong to the results, with their SHA-256."""
    paths = [texts_path(out, label) for label in labels] if config.generations else []
    return {str(path.relative_to(out)): hashes.file_sha256(path) for path in paths if path.is_file()}


def take_over_texts(
    config: EvalConfig, model_fingerprints: Mapping[str, str], out: Path, folders: Iterable[Path]
) -> None:
    """Copy the texts that other evaluations have of the same models."""
    for folder in folders:
        for label in lacking_texts(config, model_fingerprints, out):
            if not lacking_texts(config, {label: model_fingerprints[label]}, folder):
                atomic.write_bytes(texts_path(out, label), texts_path(folder, label).read_bytes())
