"""Fixtures that the tests of scoring share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lors_cli.evaluation.prefix_tree import Choice
from lors_cli.output import console


@pytest.fixture
def questions() -> Callable[..., list[Choice]]:
    """Makes questions of random tokens below 300."""

    def make(seed: int = 0, contexts: int = 10, longest: int = 60) -> list[Choice]:
        """Questions with four choices each; some choices are equal, one is the start of another."""
        draw = random.Random(seed)

        def tokens(most: int) -> list[int]:
            return [draw.randrange(3, 300) for _ in range(draw.randint(1, most))]

        choices = []
        for document in range(contexts):
            context, endings = [1, *tokens(longest)], [tokens(12) for _ in range(4)]
            endings[1] = [*endings[0], 7] if document % 3 == 0 else endings[1]
            endings[3] = endings[2] if document % 4 == 0 else endings[3]
            choices += [Choice([*context, *ending][:-1], ending, document) for ending in endings]
        return choices

    return make


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    monkeypatch.setattr(console, "info", lines.append)
    return lines


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_dir / "data" / "models" / "stories260k"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def own_tasks(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of definitions, as `include_path`: tasks of all output types on local documents, and groups of them."""
    folder = tmp_path_factory.mktemp("own-tasks")
    documents = shared_dir / "data" / "eval"

    def write(name: str, text: str, *rows: dict[str, Any]) -> None:
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\ntest_split: test\n{text}")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            with (folder / f"{name}.yaml").open("a") as file:
                file.write(f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n")

    for name, question in (("arc_easy", "question"), ("openbookqa", "question_stem")):
        files = {split: str(documents / name / f"{split}.jsonl.gz") for split in ("train", "test")}
        write(f"own_{name}", (
            f"dataset_kwargs: {json.dumps({'data_files': files})}\ntraining_split: train\ntag: own_tag\n"
            f"output_type: multiple_choice\ndoc_to_text: 'Question: {{{{{question}}}}}\\nAnswer:'\n"
            "doc_to_target: '{{choices.label.index(answerKey)}}'\ndoc_to_choice: '{{choices.text}}'\n"
            "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
        ))  # fmt: skip
    stories = [f"Tim saw a {thing}. The {thing} was {kind}. Tim was happy." for thing, kind in
               (("cat", "big"), ("red ball", "small"), ("dog", "very, very sad"), ("tree", "green"))]  # fmt: skip
    write("own_rolling", "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
          "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
          *({"text": story * number} for number, story in enumerate(stories, 1)))  # fmt: skip
    write("own_last_word", "output_type: loglikelihood\ndoc_to_text: start\ndoc_to_target: end\n"
          "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]\n",
          *({"start": story.rpartition(" ")[0], "end": " happy."} for story in stories))  # fmt: skip
    write("own_sums", (
        "output_type: generate_until\ndoc_to_text: 'Question: {{question}}\\nAnswer:'\ndoc_to_target: '{{answer}}'\n"
        "num_fewshot: 2\ngeneration_kwargs: {until: ['Question:'], do_sample: false, max_gen_toks: 24}\n"
        "filter_list:\n  - {name: strict-match, filter: [{function: regex, regex_pattern: '#### (\\d+)'}, "
        "{function: take_first}]}\n  - {name: first-word, filter: [{function: regex, regex_pattern: '(\\w+)'}, "
        "{function: take_first}]}\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    ), *({"question": f"Tim has {a} cats, then {b}.", "answer": "The"} for a in (1, 2, 3) for b in (4, 5)))  # fmt: skip
    (folder / "own_group.yaml").write_text(
        "group: own_group\ntask:\n  - own_arc_easy\n"
        "  - group: inner\n    task: [own_openbookqa, {task: own_last_word}]\n"
        "    aggregate_metric_list: {metric: acc, weight_by_size: false}\n"
        "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n  - {metric: acc_norm}\n"
    )
    (folder / "own_loose.yaml").write_text("group: own_loose\ntask: [own_arc_easy, own_openbookqa]\n")
    (folder / "own_looser.yaml").write_text(
        "group: own_looser\ntask: [own_loose, own_sums, {group: more, task: [rte]}]\n"
    )
    return folder
