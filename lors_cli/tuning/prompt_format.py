"""The prompt that was learnt, given to a checkpoint's tokenizer and generation settings."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from lors_cli.data.prompts import TEMPLATES
from lors_cli.data.saved_prompts import answer_ending, trained_template
from lors_cli.data.tokenising import eos_token_id
from lors_cli.output import console

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What acts where `do_sample` is true alone; transformers refuses to save it without, once a setting has changed."""


def fit_to_prompt(network: PreTrainedModel, tokenizer: Any, template: str | None) -> dict[str, Any]:
    """Give tokenizer and generation settings the prompt that was learnt; what stage.json says of it.

    Args:
        template: `tune.data.template`; None where text was learnt, and the base's own chat template stays.
    """
    if template in TEMPLATES:
        tokenizer.chat_template = trained_template(template, tokenizer)
    ending = answer_ending(template, tokenizer)
    said = tokenizer.decode(ending).strip()
    if len(ending) > 1 and ending[-1] not in tokenizer.added_tokens_decoder:
        console.warn(f"answers end in {said!r}, {len(ending)} tokens: give it to generate() as stop_strings.")
        ending = [eos_token_id(tokenizer)]
    settings = network.generation_config
    if settings is not None:
        before = settings.eos_token_id
        known = before if isinstance(before, list) else [] if before is None else [before]
        ends = list(dict.fromkeys([ending[-1], *known]))
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        _leave_out_sampling(settings)
    return {"prompt": {"format": template, "ends_with": said}} if template else {}


def _leave_out_sampling(settings: GenerationConfig) -> None:
    usual = GenerationConfig()
    idle = [] if settings.do_sample else [name for name in SAMPLING if getattr(settings, name) != getattr(usual, name)]
    for name in idle:
        setattr(settings, name, getattr(usual, name))
    if idle:
        console.detail(f"  generation_config.json: {', '.join(idle)} had no effect without do_sample and are left out")
