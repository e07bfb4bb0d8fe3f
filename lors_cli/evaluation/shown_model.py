"""lm-eval's Hugging Face model with our scoring of choices, and our progress in place of its bars.

Imports lm_eval and torch: import this when it is needed.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from lors_cli.data.tokenising import check_known
from lors_cli.errors import UsageError
from lors_cli.evaluation.prefix_tree import Choice
from lors_cli.evaluation.scoring import score_choices
from lors_cli.machine import processes
from lors_cli.output import progress


class ShownModel(HFLM):
    """A loaded causal LM as lm-eval asks it; `title` names it and its task on the screen."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, title: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self.title = title
        self.num_cut = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        with progress.progress(self.title, len(requests), "requests") as step:
            choices = [self._choice(request) for request in requests]
            return score_choices(self.model, choices, batch_size=self.batch_size, on_progress=step.advance)

    def _choice(self, request: Any) -> Choice:
        """A request's tokens, those of lm-eval."""
        context, continuation = self._encode(*request.args)
        if not 0 < len(continuation) <= self.max_length:
            raise UsageError(
                f"{self.title}: document {request.doc_id} has a choice of {len(continuation)} tokens; "
                f"1 to {self.max_length} can be scored with this model."
            )
        tokens = [*context, *continuation]
        self.num_cut += len(tokens) > self.max_length + 1
        return Choice(tokens[-(self.max_length + 1) :][:-1], continuation, (request.task_name, request.doc_id))

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's `loglikelihood` has it, where it is no function of its own."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def tok_encode(self, *arguments: Any, **options: Any) -> list[int]:
        tokens = super().tok_encode(*arguments, **options)
        check_known(tokens, self.tokenizer)
        return tokens

    def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
        tokens, mask = super().tok_batch_encode(*arguments, **options)
        check_known(tokens.unique().tolist(), self.tokenizer)
        return tokens, mask

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """In lm-eval's batches, of prompts with the same settings and about as long, dealt out to the processes."""
        generate = super().generate_until
        found: dict[int, str] = {}
        batches = self._generation_batches(requests)
        with progress.progress(self.title, len(requests), "requests") as step:
            texts = processes.deal(
                batches,
                lambda batch: generate([requests[number] for number in batch], disable_tqdm=True),
                lambda batch: step.advance(len(batch)),
            )
        for batch, answers in zip(batches, texts, strict=True):
            found.update(zip(batch, answers, strict=True))
        return [found[number] for number in range(len(requests))]

    def _generation_batches(self, requests: list[Any]) -> list[list[int]]:
        """Numbers of the requests that are generated together, those with the longest prompts first."""
        by_settings: dict[str, list[tuple[int, str, int]]] = {}
        for number, request in enumerate(requests):
            prompt, settings = request.args
            most = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            room = self.max_length - most
            if room <= 0:
                raise UsageError(
                    f"{self.title}: answers of {most} tokens leave no room for a question; this model takes "
                    f"{self.max_length} tokens."
                )
            length = len(self.tok_encode(prompt))
            self.num_cut += length > room
            by_settings.setdefault(repr(settings), []).append((-length, prompt, number))
        return [
            [number for *_, number in part[first : first + self.batch_size]]
            for part in map(sorted, by_settings.values())
            for first in range(0, len(part), self.batch_size)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """One document at a time, since lm-eval reports none before all are done."""
        score = super().loglikelihood_rolling
        with progress.progress(self.title, len(requests), "documents") as step:
            return processes.deal(
                requests, lambda request: score([request], disable_tqdm=True)[0], lambda request: step.advance()
            )

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
