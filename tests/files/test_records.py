"""Files that are whole or absent, stages that are finished or not."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lors_cli.errors import UsageError
from lors_cli.files import atomic, hashes, records
from lors_cli.files.atomic import is_partial, read_json, remove, write_bytes, write_json, write_text
from lors_cli.files.hashes import cached_sha256, file_sha256, fingerprint, plain
from lors_cli.files.records import StageRecord, is_finished, leftovers, publish, read_record, staging_dir, work_dir
from lors_cli.machine import environment as machine_environment
from lors_cli.models.sources import locate
from lors_cli.pipeline.folders import guard_out

RECORD = StageRecord("prune", "f1", {"a": 1}, {}, {"sparsity": 0.5}, {}, 1.5, {})


class Killed(BaseException):
    """Stands for SIGKILL."""


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestWrite:
    def test_new_content_and_new_folders(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b.txt"
        write_text(path, "grün")
        assert path.read_bytes() == "grün".encode()
        write_bytes(path, b"new")
        assert path.read_bytes() == b"new"
        assert names(tmp_path) == {"a/b.txt"}

    @pytest.mark.parametrize("function", ["replace", "fsync"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_content_and_no_part(
        self, function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "old")

        def fail(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(type(error)):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == {"a.txt"}

    def test_writers_of_one_file_do_not_take_each_others_part(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, real, seen = tmp_path / "a.txt", os.replace, list[str]()

        def replaced(source: Path, target: Path) -> None:
            seen.append(source.name)
            if len(seen) == 1:  # in this moment another process writes it
                write_text(path, "other")
                assert path.read_text() == "other"
            real(source, target)

        monkeypatch.setattr(os, "replace", replaced)
        write_text(path, "mine")
        assert path.read_text() == "mine"
        assert names(tmp_path) == {"a.txt"}
        assert all(is_partial(Path(name)) for name in seen)

    def test_what_killed_writers_left_goes_and_what_others_write_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: Any, **__: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            patch.setattr(Path, "unlink", die)
            for pid in (2**22 + 1, os.getppid()):  # no process has the first number
                patch.setattr(os, "getpid", lambda pid=pid: pid)
                with pytest.raises(Killed):
                    write_text(tmp_path / "a.txt", "x")
        (tmp_path / ".of another machine.01234567-4194305-01234567.partial").touch()
        assert len(names(tmp_path)) == 3
        atomic._sweep.cache_clear()  # as a new process
        write_text(tmp_path / "b.txt", "x")
        left = names(tmp_path) - {"b.txt"}
        assert len(left) == 2
        assert not any(f"-{2**22 + 1}-" in name for name in left if "another" not in name)

    def test_the_content_is_on_disk_before_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[str] = []

        def noted(name: str, real: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                steps.append(name)
                real(*args)

            return call

        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
        write_text(tmp_path / "a", "x")
        assert steps == ["fsync", "replace", "fsync"]

    def test_json(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"ä": [1, None]})
        assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", math.nan)
        assert read_json(tmp_path / "a.json") == {"ä": [1, None]}

    @pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"])
    def test_json_that_is_absent_or_not_whole(self, content: bytes | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        assert read_json(tmp_path / "a.json") is None

    def test_nothing_is_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").touch()
        assert read_json(tmp_path / "m.gguf" / "a.json") is None


class TestHashes:
    @pytest.fixture(autouse=True)
    def small_ones_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hashes, "REMEMBERED_FROM", 0)

    def test_sha256(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        large = bytes(range(256)) * 10_000
        (tmp_path / "a").write_bytes(large)
        assert file_sha256(tmp_path / "a") == hashlib.sha256(large).hexdigest()

    def test_what_is_small_is_not_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(hashes, "REMEMBERED_FROM", 4)
        for name, content in (("small", b"abc"), ("large", b"abcd")):
            (tmp_path / name).write_bytes(content)
            os.utime(tmp_path / name, (1e9, 1e9))
            assert cached_sha256(tmp_path / name) == hashlib.sha256(content).hexdigest()
        (key,) = json.loads((tmp_path / "cache/lors/sha256.json").read_text())
        assert key.startswith(str(tmp_path / "large"))

    def test_old_files_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = tmp_path / "a"
        path.write_bytes(b"abc")
        os.utime(path, (1e9, 1e9))
        digest = cached_sha256(path)
        monkeypatch.setattr(hashes, "file_sha256", lambda _: "read again")
        assert cached_sha256(path) == digest
        os.utime(path, (1e9, 1e9 + 1))
        assert cached_sha256(path) == "read again"

    def test_young_files_are_read_every_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = tmp_path / "a"
        path.write_bytes(b"abc")
        before = cached_sha256(path)
        stat = path.stat()
        path.write_bytes(b"abd")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert cached_sha256(path) != before

    def test_a_cache_that_cannot_be_used_does_not_matter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cache").write_text("a file stands here")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = tmp_path / "a"
        path.write_bytes(b"abc")
        os.utime(path, (1e9, 1e9))
        digest = cached_sha256(path)
        assert digest == file_sha256(path)
        monkeypatch.setattr(hashes, "file_sha256", lambda _: "read again")
        assert cached_sha256(path) == digest  # once a process

    def test_a_name_that_no_record_could_say_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / os.fsdecode(b"caf\xe9")
        (folder / "dense").mkdir(parents=True)
        (folder / "a.txt").write_text("abc")
        for call in (lambda: cached_sha256(folder / "a.txt"), lambda: locate(str(folder / "dense"))):
            with pytest.raises(UsageError, match=r"caf\\xe9.*: the name is not UTF-8"):
                call()
        with pytest.raises(UsageError, match="not UTF-8"):
            guard_out(folder, "prune")

    @pytest.mark.parametrize("content", ["[]", "{", '{"key": 1}'])
    def test_a_broken_cache_is_replaced(self, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tmp_path / "lors" / "sha256.json"
        write_text(cache, content)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = tmp_path / "a"
        path.write_bytes(b"abc")
        os.utime(path, (1e9, 1e9))
        assert cached_sha256(path) == file_sha256(path)
        assert file_sha256(path) in json.loads(cache.read_text()).values()


@dataclass
class Inner:
    path: Path
    sizes: tuple[int, ...]


def test_plain() -> None:
    value = {1: Inner(Path("/a"), (1, 2)), "x": [None, True, 0.5]}
    assert plain(value) == {"1": {"path": "/a", "sizes": [1, 2]}, "x": [None, True, 0.5]}


def test_fingerprint_sees_every_part_and_no_order() -> None:
    base = fingerprint("prune", 1, {"a": 1, "b": 2}, {"model": "m"})
    assert len(base) == 32
    assert fingerprint("prune", 1, {"b": 2, "a": 1}, {"model": "m"}) == base
    others = [
        fingerprint("tune", 1, {"a": 1, "b": 2}, {"model": "m"}),
        fingerprint("prune", 2, {"a": 1, "b": 2}, {"model": "m"}),
        fingerprint("prune", 1, {"a": 1, "b": 3}, {"model": "m"}),
        fingerprint("prune", 1, {"a": 1, "b": "2"}, {"model": "m"}),
        fingerprint("prune", 1, {"a": 1, "b": 2}, {"model": "n"}),
    ]
    assert len({base, *others}) == 6


def stage(folder: Path, files: dict[str, str]) -> None:
    staging = staging_dir(folder)
    for name, text in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_text(text)


class TestPublish:
    def test_it_moves_everything_and_writes_the_record(self, tmp_path: Path) -> None:
        work_dir(tmp_path, "f1")
        stage(tmp_path, {"model": "weights", "sub/file": "x"})
        assert not is_finished(tmp_path, "f1")
        record = publish(tmp_path, RECORD)
        assert names(tmp_path) == {"model", "sub/file", "stage.json"}
        assert not (tmp_path / ".work").exists()
        assert record.files == {name: file_sha256(tmp_path / name) for name in ("model", "sub/file")}
        assert read_record(tmp_path) == record == replace(RECORD, files=record.files)
        assert is_finished(tmp_path, "f1")

    def test_it_is_not_finished_for_another_fingerprint_or_with_a_missing_file(self, tmp_path: Path) -> None:
        stage(tmp_path, {"model": "weights", "sub/file": "x"})
        publish(tmp_path, RECORD)
        assert not is_finished(tmp_path, "f2")
        (tmp_path / "sub/file").unlink()
        assert not is_finished(tmp_path, "f1")
        (tmp_path / "sub/file").write_text("y")
        assert not is_finished(tmp_path, "f1")
        (tmp_path / "sub/file").write_text("x")
        assert is_finished(tmp_path, "f1")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "prune"}', '{"unknown": 1}'])
    def test_a_record_that_is_none(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "stage.json").write_text(content)
        assert read_record(tmp_path) is None
        assert not is_finished(tmp_path, "f1")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        assert not is_finished(tmp_path / "nowhere", "f1")

    def test_files_of_an_earlier_result_go_and_the_users_stay(self, tmp_path: Path) -> None:
        stage(tmp_path, {"model-1-of-2": "a", "model-2-of-2": "b"})
        publish(tmp_path, RECORD)
        (tmp_path / "notes.txt").write_text("mine")
        stage(tmp_path, {"model": "c"})
        record = publish(tmp_path, replace(RECORD, fingerprint="f2"))
        assert names(tmp_path) == {"model", "notes.txt", "stage.json"}
        assert set(record.files) == {"model"}

    def test_a_record_that_cannot_be_written_leaves_the_old_result(self, tmp_path: Path) -> None:
        stage(tmp_path, {"model": "a"})
        publish(tmp_path, RECORD)
        stage(tmp_path, {"model": "b"})
        with pytest.raises(ValueError, match="not JSON compliant"):
            publish(tmp_path, replace(RECORD, fingerprint="f2", metrics={"loss": math.nan}))
        assert is_finished(tmp_path, "f1")

    def test_files_of_a_result_that_was_undone_go_too(self, tmp_path: Path) -> None:
        stage(tmp_path, {"model": "a", "grid/scales": "b"})
        publish(tmp_path, RECORD)
        for _ in range(2):  # a kill before the new result, and undone again
            records.undo(tmp_path)
            assert names(tmp_path) == {"model", "grid/scales", ".publishing.json"}
        stage(tmp_path, {"model": "c"})
        publish(tmp_path, RECORD)
        assert names(tmp_path) == {"model", "stage.json"}
        records.undo(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    # Every call that changes the folder, in turn: the run is killed just before it.
    @pytest.mark.parametrize("step", range(12))
    def test_a_kill_at_any_step_leaves_an_unfinished_stage_or_the_whole_one(
        self, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage(tmp_path, {"model-1-of-2": "old", "model-2-of-2": "old", "config": "old"})
        publish(tmp_path, RECORD)
        stage(tmp_path, {"model": "new", "config": "new"})
        count = 0

        def killing(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > step:
                    raise Killed
                return real(*args, **kwargs)

            return call

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing(os.replace))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            patch.setattr(records.shutil, "rmtree", killing(records.shutil.rmtree))
            try:
                publish(tmp_path, replace(RECORD, fingerprint="f2"))
            except Killed:
                killed = True
        assert killed == (step < count)
        if is_finished(tmp_path, "f1"):
            assert all((tmp_path / name).read_text() == "old" for name in ("model-1-of-2", "model-2-of-2", "config"))
        if is_finished(tmp_path, "f2"):
            assert (tmp_path / "model").read_text() == (tmp_path / "config").read_text() == "new"
            assert not (tmp_path / "model-1-of-2").exists()

        # The next run, with other results again, ends in exactly its own files.
        stage(tmp_path, {"third": "3"})
        publish(tmp_path, replace(RECORD, fingerprint="f3"))
        assert is_finished(tmp_path, "f3")
        assert {name for name in names(tmp_path) if not name.endswith(".partial")} == {"third", "stage.json"}

    def test_the_record_comes_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        moved: list[str] = []
        real = os.replace

        def move(source: Path, target: Path) -> None:
            moved.append(target.name)
            real(source, target)

        monkeypatch.setattr(os, "replace", move)
        stage(tmp_path, {"zzz": "1", "aaa": "2"})
        publish(tmp_path, RECORD)
        assert moved == [".publishing.json", "aaa", "zzz", "stage.json"]


class TestWorkAndStaging:
    def test_work_of_the_same_fingerprint_stays(self, tmp_path: Path) -> None:
        (work_dir(tmp_path / "s", "f1") / "block").write_text("x")
        assert (work_dir(tmp_path / "s", "f1") / "block").read_text() == "x"

    def test_work_of_another_fingerprint_goes(self, tmp_path: Path) -> None:
        (work_dir(tmp_path, "f1") / "block").write_text("x")
        assert names(work_dir(tmp_path, "f2")) == {"fingerprint.json"}
        assert names(work_dir(tmp_path, "f1")) == {"fingerprint.json"}

    @pytest.mark.parametrize("content", [None, "", '"f1'])
    def test_work_without_a_whole_fingerprint_goes(self, content: str | None, tmp_path: Path) -> None:
        work = work_dir(tmp_path, "f1")
        (work / "block").write_text("x")
        (work / "fingerprint.json").unlink()
        if content is not None:
            (work / "fingerprint.json").write_text(content)
        assert not (work_dir(tmp_path, "f1") / "block").exists()

    def test_staging_is_empty(self, tmp_path: Path) -> None:
        (staging_dir(tmp_path / "s") / "left").write_text("x")
        assert names(staging_dir(tmp_path / "s")) == set()


class TestLeftovers:
    def finished(self, folder: Path) -> None:
        stage(folder, {"model": "w"})
        publish(folder, RECORD)

    def test_a_kill_after_the_record_leaves_what_is_removed(self, tmp_path: Path) -> None:
        self.finished(tmp_path)
        assert leftovers(tmp_path) == []
        work_dir(tmp_path, "f1")
        staging_dir(tmp_path)
        write_json(tmp_path / ".publishing.json", ["model"])
        remove(leftovers(tmp_path))
        assert names(tmp_path) == {"model", "stage.json"}
        assert is_finished(tmp_path, "f1")

    def test_half_removed_work_is_removed(self, tmp_path: Path) -> None:
        self.finished(tmp_path)
        (work_dir(tmp_path, "f1") / "block").write_text("x")
        (tmp_path / ".work" / "fingerprint.json").unlink()
        remove(leftovers(tmp_path))
        assert not (tmp_path / ".work").exists()

    def test_work_of_other_settings_is_kept(self, tmp_path: Path) -> None:
        self.finished(tmp_path)
        (work_dir(tmp_path, "f2") / "block").write_text("x")
        assert leftovers(tmp_path) == []


def test_environment_is_plain_json() -> None:
    environment = machine_environment.environment()
    assert environment["packages"]["torch"] != "absent"
    assert json.loads(json.dumps(environment)) == environment


class TestHostileRecords:
    """Records and journals are read from folders that anyone may have written."""

    @pytest.mark.parametrize("name", ["../keep", "a/../../keep", "/etc/passwd", "", "a\0b"])
    def test_a_record_that_names_files_elsewhere_is_none(self, tmp_path: Path, name: str) -> None:
        write_json(tmp_path / "stage.json", {**plain(RECORD), "files": {name: "0"}})
        assert read_record(tmp_path) is None

    @pytest.mark.parametrize(("key", "value"), [
        ("files", ["a"]), ("files", {"a": None}), ("metrics", None), ("inputs", 3), ("fingerprint", None),
        ("elapsed_s", "1"), ("config", []),
    ])  # fmt: skip
    def test_a_record_of_other_types_is_none(self, tmp_path: Path, key: str, value: Any) -> None:
        write_json(tmp_path / "stage.json", plain(RECORD))
        assert read_record(tmp_path) == RECORD
        write_json(tmp_path / "stage.json", {**plain(RECORD), key: value})
        assert read_record(tmp_path) is None

    @pytest.mark.parametrize("journal", [["../keep"], ["/etc/passwd", "../keep"], {"../keep": 1}, "x", 3, [["x"]]])
    def test_publishing_deletes_nothing_outside_the_folder(self, tmp_path: Path, journal: Any) -> None:
        folder, keep = tmp_path / "stage", tmp_path / "keep"
        keep.write_text("mine")
        write_json(folder / ".publishing.json", journal)
        write_json(folder / "stage.json", {**plain(RECORD), "files": {"../keep": "0"}})
        (staging_dir(folder) / "a").write_text("new")
        publish(folder, RECORD)
        assert keep.read_text() == "mine"
        assert names(folder) == {"a", "stage.json"}

    def test_json_without_end_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text("[" * 100_000)
        assert read_json(tmp_path / "x.json") is None
