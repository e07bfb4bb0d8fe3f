"""What names of tasks stand for, against lm-eval's own index and loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lors_cli.errors import MissingError, UsageError
from lors_cli.evaluation.definitions import names_in, read_definition, tasks_folder
from lors_cli.evaluation.entries import Group, Task, groups_of, resolve, shots_text, tasks_of
from lors_cli.evaluation.pieces import eval_fingerprint
from lors_cli.evaluation.tasks import task_fingerprint
from lors_cli.recipe.schema import EvalConfig


@pytest.mark.parametrize("folder", ["mmlu", "scrolls", "arc", "leaderboard", "gpqa", "okapi/arc_multilingual", "bbh"])
def test_names_are_those_of_lm_evals_index(folder: str) -> None:
    from lm_eval.tasks._index import Kind, TaskIndex

    root = tasks_folder() / folder
    names, index = names_in(root), TaskIndex.build([root])
    kinds: dict[Kind, dict[str, Any]] = {kind: {} for kind in Kind}
    for name, entry in index.items():
        kinds[entry.kind][name] = sorted(entry.tags) if entry.kind == Kind.TAG else entry.yaml_path
    assert names.tasks == kinds[Kind.TASK] | kinds[Kind.PY_TASK]
    assert names.groups == kinds[Kind.GROUP]
    assert {tag: sorted(tasks) for tag, tasks in names.tags.items()} == kinds[Kind.TAG]


def test_a_notebooks_checkpoint_of_a_definition_is_none(tmp_path: Path) -> None:
    """It sorts before the definition itself, and won."""
    copies = tmp_path / ".ipynb_checkpoints"
    copies.mkdir()
    for path in (tmp_path / "mine.yaml", copies / "mine-checkpoint.yaml"):
        path.write_text("task: mine\n")
    assert names_in(tmp_path).tasks == {"mine": tmp_path / "mine.yaml"}


def test_an_edited_definition_is_read_again(tmp_path: Path) -> None:
    """In a notebook the fingerprint knew of the edit, and names and numbers of examples did not."""
    for shots in (1, 2):
        (tmp_path / "base.yaml").write_text(f"num_fewshot: {shots}\ntag: mine_{shots}\n")
        (tmp_path / "mine.yaml").write_text("task: mine\ninclude: base.yaml\n")
        (task,) = tasks_of(resolve(EvalConfig(tasks=(f"mine_{shots}",), include_path=str(tmp_path))))
        assert (task.name, task.num_fewshot) == ("mine", shots)


def test_a_definition_is_merged_as_lm_eval_does() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in ("mmlu/default/mmlu_anatomy.yaml", "gsm8k/gsm8k.yaml", "hellaswag/hellaswag.yaml"):
        path = tasks_folder() / name
        expected = load_yaml(path, resolve_func=False)
        found = {key: value.removeprefix("!function ") if isinstance(value, str) else value
                 for key, value in read_definition(path).items()}  # fmt: skip
        assert found == expected


def test_mmlu_is_four_groups_of_57_tasks() -> None:
    (mmlu,) = resolve(EvalConfig(tasks=("mmlu",)))
    assert isinstance(mmlu, Group)
    assert [group.name for group in groups_of([mmlu])] == [
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities",
    ]  # fmt: skip
    assert len(tasks_of([mmlu])) == 57
    assert {metric.weight_by_size for metric in mmlu.metrics} == {True}


def test_tags_wildcards_and_loose_groups_stand_for_their_tasks(own_tasks: Path) -> None:
    def names(*tasks: str) -> list[str]:
        return [entry.name for entry in resolve(EvalConfig(tasks=tasks, include_path=str(own_tasks)))]

    assert names("own_tag") == ["own_arc_easy", "own_openbookqa"]
    assert names("own_loose") == ["own_arc_easy", "own_openbookqa"]
    assert names("own_looser") == ["own_arc_easy", "own_openbookqa", "own_sums", "rte"]
    assert names("own_*") == ["own_arc_easy", "own_last_word", "own_openbookqa", "own_rolling", "own_sums"]
    assert names("arc_e*y", "own_sums")[-1] == "own_sums"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, {"own_arc_easy": 0, "own_sums": 2, "pydoc_choice": 0, "boolq": 0}),
        (3, {"own_arc_easy": 3, "own_sums": 3, "pydoc_choice": 0, "boolq": 3}),  # pydoc_choice's definition says 0
        ({"own_loose": 5, "own_looser": 3}, {"own_arc_easy": 5, "own_sums": 3, "rte": 3}),
        ({"own_group": 4}, {"own_arc_easy": 4, "own_sums": 2, "pydoc_choice": 0, "boolq": 0}),
        ({"own_group": 4, "own_arc_easy": 1, "pydoc_choice": 5, "own_sums": 0},
         {"own_arc_easy": 1, "own_openbookqa": 4, "own_sums": 0, "pydoc_choice": 5}),
    ],
)  # fmt: skip
def test_number_of_examples(wanted: Any, expected: dict[str, int], own_tasks: Path) -> None:
    names = ("own_looser",) if "rte" in expected else ("own_group", "own_sums", "pydoc_choice", "boolq")
    config = EvalConfig(tasks=names, include_path=str(own_tasks), num_fewshot=wanted)
    found = {task.name: task.num_fewshot for task in tasks_of(resolve(config))}
    assert {name: found[name] for name in expected} == expected


def test_what_is_said_of_examples(own_tasks: Path) -> None:
    def text(**options: Any) -> str:
        return shots_text(resolve(EvalConfig(include_path=str(own_tasks), **options)))

    assert text(tasks=("boolq", "own_sums")) == "own_sums 2-shot"
    assert text(tasks=("own_group",), num_fewshot={"own_arc_easy": 3}) == "own_group 0 to 3-shot"
    assert text(tasks=("boolq",)) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("own_group", "own_arc_easy")}, "own_arc_easy is named twice, by own_group and by own_arc_easy"),
        ({"tasks": ("own_tag", "own_loose")}, "own_arc_easy is named twice"),
        ({"tasks": ("own_sums",), "num_fewshot": {"own_sum": 1}}, "own_sum is not among the tasks.*\n.*own_sums"),
        ({"tasks": ("own_nothing_*",)}, "there is no task 'own_nothing_"),
        ({"tasks": ("own_grup",)}, "did you mean own_group"),
    ],
)
def test_what_cannot_be_resolved(options: dict[str, Any], message: str, own_tasks: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(EvalConfig(include_path=str(own_tasks), **options))
    assert caught.match(message) or message in str(caught.value)


def test_a_group_of_itself_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("group: a\ntask: [b]\naggregate_metric_list: [{metric: acc}]\n")
    (tmp_path / "b.yaml").write_text("group: b\ntask: [a]\naggregate_metric_list: [{metric: acc}]\n")
    with pytest.raises(UsageError, match="member of itself"):
        resolve(EvalConfig(tasks=("a",), include_path=str(tmp_path)))
    with pytest.raises(MissingError, match="folder of task definitions"):
        resolve(EvalConfig(tasks=("a",), include_path=str(tmp_path / "nothing")))


def test_a_task_that_a_group_names_twice_is_in_it_once(tmp_path: Path) -> None:
    (mela,) = resolve(EvalConfig(tasks=("mela",)))
    assert [task.name for task in tasks_of([mela])].count("mela_ar") == 1
    (tmp_path / "g.yaml").write_text("group: g\ntask: [rte, {task: rte, doc_to_text: x}]\n")
    with pytest.raises(UsageError, match="rte is named twice, in g"):
        resolve(EvalConfig(tasks=("g",), include_path=str(tmp_path)))


def test_what_a_group_says_of_a_task_holds(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        "group: g\ntask: [{task: arc_easy, num_fewshot: 2}, {task: fresh, dataset_path: json, num_fewshot: 1}]\n"
        "doc_to_text: x\naggregate_metric_list: [{metric: acc}]\n"
    )
    arc, fresh = tasks_of(resolve(EvalConfig(tasks=("g",), include_path=str(tmp_path))))
    assert (arc.name, arc.num_fewshot, arc.settings["doc_to_text"]) == ("arc_easy", 2, "x")
    assert (fresh.name, fresh.definition, fresh.num_fewshot) == ("g::fresh", None, 1)
    (alone,) = tasks_of(resolve(EvalConfig(tasks=("arc_easy",))))
    assert task_fingerprint(arc, None) != task_fingerprint(alone, None)


def test_the_users_definitions_win_and_their_files_are_in_the_fingerprint(tmp_path: Path) -> None:
    documents, module = tmp_path / "rows.jsonl", tmp_path / "utils.py"
    documents.write_text("{}\n")
    module.write_text("def text(doc): return ''\n")
    (tmp_path / "rte.yaml").write_text(
        f"task: rte\ndataset_path: json\ndataset_kwargs: {{data_files: {documents}}}\n"
        "doc_to_text: !function utils.text\n"
    )

    def fingerprint() -> str:
        (task,) = resolve(EvalConfig(tasks=("rte",), include_path=str(tmp_path)))
        assert isinstance(task, Task)
        assert not task.is_own
        return task_fingerprint(task, tmp_path)

    found = [fingerprint()]
    documents.write_text('{"a": 1}\n')
    found.append(fingerprint())
    module.write_text("def text(doc): return 'x'\n")
    found.append(fingerprint())
    assert len(set(found)) == 3


@pytest.mark.parametrize("data_dir", [None, "data"])
@pytest.mark.parametrize("module", ["utils", "package.utils"])
def test_what_a_users_group_names_for_a_task_of_lm_eval_is_in_the_fingerprint(
    module: str, data_dir: str | None, shared_dir: Path, tmp_path: Path
) -> None:
    """The function's text was not: after an edit the old scores were shown."""
    folder = tmp_path / "here"
    (folder / "package").mkdir(parents=True)
    (folder / "g.yaml").write_text(f"group: g\ntask: [arc_easy]\nprocess_docs: !function {module}.keep\n")

    def fingerprint(keep: str, folder: Path) -> str:
        (folder / f"{module.replace('.', '/')}.py").write_text(f"def keep(docs): return {keep}\n")
        (task,) = tasks_of(resolve(EvalConfig(tasks=("g",), include_path=str(folder))))
        return task_fingerprint(task, shared_dir / data_dir if data_dir else None)

    first = fingerprint("docs", folder)
    assert fingerprint("docs[:9]", folder) != first
    assert fingerprint("docs", folder.rename(tmp_path / "there")) == first


def test_fingerprints_of_prompts_move_only_when_they_do() -> None:
    def of(**options: Any) -> str:
        return eval_fingerprint(EvalConfig(tasks=("rte",), **options), {"m": "model:0"}, None)

    chat = {"apply_chat_template": True}
    plain = of()
    assert plain == of(num_fewshot=0) == of(fewshot_as_multiturn=False) == of(num_fewshot={"rte": 0})
    assert of(limit=200) == of(limit=200.0)
    assert of(**chat) == of(**chat, fewshot_as_multiturn=True)
    different = [
        plain, of(num_fewshot=1), of(**chat), of(**chat, fewshot_as_multiturn=False), of(system_instruction="x"),
        of(limit=0.5), of(limit=1),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
