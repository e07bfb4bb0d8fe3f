"""A hub model is known, loaded and recorded by its commit; with a hand-made hub cache, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelInfo, constants
from typer.testing import Result

from lors_cli.errors import UsageError
from lors_cli.files.revisions import commit_of, listing_of, pinned_revision
from lors_cli.models.loading import load_config, load_model, load_tokenizer
from lors_cli.models.sources import model_fingerprint
from lors_cli.recipe.schema import ModelConfig

OLD, NEW = "a" * 40, "b" * 40
REPO = "some-org/tiny"


@pytest.fixture
def cache(at_workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub cache with two commits of the workshop's model; `main` is the new one, the tag v1 the old one."""
    folder = at_workshop / "hf" / "hub"
    repo = folder / "models--some-org--tiny"
    for commit, epsilon in ((OLD, 1e-5), (NEW, 1e-3)):
        shutil.copytree("dense", repo / "snapshots" / commit)
        path = repo / "snapshots" / commit / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": epsilon}))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (repo / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(folder), raising=False)
    forget()
    yield repo
    forget()


def forget() -> None:
    """As a new process, ask again."""
    commit_of.cache_clear()
    listing_of.cache_clear()


def test_branches_tags_and_commits_offline(cache: Path) -> None:
    assert [commit_of(REPO, name) for name in ("main", "v1", OLD)] == [NEW, OLD, OLD]
    assert commit_of(REPO, "v2") is None
    assert pinned_revision(REPO, "v2") == "v2"
    assert commit_of("some-org/other", "main") is None


@pytest.mark.parametrize("name", ["../main", "a/../b", "/etc/passwd", "a\x00b", "", "~", "a b", "."])
def test_names_that_lead_out_of_the_cache_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a branch"):
        commit_of(REPO, name)


def test_a_broken_reference_counts_as_none(cache: Path) -> None:
    (cache / "refs" / "main").write_text("../../../elsewhere")
    assert commit_of(REPO, "main") is None


def test_the_hub_is_asked_once_and_the_cache_where_it_does_not_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def answer(self: Any, repo: str, *, revision: str, **_: Any) -> Any:
        asked.append((repo, revision))
        if revision == "v1":
            raise ConnectionError("no network")
        return ModelInfo(id=repo, sha=OLD, siblings=[])

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    assert [commit_of(REPO, name) for name in ("main", "main", "v1", NEW)] == [OLD, OLD, OLD, NEW]
    assert asked == [(REPO, "main"), (REPO, "v1")]
    assert (cache / "refs" / "main").read_text() == OLD, "what the hub says is known offline too"


def test_the_fingerprint_follows_the_commit(cache: Path) -> None:
    main, tag = (ModelConfig(path=REPO, revision=revision) for revision in ("main", "v1"))
    assert model_fingerprint(main) == f"hub:{REPO}@{NEW}:auto"
    assert model_fingerprint(tag) == f"hub:{REPO}@{OLD}:auto"
    assert model_fingerprint(ModelConfig(path=REPO, revision=OLD)) == model_fingerprint(tag)
    (cache / "refs" / "main").write_text(OLD)
    forget()
    assert model_fingerprint(main) == model_fingerprint(tag)


def test_a_run_reads_and_records_that_commit(cache: Path, lors: Callable[..., Result]) -> None:
    arguments = ("run", "tiny.yaml", f"model.path={REPO}", "prune.method=magnitude", "--until", "prune")
    result = lors(*arguments, "model.revision=v1")
    assert result.exit_code == 0, result.output
    record = json.loads(Path("runs/tiny/prune/stage.json").read_text())
    assert record["inputs"]["model"].startswith(f"hub:{REPO}@{OLD}")
    assert json.loads(Path("runs/tiny/prune/config.json").read_text())["rms_norm_eps"] == 1e-5
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    assert manifest["model"] == {"path": REPO, "revision": "v1", "commit": OLD}
    again = lors(*arguments, "model.revision=v1")
    assert "finished earlier" in again.output
    assert lors(*arguments).exit_code == 0
    assert json.loads(Path("runs/tiny/prune/config.json").read_text())["rms_norm_eps"] == 1e-3


def test_every_part_is_read_at_that_commit(cache: Path) -> None:
    config = ModelConfig(path=REPO, revision="v1", device="cpu")
    assert load_config(config).rms_norm_eps == load_model(config).config.rms_norm_eps == 1e-5
    assert load_tokenizer(config).eos_token_id == 257
