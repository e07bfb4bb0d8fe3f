"""Scores against those of lm-eval's own command, which is `simple_evaluate` on a model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lors_cli.errors import LorsError, UsageError
from lors_cli.evaluation import harness
from lors_cli.evaluation.stage import evaluate
from lors_cli.recipe.schema import EvalConfig, ModelConfig

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASKS = ("own_group", "own_rolling", "own_sums")


@pytest.fixture(scope="module")
def model(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model, with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "stories"
    shutil.copytree(shared_dir / "data/models/stories260k", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def by_lm_eval(model: Path, own_tasks: Path, arguments: str = "", **options: Any) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task and group, under the names that ours have."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with harness._quiet():
        found = lm_eval.simple_evaluate(
            "hf", f"pretrained={model},dtype=float32,softmax_dtype=float32{arguments}", batch_size=4, device="cpu",
            task_manager=TaskManager(include_path=own_tasks, include_defaults=False), bootstrap_iters=1000, **options,
        )  # fmt: skip
    assert found is not None
    return {
        name: {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key}
        for name, metrics in found["results"].items()
    } | {"shots": found["n-shot"], "samples": found["samples"]}


def same(found: dict[str, Any], expected: dict[str, Any]) -> int:
    """How many numbers of our results were compared with lm-eval's."""
    compared = 0
    for name, metrics in found["tasks"].items():
        theirs = expected[name]
        assert set(metrics) - {"num_samples", "num_fewshot"} == set(theirs), name
        assert metrics.get("num_fewshot", 0) == expected["shots"].get(name, 0), name
        for key, value in theirs.items():
            assert metrics[key] == (None if value == "N/A" else pytest.approx(value, rel=1e-3)), (name, key)
            compared += 1
    return compared


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"limit": 12}, {"limit": 12}),
        ({"limit": 0.004, "num_fewshot": 3}, {"limit": 0.004, "num_fewshot": 3}),
        (
            {"limit": 6, "num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be kind."},
            {"limit": 6, "num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be kind.",
             "fewshot_as_multiturn": True},
        ),
        (
            {"limit": 6, "num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False},
            {"limit": 6, "num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False},
        ),
    ],
)  # fmt: skip
def test_equals_the_command_of_lm_eval(
    ours: dict[str, Any], theirs: dict[str, Any], model: Path, own_tasks: Path, tmp_path: Path
) -> None:
    tasks = TASKS if "num_fewshot" not in ours else ("own_group", "own_sums")  # rolling has no examples
    if "num_fewshot" in ours:
        tasks = ("own_arc_easy", "own_sums")
    config = EvalConfig(tasks=tasks, include_path=str(own_tasks), batch_size=4, **ours)
    (found,) = evaluate(config, {"m": ModelConfig(path=str(model))}, tmp_path, data_dir=None).values()
    expected = by_lm_eval(model, own_tasks, tasks=list(tasks), **theirs)
    assert same(found, expected) >= 8
    answers = [json.loads(line) for line in (tmp_path / "samples/m/own_sums.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in answers] == [sample["resps"] for sample in expected["samples"]["own_sums"]]
    assert any(text.strip() for row in answers for (text,) in row["generated"])


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_token_as_lm_eval_has_it(add_bos_token: bool, model: Path, own_tasks: Path, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("own_last_word", "own_arc_easy"), include_path=str(own_tasks), limit=6, batch_size=4)
    told = ModelConfig(path=str(model), add_bos_token=add_bos_token)
    (found,) = evaluate(config, {"m": told}, tmp_path, data_dir=None).values()
    expected = by_lm_eval(
        model, own_tasks, f",add_bos_token={add_bos_token}", tasks=["own_last_word", "own_arc_easy"], limit=6
    )
    assert same(found, expected) >= 8


def test_a_groups_rows_and_its_part_in_the_average(model: Path, own_tasks: Path, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("own_group", "own_rolling"), include_path=str(own_tasks), limit=5, batch_size=4)
    models = {"m": ModelConfig(path=str(model))}
    (found,) = evaluate(config, models, tmp_path, data_dir=None).values()
    tasks = found["tasks"]
    assert list(tasks) == [
        "own_group", "own_arc_easy", "own_group::inner", "own_openbookqa", "own_last_word", "own_rolling",
    ]  # fmt: skip
    assert found["groups"] == {
        "own_group": ["own_arc_easy", "own_group::inner"], "own_group::inner": ["own_openbookqa", "own_last_word"],
    }  # fmt: skip
    arc, obqa, word = (tasks[name]["acc"] for name in ("own_arc_easy", "own_openbookqa", "own_last_word"))
    assert tasks["own_group"]["acc"] == pytest.approx((5 * arc + 5 * obqa + 4 * word) / 14)
    assert tasks["own_group::inner"]["acc"] == pytest.approx((obqa + word) / 2)
    assert tasks["own_group"]["num_samples"] == 14
    assert found["average"] == {"metric": "acc", "value": tasks["own_group"]["acc"], "tasks": ["own_group"]}

    # the same pieces without their group are another result, of which nothing is scored again
    before = (tmp_path / ".pieces/m/own_arc_easy.json").stat().st_mtime_ns
    flat = EvalConfig(tasks=("own_arc_easy", "own_openbookqa", "own_last_word", "own_rolling"), limit=5, batch_size=4,
                      include_path=str(own_tasks))  # fmt: skip
    (again,) = evaluate(flat, models, tmp_path, data_dir=None).values()
    assert "groups" not in again
    assert again["average"]["value"] == pytest.approx((arc + obqa + word) / 3)
    assert (tmp_path / ".pieces/m/own_arc_easy.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "m.json").read_text()) == again


def test_a_model_without_chat_template_is_refused(shared_dir: Path, own_tasks: Path, tmp_path: Path) -> None:
    plain = ModelConfig(path=str(shared_dir / "data/models/stories260k"))
    config = EvalConfig(tasks=("own_sums",), include_path=str(own_tasks), apply_chat_template=True)
    with pytest.raises(UsageError, match="has no chat template"):
        evaluate(config, {"m": plain}, tmp_path, data_dir=None)


def test_more_examples_than_there_are(model: Path, own_tasks: Path, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("own_sums",), include_path=str(own_tasks), num_fewshot=7)
    with pytest.raises(UsageError, match="own_sums has documents for 6 examples, not 7"):
        evaluate(config, {"m": ModelConfig(path=str(model))}, tmp_path, data_dir=None)


def test_answers_longer_than_the_model_are_refused(model: Path, own_tasks: Path, tmp_path: Path) -> None:
    """lm-eval asserts it, which was shown as a bug of ours."""
    folder = tmp_path / "defs"
    folder.mkdir()
    text = (own_tasks / "own_sums.yaml").read_text().replace("max_gen_toks: 24", "max_gen_toks: 512")
    (folder / "own_sums.yaml").write_text(text)
    config = EvalConfig(tasks=("own_sums",), include_path=str(folder))
    with pytest.raises(UsageError, match=r"answers of 512 tokens leave no room.*512"):
        evaluate(config, {"m": ModelConfig(path=str(model))}, tmp_path / "out", data_dir=None)


def test_windows_of_a_perplexity_begin_with_the_bos_token_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. The cat was big and red. " * 30)
    config = EvalConfig(tasks=(), perplexity=(str(text),), perplexity_length=32, perplexity_windows=3)
    told = ModelConfig(path=str(model), add_bos_token=True)
    (found,) = evaluate(config, {"m": told}, tmp_path / "out", data_dir=None).values()
    (result,) = found["perplexity"].values()
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, 93, 31):
        window = torch.tensor([[1, *ids[start : start + 31]]])
        with torch.no_grad():
            losses.append(float(net(window, labels=window).loss))
    assert result["value"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    assert (result["tokens"], result["sequence_length"]) == (93, 32)


@pytest.mark.parametrize(
    ("was", "is_now", "words"),
    [
        ("'{{choices.label.index(answerKey)}}'", "'9'", "IndexError"),
        ("doc_to_choice: '{{choices.text}}'", "doc_to_choice: '{{choices.text'", "TemplateSyntaxError"),
        ("{metric: acc}", "{metric: acuracy}", "KeyError"),  # its log names the metric
        ("output_type: multiple_choice", "output_type: multiple_choise", "multiple_choise"),
        ("doc_to_text:", "process_results: !function mine.results\ndoc_to_text:", "ZeroDivisionError"),
    ],
)
def test_a_fault_in_ones_own_definition_is_no_bug_of_ours(
    model: Path, own_tasks: Path, tmp_path: Path, was: str, is_now: str, words: str
) -> None:
    """lm-eval raises what it comes upon, which was shown as a bug of ours with its traceback."""
    folder = tmp_path / "defs"
    folder.mkdir()
    text = (own_tasks / "own_arc_easy.yaml").read_text()
    assert was in text
    (folder / "own_arc_easy.yaml").write_text(text.replace(was, is_now))
    (folder / "mine.py").write_text("def results(doc, found):\n    return {'acc': 1 / 0}\n")
    config = EvalConfig(tasks=("own_arc_easy",), include_path=str(folder), limit=2)
    with pytest.raises(LorsError) as told:
        evaluate(config, {"m": ModelConfig(path=str(model))}, tmp_path / "out", data_dir=None)
    assert told.value.exit_code in (2, 3)
    assert "own_arc_easy" in told.value.message
    assert words in told.value.message
