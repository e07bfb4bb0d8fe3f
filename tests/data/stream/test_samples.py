"""Streamed text: its samples, the cache they are read from, and the process that fills it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lors_cli.data import hub, tokenising
from lors_cli.data.samples import TuneData
from lors_cli.data.sources import TextSource, open_source
from lors_cli.data.stream import cache as token_cache
from lors_cli.data.stream.cache import TokenCache, make_room, open_cache
from lors_cli.data.stream.documents import START, read_documents
from lors_cli.data.stream.samples import TokenStream, is_streamed, token_budget
from lors_cli.data.stream.worker import Filler, make_filler
from lors_cli.data.tokens import tuning_data
from lors_cli.errors import LorsError, ResourceError, UsageError
from lors_cli.recipe.schema import TuneConfig, TuneDataConfig

EOS = 257
SHARD = 1000
LENGTH = 16
Open = Callable[..., TuneData]


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in small shards."""
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", SHARD)
    return tmp_path / "cache"


DOCUMENTS = [f"{index:04d}:" + chr(97 + index % 26) * (index * 37 % 90) for index in range(700)]
BLANKS = 600
"""Rows after the first ten that are left out, so many that a whole batch has no document."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = [*DOCUMENTS[:10], *["", " \n"] * (BLANKS // 2), *DOCUMENTS[10:], ""]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in texts))
    return path


@pytest.fixture
def opened(text: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the data of a tune config; the processes behind it end with the test, and import nothing of the user's."""
    for name in ("numpy", "runpy", "tokenizers", "lors_cli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the working directory was imported')")
    monkeypatch.chdir(tmp_path)
    found: list[TuneData] = []

    def make(seed: int = 0, dataset: Path = text, batch_size: int = 4, **settings: Any) -> TuneData:
        own = {key: settings.pop(key) for key in ("max_steps", "max_tokens", "epochs") if key in settings}
        data = TuneDataConfig(dataset=str(dataset), **{"max_length": LENGTH, "stream": "on", "shuffle_buffer": 32,
                                                       **settings})  # fmt: skip
        config = TuneConfig(data=data, seed=seed, batch_size=batch_size, **own)
        found.append(tuning_data(config, tiny_tokenizer, model_max_length=4096, data_dir=None))
        return found[-1]

    yield make
    for data in found:
        data.close()


def _stream_of_tokens() -> list[int]:
    return [token for document in DOCUMENTS for token in (*document.encode(), EOS)]


def _naive_blocks(length: int = LENGTH) -> list[tuple[int, ...]]:
    tokens = _stream_of_tokens()
    return [tuple(tokens[first : first + length]) for first in range(0, len(tokens) - length + 1, length)]


def _ids(data: TuneData) -> list[tuple[int, ...]]:
    return [tuple(sample["input_ids"]) for sample in data.samples]


# ---- samples


def test_samples_are_the_texts_blocks_shuffled_within_windows(opened: Open) -> None:
    blocks = _naive_blocks()
    data = opened(max_steps=40)
    found = _ids(data)
    assert len(found) == 160
    for first in range(0, 160, 32):
        assert sorted(found[first : first + 32]) == sorted(blocks[first : first + 32])
        assert found[first : first + 32] != blocks[first : first + 32]
    assert all(sample["labels"] == sample["input_ids"] for sample in data.samples)
    assert (data.num_rows, data.num_tokens, data.num_steps) == (160, 160 * LENGTH, 40)


def test_a_sample_depends_on_seed_and_position_alone(opened: Open) -> None:
    first, again, other = opened(max_steps=40), opened(max_steps=99), opened(max_steps=40, seed=1)
    places = [131, 7, 158, 60]
    assert [again.samples[place] for place in places] == [first.samples[place] for place in places]
    assert _ids(first) != _ids(other)
    assert Counter(_ids(first)) == Counter(_ids(other))


def test_the_text_begins_anew_when_it_ends(opened: Open) -> None:
    blocks = _naive_blocks()
    found = _ids(opened(max_steps=2 * len(blocks), batch_size=1))
    assert Counter(found[: len(blocks)]) == Counter(found[len(blocks) :]) == Counter(blocks)
    assert found[: len(blocks)] != found[len(blocks) :]


