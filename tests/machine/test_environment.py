"""What is noted of the code, the hub and the machine; and torch's settings for the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lors_cli.errors import UsageError
from lors_cli.machine import environment
from lors_cli.machine.determinism import WORKSPACE, determinism
from lors_cli.machine.devices import processor
from lors_cli.machine.environment import code_version
from lors_cli.pipeline.manifest import hub_commit
from lors_cli.pipeline.repeat import differences


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a package in it, one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "code.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def version(folder: Path) -> dict[str, object] | None:
    code_version.cache_clear()
    return code_version(folder / "package")


def test_the_commit_and_whether_the_package_differs_from_it(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert version(checkout) == {"commit": head, "dirty": False}
    (checkout / "notes.txt").write_text("not the package's")
    assert version(checkout) == {"commit": head, "dirty": False}
    (checkout / "package" / "new.py").write_text("y = 2\n")
    assert version(checkout) == {"commit": head, "dirty": True}


def test_packed_and_detached_and_worktrees(checkout: Path, tmp_path: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    git(checkout, "pack-refs", "--all")
    assert version(checkout) == {"commit": head, "dirty": False}
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    (tmp_path / "tree" / "package" / "code.py").write_text("x = 2\n")
    assert version(tmp_path / "tree") == {"commit": head, "dirty": True}
    git(tmp_path / "tree", "commit", "-qam", "second")
    assert version(tmp_path / "tree") == {"commit": git(tmp_path / "tree", "rev-parse", "HEAD"), "dirty": False}
    git(checkout, "checkout", "-q", "--detach")
    assert version(checkout) == {"commit": head, "dirty": False}


def test_an_installed_package_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    (tmp_path / "site" / "package").mkdir(parents=True)
    assert version(tmp_path / "site") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert version(checkout) is None


def test_hub_commits_come_from_the_fingerprint() -> None:
    assert hub_commit(f"hub:owner/name@{'d' * 40}:bfloat16") == "d" * 40
    assert hub_commit(f"hub:allenai/c4@{'c' * 40}/en/train") == "c" * 40
    assert hub_commit("hub:owner/other@main:auto") is None
    assert hub_commit("jsonl:0123") is None


def test_the_processor_has_a_name() -> None:
    assert processor()


def test_determinism_is_on_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "nonsense")

    def state() -> tuple[bool, ...]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32,
                matmul.allow_tf32)  # fmt: skip

    before = state()
    with determinism(False):
        assert state() == before
        assert os.environ[WORKSPACE] == "nonsense"
    with determinism(True):
        assert state() == (True, True, False, False, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert state() == before


def test_an_operation_without_such_a_form_is_the_users_to_know() -> None:
    with pytest.raises(UsageError, match=r"deterministic: put_ does not") as caught, determinism(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert caught.value.exit_code == 2
    with pytest.raises(RuntimeError, match="another"), determinism(True):
        raise RuntimeError("another")


def test_amx_is_noted_and_a_repeat_says_that_it_was_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for features in ("flags : fpu amx_bf16 amx_tile", "flags : fpu amx_bf16x"):
        monkeypatch.setattr(environment, "processor_features", lambda features=features: features)
        found.append(environment.hardware())
    assert differences(*found) == ["amx was True, is False"]
