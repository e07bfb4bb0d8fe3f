"""Text from a model: greedy or drawn, to the end of an answer, piece by piece where someone watches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lors_cli.data.asked import PromptFormat, Row, end_tokens, prompt_tokens, shown
from lors_cli.errors import UsageError
from lors_cli.models.blocks import model_max_length
from lors_cli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many there may be."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have so much probability."""
    seed: int = 0
    """Of the draws; each prompt starts anew with it."""

    def __post_init__(self) -> None:
        problems = {
            f"max_new_tokens {self.max_new_tokens} is not above 0": self.max_new_tokens < 1,
            f"temperature {self.temperature:g} is not 0 or above": not 0 <= self.temperature < math.inf,
            f"top_p {self.top_p:g} is not above 0 and at most 1": not 0 < self.top_p <= 1,
            f"seed {self.seed} is not from 0 to 2³² − 1": not 0 <= self.seed < 2**32,
            f"top_p {self.top_p:g} is for draws; give a temperature too": self.top_p < 1 and self.temperature == 0,
        }
        wrong = [problem for problem, is_so in problems.items() if is_so]
        if wrong:
            raise UsageError(f"{'; '.join(wrong)}.")


@dataclass(frozen=True)
class Generated:
    """What a model said."""

    prompt: str
    """What it was asked, without the words of its prompt format."""
    text: str
    tokens: int
    """New ones, the end token counted."""
    tokens_per_s: float
    finish_reason: Literal["stop", "length"]
    """stop: the model ended its answer. length: max_new_tokens, or the model's limit."""


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: PromptFormat, row: Row, sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> Generated:  # fmt: skip
    """The model's answer to a row in its prompt format; the same each time for the same seed.

    Args:
        on_text: is called with each piece of text as it comes.

    Raises:
        UsageError: the row does not fit the prompt format, or the model has no room for it.
    """
    import torch

    ids = prompt_tokens(form, row, tokenizer)
    room = model_max_length(model) - len(ids)
    if room < 1:
        raise UsageError(
            f"The prompt has {len(ids)} tokens, and the model takes {model_max_length(model)}.", "Give a shorter one."
        )
    settings = _settings(model, tokenizer, form, sampling, room)
    given = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    streamer = _streamer(tokenizer, on_text) if on_text else None
    with quiet_libraries(), _with_settings(model, settings), torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        started = time.monotonic()
        out: Any = model.generate(given, attention_mask=torch.ones_like(given), streamer=streamer)  # type: ignore[operator]
        new = out[0, len(ids) :].tolist()
        elapsed_s = time.monotonic() - started
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    ended = bool(new) and new[-1] in settings.eos_token_id
    return Generated(shown(row), text, len(new), round(len(new) / elapsed_s, 2), "stop" if ended else "length")


def _settings(model: Any, tokenizer: Any, form: PromptFormat, sampling: Sampling, room: int) -> Any:
    """transformers' settings; of the model's own only the end tokens are taken."""
    from transformers import GenerationConfig

    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room), do_sample=bool(drawn), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(form, tokenizer, own), **drawn,
    )  # fmt: skip


@contextmanager
def _with_settings(model: Any, settings: Any) -> Iterator[None]:
    """`generate` fills in what it is not told from the model's own settings, so these are put aside."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        """Hands on words where transformers would print them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