def test_epochs_of_a_stream(opened: Open) -> None:
    data = opened(epochs=1.5)
    assert len(data.samples) == -(-3 * len(_naive_blocks()) // 2)
    assert data.num_steps == -(-len(data.samples) // 4)
    few = opened(epochs=2, num_samples=10)
    assert Counter(_ids(few)) == Counter(2 * _naive_blocks()[:10])


def test_isolated_blocks_of_a_stream(opened: Open) -> None:
    for sample in opened(max_steps=40, packing="isolated").samples:
        position, ids = 0, sample["input_ids"]
        for place, token in enumerate(ids):
            if place and ids[place - 1] == EOS:
                position = 0
            assert sample["position_ids"][place] == position
            assert sample["labels"][place] == (-100 if position == 0 else token)
            position += 1


def test_samples_longer_than_a_shard_and_of_any_length_come_from_one_cache(opened: Open, cache_root: Path) -> None:
    for length in (LENGTH, 7, 2300):
        blocks = _naive_blocks(length)
        assert Counter(_ids(opened(epochs=1, max_length=length))) == Counter(blocks)
    assert len(list((cache_root / "tokens").iterdir())) == 1


def test_a_budget_of_tokens_is_met_exactly(opened: Open) -> None:
    for budget, lengths in ((163, [16] * 10), (168, [16] * 10 + [8]), (160, [16] * 10), (9, [9])):
        data = opened(max_tokens=budget)
        assert [len(sample["input_ids"]) for sample in data.samples] == lengths
        assert data.num_tokens == sum(lengths)
        assert data.num_steps == -(-len(lengths) // 4)
    assert opened(max_tokens=168).samples[10]["input_ids"] == opened(max_steps=3).samples[10]["input_ids"][:8]
    assert token_budget(500_000_000, 2048) == (244_141, 500_000_000 - 244_140 * 2048)


def test_too_little_text(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("abc")
    opened(max_steps=1)
    assert "at once" not in capsys.readouterr().err
    monkeypatch.setattr("lors_cli.data.tokenising.LARGE_TEXT", 2)
    opened(max_steps=1)
    assert "at once" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="too little text for one sample of 16"):
        opened(dataset=tmp_path / "short.txt", max_steps=3).samples[0]
    with pytest.raises(UsageError, match="too little text"):
        len(opened(dataset=tmp_path / "short.txt", epochs=2).samples)
    assert "at once" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"max_steps": 20}, {"max_tokens": 1280}, {"epochs": 1, "num_samples": 80}])
