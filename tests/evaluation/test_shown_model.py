"""lm-eval's model with our scoring, against lm-eval's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from same_scores import assert_same

from lors_cli.errors import UsageError
from lors_cli.evaluation import harness
from lors_cli.evaluation.entries import resolve
from lors_cli.evaluation.shown_model import ShownModel
from lors_cli.machine import processes
from lors_cli.models.checks import check_vocabulary
from lors_cli.output import progress
from lors_cli.recipe.schema import EvalConfig


def both(model: Any, tokenizer: Any, requests: list[Any]) -> tuple[list[Any], list[Any], int]:
    """Our results, lm-eval's, and how many requests were cut."""
    from lm_eval.models.huggingface import HFLM

    with harness._quiet() as told:
        ours = ShownModel(model, tokenizer, 8, "x")
        found = ours.loglikelihood(requests)
        plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32")
        expected = plain.loglikelihood(requests, disable_tqdm=True)
    assert ours.num_cut >= len(told[harness._CUT])  # lm-eval tells of one of those that share all but their last token
    return found, expected, ours.num_cut


@pytest.mark.parametrize(
    "task", ["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande", "pydoc_choice"]
)
def test_equals_lm_eval(task: str, stories: tuple[Any, Any], shared_dir: Path, tmp_path: Path) -> None:
    with harness._quiet():
        (entry,) = resolve(EvalConfig(tasks=(task,)))
        loaded = harness.load_task(entry, data_dir=shared_dir / "data", folder=tmp_path)
        loaded.build_all_requests(limit=12, rank=0, world_size=1)
    found, expected, num_cut = both(*stories, loaded.instances)
    assert_same(found, expected)
    documents: dict[int, list[int]] = {}
    for number, request in enumerate(loaded.instances):
        documents.setdefault(request.doc_id, []).append(number)
    for numbers in documents.values():
        doc = loaded.instances[numbers[0]].doc
        metrics = [loaded.process_results(doc, [results[i] for i in numbers]) for results in (found, expected)]
        assert metrics[0] == metrics[1]
    assert len(documents) == 12
    assert (num_cut > 0) == (task == "boolq")


def instances(*pairs: tuple[str, str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index, metadata=("t", index // 2, 1))
        for index, pair in enumerate(pairs)
    ]


def test_tokens_are_those_of_lm_eval(stories: tuple[Any, Any]) -> None:
    long = "Once upon a time there was a very small cat. " * 60
    requests = instances(
        ("", "Once upon a time"), ("", " and then"), ("The cat  ", "sat"), ("The cat", " sat"), ("<s>The cat", " sat"),
        (long, "It was red."), (long, "They all ran home."), (long, "It was red."), ("\n", "x"), ("", "<s> a"),
    )  # fmt: skip
    found, expected, num_cut = both(*stories, requests)
    assert_same(found, expected, tolerance=3e-4)
    assert num_cut == 3


def test_choice_that_does_not_fit_is_refused(stories: tuple[Any, Any]) -> None:
    lm = ShownModel(*stories, 8, "tuned t")
    with pytest.raises(UsageError, match=r"tuned t: document 0 has a choice of \d+ tokens; 1 to 512"):
        lm.loglikelihood(instances(("a", " fox" * 600)))


def test_a_token_that_the_model_has_no_embedding_for_is_named(stories: tuple[Any, Any]) -> None:
    import copy

    tokenizer = copy.deepcopy(stories[1])
    tokenizer.add_tokens(["<image>"])
    check_vocabulary(tokenizer, len(tokenizer) - 1, "model")
    lm = ShownModel(stories[0], tokenizer, 8, "x")
    with pytest.raises(UsageError, match="'<image>', token 512"):
        lm.loglikelihood(instances(("What is <image>?", " a cat")))
    with pytest.raises(UsageError, match="'<image>', token 512"):
        lm.tok_batch_encode(["What is this?", "And <image>?"])
    assert lm.tok_encode("What is this?")


def test_bfloat16_agrees_within_rounding(stories: tuple[Any, Any], told: list[str]) -> None:
    import copy

    model, tokenizer = copy.deepcopy(stories[0]).bfloat16(), stories[1]
    requests = instances(*((f"One day {name} went to the", f" {place}.") for name in ("Tim", "a cat", "the big red dog")
                           for place in ("park", "lake with a boat")))  # fmt: skip
    found, expected, _ = both(model, tokenizer, requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=0.5)
    assert told == []


def test_rolling_likelihood_is_scored_document_by_document(
    stories: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = ["Once upon a time there was a cat. " * 40, "The cat sat.", "A dog ran home. " * 3]
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts]
    model, tokenizer = stories
    shown = ShownModel(model, tokenizer, 2, "x")
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
    expected = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    assert shown.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)
    counted: list[int] = []  # with what another process does, too
    monkeypatch.setattr(progress.Task, "advance", lambda task, amount=1: counted.append(amount))
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, expected[1:2]])
    assert shown.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)
    assert sum(counted) == len(requests)
