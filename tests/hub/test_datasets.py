"""The user's own datasets on the hub, with the real client libraries: ids, configurations, splits, commits, offline."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chains import Process
from hub import TOKEN, Hub, Repo

Lors = Callable[..., Process]


def said(found: Process) -> str:
    return " ".join(found.output.split())


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def talks(number: int, word: str = "cat") -> list[Any]:
    return [
        {"prompt": f"Q{index}", "messages": [{"role": "user", "content": f"Once {word} {index}"},
                                             {"role": "assistant", "content": f"a {word} saw {index} birds"}]}
        for index in range(number)
    ]  # fmt: skip


@pytest.fixture
def stories(shared_dir: Path) -> str:
    return str(shared_dir / "data" / "models" / "stories260k")


@pytest.fixture
def repo(hub: Hub, request: pytest.FixtureRequest) -> str:
    """A dataset's name that only this test asks for."""
    return f"org/{request.node.name.partition('[')[0]}"


@pytest.fixture
def show(lors: Lors, stories: str) -> Callable[..., Process]:
    """`lors data show` of a dataset, with further settings."""

    def run(dataset: str, *settings: str, **how: Any) -> Process:
        named = [f"data.dataset={dataset}", "data.max_length=400", *settings]
        return lors("data", "show", "tune/lors-alpaca", "--model", stories, "--num", "1", *named, **how)

    return run


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "data/train-00000-of-00001.parquet"])
def test_by_its_id_in_every_format(hub: Hub, show: Any, repo: str, name: str) -> None:
    repo = f"{repo}-{name.rpartition('.')[2]}-{len(name)}"
    rows: list[Any] = [{"question": f"Q{index}", "answer": f"the answer {index}"} for index in range(5)]
    table = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows)
    data = {"jsonl": lines(rows), "json": json.dumps(rows).encode(), "parquet": parquet(rows), "csv": table.encode()}
    hub.repos["dataset", repo] = Repo({name: data[name.rpartition(".")[2]]})
    found = show(repo)
    assert found.code == 0, found.output
    assert (
        f"{repo}: commit {hub.repos['dataset', repo].commit[:8]}, split train; its rows are read as question/answer"
        in said(found)
    )
    assert "5 samples" in found.output
    assert "the answer 0" in found.output


def test_configurations_splits_and_revisions(hub: Hub, show: Any, repo: str) -> None:
    readme = (
        "---\nconfigs:\n- config_name: cats\n"
        "  data_files: [{split: train_sft, path: cats.jsonl}, {split: test_sft, path: held.jsonl}]\n"
        "- config_name: dogs\n  data_files: [{split: train, path: dogs.jsonl}]\n---\n"
    )
    files = {"README.md": readme.encode(), "cats.jsonl": lines(talks(3)), "held.jsonl": lines(talks(2, "pig")),
             "dogs.jsonl": lines(talks(4, "dog"))}  # fmt: skip
    hub.repos["dataset", repo] = Repo(files)
    commit = hub.repos["dataset", repo].commit
    dogs = show(f"{repo}:dogs@{commit}")
    assert dogs.code == 0, dogs.output
    assert "4 samples" in dogs.output
    for dataset, settings, words in (
        (repo, (), f"{repo} has several configurations: cats, dogs. Write {repo}:cats or another."),
        (f"{repo}:birds", (), f"{repo} has no configuration 'birds', only cats, dogs."),
        (f"{repo}:cats", (), f"{repo} has no split train, only train_sft, test_sft. Write split: train_sft."),
        (f"{repo}:cats", ("data.split=nope",), f"{repo} has no split nope, only train_sft, test_sft."),
    ):
        refused = show(dataset, *settings)
        assert refused.code == 2, refused.output
        assert words in said(refused)
    held = show(f"{repo}:cats", "data.split=test_sft")
    assert held.code == 0, held.output
    assert "2 samples" in held.output
    assert "a pig saw" in held.output
    gone = show(f"{repo}:cats@v9")
    assert gone.code == 3, gone.output
    assert "no such branch, tag or commit" in said(gone)


def test_offline_the_cached_commit_is_used(hub: Hub, show: Any, repo: str) -> None:
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(talks(3))})
    never = show(repo, connected=False)
    assert never.code == 3, never.output
    assert "not in the hub's cache here" in said(never)
    old = hub.repos["dataset", repo].commit
    assert show(repo).code == 0
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(talks(7))})
    cached = show(repo, connected=False)
    assert cached.code == 0, cached.output
    assert f"commit {old[:8]}" in cached.output
    assert "3 samples" in cached.output
    assert "7 samples" in show(repo).output
    assert "7 samples" in show(repo, connected=False).output
    back = show(f"{repo}@{old}", connected=False)
    assert back.code in (0, 3), back.output
    assert "3 samples" in back.output or f"cannot be had at {old[:8]}" in said(back)