def test_a_cache_that_may_be_too_small_is_said_at_the_start(
    opened: Open, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for room, is_said in ((2560, False), (2559, True)):  # of 1280 tokens, two bytes each
        monkeypatch.setattr("lors_cli.data.stream.samples.size_limit", lambda room=room: room)
        opened(**settings)
        assert ("the cache of tokens may need 2.5 KiB" in capsys.readouterr().err) == is_said


def test_when_text_is_streamed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')

    def streamed(dataset: str, stream: str = "auto", **settings: Any) -> bool:
        config = TuneConfig(data=TuneDataConfig(dataset=dataset, stream=stream), **settings)  # type: ignore[arg-type]
        return is_streamed(config, open_source(dataset, split="train", data_dir=None, want="instructions"))

    assert not streamed(str(text))
    assert streamed(str(text), "on")
    assert streamed(str(text), max_tokens=100)
    assert streamed("slimpajama")
    assert not streamed("slimpajama", "off")
    assert not streamed("alpaca")
    with pytest.raises(UsageError, match="max_tokens is for text, and alpaca is instructions"):
        streamed("alpaca", max_tokens=100)
    with pytest.raises(UsageError, match=r"data\.stream: on is for text, and pydoc is instructions"):
        streamed("pydoc", "on")
    monkeypatch.setattr("lors_cli.data.stream.samples.LARGE_FILE", 20)
    assert streamed(str(text))
    assert not streamed(str(rows))
    (tmp_path / "book.txt").write_text("A whole book. " * 10)
    assert streamed(str(tmp_path / "book.txt"))


def test_endless_text_needs_a_bound(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Streamed text has no end"):
        opened(dataset=Path("c4"), epochs=1)


def test_a_broken_row_is_named(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(LorsError, match=r"broken.jsonl:2: 'text' must be text, not 7") as caught:
        opened(dataset=path, max_steps=1).samples[0]
    assert caught.value.exit_code == 2


# ---- going on


def _cache_files(root: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in root.glob("tokens/*/*.*") if path.suffix in (".safetensors", ".json")
    }


def test_a_cache_that_is_there_is_read_and_no_process_is_started(
    opened: Open, monkeypatch: pytest.MonkeyPatch, cache_root: Path
) -> None:
    first = _ids(opened(max_steps=20))
    before = _cache_files(cache_root)
    monkeypatch.setattr("lors_cli.data.stream.samples.Worker", None)
    assert _ids(opened(max_steps=20)) == first
    assert _cache_files(cache_root) == before


def test_only_what_is_needed_is_tokenised(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = opened(max_steps=8).samples  # 32 samples, one window
    assert isinstance(stream, TokenStream)
    assert len(stream[0]["input_ids"]) == LENGTH
    time.sleep(0.3)
    assert stream.cache.available() == SHARD  # 512 tokens fit into one shard
    stream = opened(max_steps=80).samples
    assert isinstance(stream, TokenStream)
    with monkeypatch.context() as patch:  # another process of the same machine has nothing made ahead
        patch.setattr("lors_cli.machine.processes.local_index", lambda: 1)
        stream[0]
    assert stream._worker is None
    stream._ready = 0
    stream[0]
    deadline = time.monotonic() + 30
    while stream.cache.available() < 2 * SHARD and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert stream.cache.available() == 2 * SHARD  # two windows of 512 tokens


@pytest.mark.parametrize("kept", [1, 7, 23])
def test_a_cache_is_gone_on_with_from_any_shard(opened: Open, cache_root: Path, kept: int) -> None:
    whole = opened(epochs=1)
    expected, files = _ids(whole), _cache_files(cache_root)
    whole.close()
    (folder,) = (cache_root / "tokens").iterdir()
    for path in folder.glob("*.safetensors"):
        if int(path.stem) >= kept:
            path.unlink()
    (folder / "end.json").unlink()
    assert _ids(opened(epochs=1)) == expected
    assert _cache_files(cache_root) == files


def test_a_killed_process_leaves_whole_shards_and_the_next_goes_on(opened: Open, text: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    large.write_text(text.read_text() * 10)
    stream = opened(dataset=large, max_steps=20_000, shuffle_buffer=40_000).samples
    assert isinstance(stream, TokenStream)
    stream._ask(40_000)
    assert stream._worker is not None
    while stream.cache.available() < 5 * SHARD:
        time.sleep(0.005)
    stream._worker._process.kill()
    with pytest.raises(ResourceError, match="killed by signal 9"):
        stream[0]
    assert stream.cache.end() is None
    blocks = _ids(opened(dataset=large, max_steps=100, shuffle_buffer=400))
    tokens = _stream_of_tokens() * 10
    assert sorted(blocks) == sorted(tuple(tokens[first : first + LENGTH]) for first in range(0, 400 * LENGTH, LENGTH))


def test_the_process_ends_with_its_owner(text: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from lors_cli.data.stream.worker import Worker
from lors_cli.data.stream.cache import open_cache
from lors_cli.data.sources import open_source
from tokenizers import Tokenizer, models
tokenizer = Tokenizer(models.BPE(vocab={{chr(97 + i): i for i in range(26)}}, merges=[])).to_str()
cache = open_cache(Path({str(tmp_path / "other")!r}), {{}}, tokenizer)
fingerprint = open_source({str(text)!r}, split="train", data_dir=None).fingerprint
worker = Worker({{"folder": str(cache.folder), "dataset": {str(text)!r}, "data_dir": None, "begin": [], "end": 0,
                 "fingerprint": fingerprint, "dtype": "uint16"}})
worker.ask(10)
print(worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, deadline = int(done.stdout), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


@pytest.mark.parametrize("batch", [10, 256])
def test_two_writers_make_one_stream(
    batch: int, text: Path, tiny_tokenizer: Any, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "BATCH_DOCUMENTS", batch)
    opened_source, reads = open_source(str(text), split="train", data_dir=None), list[int]()

    def read() -> Iterator[Any]:
        reads.append(1)
        return opened_source.rows()

    source = replace(opened_source, _read=read)
    tokenizer = tiny_tokenizer.backend_tokenizer
    caches = [open_cache(cache_root, {"source": source.fingerprint}, tokenizer.to_str()) for _ in range(2)]
    fillers = [Filler(cache, source, tokenizer, [], EOS, "uint16") for cache in caches]
    chance, wanted = random.Random(0), 0
    while caches[0].end() is None:
        wanted += 1 + chance.randrange(3 * SHARD)
        chance.choice(fillers).fill(wanted)
    tokens, starts = caches[1].read(0, caches[1].available())
    assert tokens.tolist() == _stream_of_tokens()
    assert len(reads) == 2 or batch == 256  # each once, where no batch has several shards
    assert starts.tolist() == [True, *(token == EOS for token in tokens.tolist()[:-1])]


def test_the_process_reads_the_commit_of_its_owner(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_commits", {("allenai/c4", "main"): "0" * 40})
    stream = opened(dataset=Path("c4"), max_steps=1).samples
    assert isinstance(stream, TokenStream)
    job = json.loads(json.dumps(stream._job))
    hub._commits.clear()
    hub.keep_to([("allenai/c4", "main", "1" * 40)])  # pushed meanwhile
    assert f"@{'0' * 40}/" in make_filler(job).source.fingerprint


def test_documents_go_on_from_a_position(text: Path) -> None:
    source = open_source(str(text), split="train", data_dir=None)
    batches = list(read_documents(source, START))
    assert [text for texts, _ in batches for text in texts] == DOCUMENTS
    assert len(batches) > 2
    for index, (_, position) in enumerate(batches[:-1]):
        position = json.loads(json.dumps(position))
        assert list(read_documents(source, position)) == batches[index + 1 :]


def test_streamed_datasets_go_on_from_their_own_state(tmp_path: Path) -> None:
    from datasets import load_dataset

    files = []
    for part in range(3):
        files.append(str(tmp_path / f"{part}.jsonl"))
        rows = [json.dumps({"text": f"{part}-{index}", "meta": {"redpajama_set_name": "x"}}) for index in range(400)]
        Path(files[-1]).write_text("\n".join(rows))

    def opens() -> Any:
        return load_dataset("json", data_files=files, split="train", streaming=True)

    source = TextSource("slimpajama", "text", "hub:x", None, True, lambda: iter(()), opens)
    batches = list(read_documents(source, START))
    assert [text for texts, _ in batches for text in texts] == [f"{part}-{i}" for part in range(3) for i in range(400)]
    assert [position["documents"] for _, position in batches] == [256, 512, 768, 1024, 1200]
    position = json.loads(json.dumps(batches[2][1]))
    assert [texts for texts, _ in read_documents(source, position)] == [texts for texts, _ in batches[3:]]
    del position["state"]  # begun without the hub, which knows no state
    assert [texts for texts, _ in read_documents(source, position)] == [texts for texts, _ in batches[3:]]


def test_a_broken_file_on_the_hub_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "bro')
    broken = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    commit = {("allenai/c4", "main"): "0" * 40, ("org/mine", "main"): "0" * 40}
    monkeypatch.setattr(hub, "_commits", commit)
    monkeypatch.setattr(hub, "remembered", lambda fingerprint: {"split": "train", "layout": "text"})
    monkeypatch.setattr(hub, "open_stream", lambda place, split: broken)
    for name in ("c4", "org/mine"):
        source = open_source(name, split="train", data_dir=None)
        with pytest.raises(UsageError, match="cannot be read"):
            list(read_documents(source, START))


def test_the_tokens_are_those_of_the_models_tokenizer(shared_dir: Path, cache_root: Path) -> None:
    from transformers import AutoTokenizer

    from lors_cli.data.tokenising import encode

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data/models/stories260k")
    data = TuneDataConfig(dataset="slimpajama", max_length=64, stream="on", packing="isolated", shuffle_buffer=8)
    config = TuneConfig(data=data, max_steps=4, batch_size=2)
    found = tuning_data(config, tokenizer, model_max_length=512, data_dir=shared_dir / "data")
    rows = open_source("slimpajama", split="train", data_dir=shared_dir / "data").rows()
    truth: list[int] = []
    while len(truth) < 8 * 64:
        truth += [tokenizer.bos_token_id, *encode(tokenizer, [next(rows)["text"]])[0], tokenizer.eos_token_id]
    blocks = [tuple(truth[first : first + 64]) for first in range(0, 8 * 64, 64)]
    assert sorted(_ids(found)) == sorted(blocks)
    found.close()


# ---- the cache


def _filled(root: Path, name: str, num_bytes: int, used: float) -> TokenCache:
    cache = open_cache(root, {"source": name}, "{}")
    cache.write_shard(0, np.zeros(num_bytes, dtype=np.uint8), np.zeros(0, dtype=np.int64), {})
    cache.release()
    os.utime(cache.folder / "manifest.json", (used, used))
    return cache


def test_what_was_not_used_for_longest_makes_room(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_CACHE_GIB", str(350_000 / 2**30))
    old, held, new = (_filled(cache_root, name, 100_000, used) for name, used in (("b", 10), ("a", 20), ("c", 30)))
    held.hold()
    make_room(new.folder, 10_000)
    assert all(cache.folder.is_dir() for cache in (old, held, new))
    make_room(new.folder, 100_000)
    assert [cache.folder.is_dir() for cache in (old, held, new)] == [False, True, True]
    with pytest.raises(ResourceError, match="what is in use needs more"):
        make_room(new.folder, 300_000)
    held.release()
    make_room(new.folder, 220_000)
    assert [cache.folder.is_dir() for cache in (held, new)] == [False, True]


def test_a_wrong_bound_is_a_users_mistake(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _filled(cache_root, "a", 10, 1)
    for value in ("much", "0", "-3", "nan"):
        monkeypatch.setenv("LORS_CACHE_GIB", value)
        with pytest.raises(UsageError, match="LORS_CACHE_GIB must be a number above 0"):
            make_room(cache.folder, 1)


def test_a_cache_that_is_removed_in_that_moment_is_made_again(
    cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = _filled(cache_root, "a", 10, 1)
    original, calls = fcntl.flock, []

    def flock(file: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            os.rename(cache.folder, cache_root / "elsewhere")
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    again = open_cache(cache_root, {"source": "a"}, "{}")
    assert again.folder == cache.folder
    assert (again.folder / "tokenizer.json").read_text() == "{}"
    assert again.available() == 0


def test_a_file_system_without_locks_keeps_what_may_be_in_use(
    cache_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("LORS_CACHE_GIB", str(150_000 / 2**30))
    old, new = (_filled(cache_root, name, 100_000, 10) for name in "ab")
    with pytest.raises(ResourceError, match="needs more"):
        make_room(new.folder, 10)
    assert old.folder.is_dir()
    assert "no locks" in capsys.readouterr().err


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert token_cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LORS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert token_cache.cache_dir() == Path("/x/lors")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_dir() == Path.home() / ".cache/lors"


def test_processes_that_begin_at_once_make_one_folder(tmp_path: Path) -> None:
    """Two that wrote the manifest at the same moment took each other's file away."""
    code = (
        "import sys, time; from pathlib import Path; from lors_cli.data.stream.cache import opened_folder\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "for number in range(100): opened_folder(Path(sys.argv[1]) / str(number), {'a': 1}, {'b.json': 'b' * 9000})\n"
    )
    start = str(time.time() + 3)
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), start]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert all((tmp_path / str(number) / "b.json").read_text() == "b" * 9000 for number in range(100))
