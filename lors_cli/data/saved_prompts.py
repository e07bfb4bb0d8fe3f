"""The prompt a model was tuned with as its checkpoint says it: a chat template, and the tokens that end an answer."""

from __future__ import annotations

import json
from typing import Any

from lors_cli.data.prompts import TEMPLATES, ChatTemplate, Turn
from lors_cli.data.tokenising import begin_tokens, encode, eos_token_id
from lors_cli.output import console

_BEGINS = ("", "{{- bos_token -}}\n", "{{- bos_token + ' ' -}}\n")
"""What a chat template may begin with. A space is there for tokenizers that put one before a text that is alone."""
_QUESTION, _ANSWER = "How are you?", "Well."


def chat_template(name: str, begin: str = "") -> str:
    """One of `TEMPLATES` as a chat template, which writes what `template_text` does, and the tokens around it.

    A question may have an `input` beside its content, as rows have; any other conversation is refused, as in training.

    Args:
        begin: what stands before the text, in Jinja.
    """
    template = TEMPLATES[name]
    parts = [*template.with_input.replace("{input}", "{instruction}").split("{instruction}"),
             *template.without_input.split("{instruction}"), template.before_response]  # fmt: skip
    head, middle, tail, short_head, short_tail, before = (json.dumps(part, ensure_ascii=False) for part in parts)
    assert tail == short_tail, name
    return (
        f"{{#- {name}: one question (an `input` may stand beside its content) and its answer, as lors tuned it -#}}\n"
        "{%- if messages | map(attribute='role') | join(' ') not in ('user', 'user assistant') -%}\n"
        f"{{{{- raise_exception('The prompt {name} is one question and its answer: a user, then an assistant.') -}}}}\n"
        "{%- endif -%}\n"
        f"{begin}"
        "{%- if messages[0].input -%}\n"
        f"{{{{- {head} + messages[0].content + {middle} + messages[0].input -}}}}\n"
        "{%- else -%}\n"
        f"{{{{- {short_head} + messages[0].content -}}}}\n"
        "{%- endif -%}\n"
        "{%- if messages | length == 2 -%}\n"
        f"{{{{- {tail} + {before} + messages[1].content + eos_token -}}}}\n"
        "{%- elif add_generation_prompt -%}\n"
        f"{{{{- {tail} -}}}}\n"
        "{%- endif -%}\n"
    )


def template_name(template: Any) -> str | None:
    """Which of `TEMPLATES` a chat template was made of, None of any other; some tokenizers have several, by name."""
    made = {chat_template(name, begin): name for name in TEMPLATES for begin in _BEGINS}
    return made.get(template) if isinstance(template, str) else None


def trained_template(name: str, tokenizer: Any) -> str:
    """The chat template that gives the tokens of training, where begin and text are put together as tokens."""
    trained = [*begin_tokens(tokenizer), *encode(tokenizer, [TEMPLATES[name].prompt(_QUESTION, "")])[0]]
    for begin in _BEGINS if tokenizer.bos_token is not None else _BEGINS[:1]:
        template = chat_template(name, begin)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _QUESTION}], chat_template=template, add_generation_prompt=True, tokenize=False
        )
        if encode(tokenizer, [text])[0] == trained:
            return template
    console.warn(f"no chat template gives the first tokens that {name} has in training: generation begins with others.")
    return chat_template(name, _BEGINS[bool(begin_tokens(tokenizer))])


def answer_ending(template: str | None, tokenizer: Any) -> list[int]:
    """The tokens that end an answer in training: the template's own where that is `chat`, else end-of-sequence."""
    eos = eos_token_id(tokenizer)
    if template != "chat":
        return [eos]
    rendered = ChatTemplate(tokenizer, eos).render([Turn("user", _QUESTION), Turn("assistant", _ANSWER, learnt=True)])
    if rendered.end:
        return rendered.end
    ((first, _, stop),) = rendered.spans
    return encode(tokenizer, [rendered.text[first:stop].removeprefix(_ANSWER)])[0]