def test_who_may_have_it_and_what_is_a_script(hub: Hub, show: Any, repo: str) -> None:
    hub.repos["dataset", repo] = Repo({"README.md": b"", "train.jsonl": lines(talks(3))}, gated=True)
    nobody = show(repo)
    assert nobody.code == 3, nobody.output
    assert "gated" in said(nobody)
    assert show(repo, token=TOKEN).code == 0
    name = repo.rpartition("/")[2]
    hub.repos["dataset", f"scripts/{name}"] = Repo({"README.md": b"", f"{name}.py": b"import datasets\n"})
    script = show(f"scripts/{name}")
    assert script.code == 3, script.output
    assert "loading script" in said(script)
    assert f"Try scripts/{name}@refs/convert/parquet" in said(script)
    missing = show("org/none-of-this-name")
    assert missing.code == 3
    assert "org/none-of-this-name is not on the hub" in said(missing)
    empty = f"{repo}-empty"
    hub.repos["dataset", empty] = Repo({"README.md": b"nothing"})
    assert show(empty).code == 3
    broken = f"{repo}-broken"
    hub.repos["dataset", broken] = Repo({"train.jsonl": b'{"text": "a"}\n{"text": \n'})
    found = show(broken)
    assert found.code == 2, found.output
    assert f"The dataset {broken} cannot be read" in said(found)


def test_a_path_that_is_there_goes_before(hub: Hub, show: Any, place: Path) -> None:
    hub.repos["dataset", "org/both"] = Repo({"train.jsonl": lines(talks(3))})
    assert show("org/both").code == 0
    (place / "org").mkdir()
    (place / "org" / "both").mkdir()
    folder = show("org/both")
    assert folder.code == 2, folder.output
    assert "org/both is a folder" in said(folder)
    for odd in ("org/both:a:b", "a/b/c", "org/both@", "https://huggingface.co/datasets/org/both"):
        found = show(odd)
        assert found.code == 2, found.output
        assert "There is no dataset or file" in said(found)
    assert "For that dataset write org/both." in said(found)


def test_what_a_run_records_and_a_finished_one_is_known_offline(
    hub: Hub, lors: Lors, repo: str, stories: str, place: Path
) -> None:
    """Text is streamed and never in the cache of datasets; a finished stage is known again without the hub."""
    text = [{"body": f"Once upon a time there was cat {index}. " * 20} for index in range(60)]
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(text), "test.jsonl": lines(text[:9])})
    commit = hub.repos["dataset", repo].commit
    (place / "mine.yaml").write_text(
        f"name: mine\nmodel: {{path: {stories}, device: cpu}}\n"
        f"prune: {{method: wanda, calibration: {{dataset: {repo}, columns: {{text: body}}, num_samples: 4,"
        " sequence_length: 64}}\n"
        f"tune: {{data: {{dataset: {repo}, columns: {{text: body}}, max_length: 64}}, max_steps: 2, batch_size: 2}}\n"
    )
    begin = len(hub.asked)
    dry = lors("run", "mine.yaml", "--dry-run")
    assert dry.code == 0, dry.output
    assert "Nothing is in its way." in dry.output
    assert lors("run", "mine.yaml").code == 0
    assert any(commit in request for _, request, _ in hub.asked[begin:])
    manifest = json.loads((place / "runs" / "mine" / "manifest.json").read_text())
    entries = [entry for entry in manifest["inputs"] if entry["name"] == repo]
    assert [entry["revision"] for entry in entries] == [commit, commit]
    pruned = json.loads((place / "runs" / "mine" / "prune" / "stage.json").read_text())
    assert pruned["metrics"]["calibration"]["source"].startswith(f"hub:{repo}@{commit}/default/train")
    tuned = json.loads((place / "runs" / "mine" / "tune" / "stage.json").read_text())
    assert tuned["metrics"]["data"]["source"].startswith(f"hub:{repo}@{commit}/default/train")
    again = lors("run", "mine.yaml", connected=False)
    assert again.code == 0, again.output
    assert "finished earlier" in said(again) or "nothing to do" in said(again)
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(text[:50])})
    assert "nothing to do" not in said(lors("run", "mine.yaml", "--dry-run"))


def test_a_dry_run_downloads_no_data(hub: Hub, lors: Lors, repo: str, stories: str, place: Path, home: Path) -> None:
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(talks(30))})
    (place / "mine.yaml").write_text(
        f"name: mine\nmodel: {{path: {stories}, device: cpu}}\nprune: {{method: magnitude}}\n"
        f"tune: {{data: {{dataset: {repo}, max_length: 64}}, max_steps: 2}}\n"
    )
    found = lors("run", "mine.yaml", "--dry-run")
    assert found.code == 0, found.output
    assert not list((home / "datasets").glob(f"*{repo.rpartition('/')[2]}*/default/*/*/*.arrow"))


def test_perplexity_on_a_held_out_split(hub: Hub, lors: Lors, repo: str, stories: str, place: Path) -> None:
    text = [{"text": f"Once upon a time there was cat {index}. " * 20} for index in range(30)]
    hub.repos["dataset", repo] = Repo({"train.jsonl": lines(text[:1]), "test.jsonl": lines(text)})
    found = lors("eval", stories, "--out", "scores", "--perplexity", repo, "tasks=[]", "perplexity_length=64",
                 "perplexity_windows=4", "--device", "cpu")  # fmt: skip
    assert found.code == 0, found.output
    assert "split test" in found.output
    only = f"{repo}-several"
    parts = b"[{split: a, path: a.jsonl}, {split: b, path: a.jsonl}]"
    readme = b"---\nconfigs:\n- config_name: default\n  data_files: " + parts + b"\n---\n"
    hub.repos["dataset", only] = Repo({"README.md": readme, "a.jsonl": lines(text)})
    refused = lors("eval", stories, "--out", "other", "--perplexity", only, "tasks=[]", "--device", "cpu")
    assert refused.code == 2, refused.output
    assert "no held-out split to measure perplexity on, only a, b" in said(refused)
