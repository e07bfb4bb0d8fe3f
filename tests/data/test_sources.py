"""Text sources: what they give, and what a user's mistake is told."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard

from lors_cli.data import hub
from lors_cli.data.known import KNOWN
from lors_cli.data.prompts import TEMPLATES
from lors_cli.data.sources import SOURCES, TextSource, fingerprint_source, open_source
from lors_cli.errors import MissingError, UsageError
from lors_cli.files.revisions import commit_of, listing_of
from lors_cli.output import console

alpaca_prompt = TEMPLATES["alpaca"].prompt

TEXTS = [{"text": "one"}, {"text": "zwei ä"}, {"text": "three\nlines"}]
PAIRS = [
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"instruction": "Say {hi}.", "output": "{hi}"},
]


def _open(name: Any, want: Any = "text", split: Any = "train", data_dir: Path | None = None) -> TextSource:
    return open_source(str(name), split=split, data_dir=data_dir, want=want)


def _write(path: Path, rows: list[Any]) -> Path:
    """The rows in the format that the file's name tells."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def test_importing_loads_no_torch() -> None:
    loaded = "[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]"
    code = f"import sys, lors_cli.data.sources; print({loaded})"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst", "a.parquet"]
)
def test_local_rows(tmp_path: Path, name: str) -> None:
    texts = _open(_write(tmp_path / name, TEXTS))
    assert (texts.kind, texts.streamed, texts.path) == ("text", False, None)
    assert list(texts.rows()) == TEXTS
    assert list(texts.rows()) == TEXTS  # readable twice
    pairs = _open(_write(tmp_path / f"pairs-{name}", PAIRS), want="instructions")
    assert pairs.kind == "instructions"
    assert list(pairs.rows()) == [PAIRS[0], {"input": "", **PAIRS[1]}]


def test_json_may_be_lines_and_jsonl_may_have_blank_lines_and_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "two", "id": 7}')
    assert list(_open(path).rows()) == [{"text": "one"}, {"text": "two"}]


def test_instructions_as_text_are_prompt_and_response(tmp_path: Path) -> None:
    source = _open(_write(tmp_path / "a.jsonl", PAIRS))
    first, second = (row["text"] for row in source.rows())
    assert source.kind == "text"
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:2"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {hi}.\n\n### Response:{hi}"
    )


def test_prompt_keeps_braces() -> None:
    assert "\n{input} {0}\n" in alpaca_prompt("{input} {0}", "x")


def test_row_with_text_and_instruction_is_an_instruction(tmp_path: Path) -> None:
    source = _open(_write(tmp_path / "a.jsonl", [{**PAIRS[0], "text": "all of it"}]), want="instructions")
    assert source.kind == "instructions"


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ä\r\n\n b \n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x\n\ny"))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(b"x\n") + zstandard.compress(b"\ny"))  # in two frames
    assert list(_open(tmp_path / "c.txt.zst").rows()) == [{"text": "x\n\ny"}]
    assert list(_open(tmp_path / "a.txt").rows()) == [{"text": "ä\n\n b \n"}]
    assert list(_open(tmp_path / "b.txt.gz").rows()) == [{"text": "x\n\ny"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "a.jsonl:3: broken JSON"),
        (b'["a"]', r"a.jsonl:3: not an object but \[\"a\"\]"),
        (b'{"txt": "a"}', "a.jsonl:3: the row has no 'text'; it has 'txt'"),
        (b'{"text": null}', "a.jsonl:3: 'text' must be text, not null"),
        (b'{"text": 5}', "a.jsonl:3: 'text' must be text, not 5"),
        (b'{"text": "\xff"}', "a.jsonl:3: not UTF-8"),
        (b'{"text": "\\ud800"}', "a.jsonl:3: 'text' holds half a surrogate pair"),
    ],
)
def test_broken_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    source = _open(path)
    with pytest.raises(UsageError, match=message):
        list(source.rows())


def test_broken_instruction_rows_are_named(tmp_path: Path) -> None:
    for bad, message in (
        ({"instruction": None, "output": "b"}, ":2: 'instruction' must be text"),
        ({"instruction": "a", "input": 3, "output": "b"}, ":2: 'input' must be text"),
        ({"output": "b"}, ":2: the row has no 'instruction'"),
    ):
        source = _open(_write(tmp_path / "a.jsonl", [PAIRS[0], bad]), want="instructions")
        with pytest.raises(UsageError, match=message):
            list(source.rows())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json:2: broken JSON"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.txt", b"a\nb\n\xff", "a.txt:3: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}', "a.jsonl:1: this row is neither text nor an instruction"),
        ("a.jsonl.gz", b"not packed", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.zst", b"not packed", "a.jsonl.zst is not a whole zstd file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3], "a.jsonl.zst is not a whole zstd file"),
        ("a.txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-9], "a.txt.gz is not a whole gzip file"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet:1: not a sound Parquet file"),
        ("a.xlsx", b"text\na", "a.xlsx is of no known format"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        list(_open(tmp_path / name).rows())


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean alpaca\?") as caught:
        _open("alpacca")
    assert all(name in str(caught.value) for name in SOURCES)
    with pytest.raises(MissingError, match=r"No file .*none\.jsonl"):
        _open(tmp_path / "none.jsonl")
    with pytest.raises(MissingError, match=r"No file ~nobody-here/none\.jsonl"):
        _open("~nobody-here/none.jsonl")
    with pytest.raises(UsageError, match="is a folder"):
        _open(tmp_path)


def test_data_dir_never_falls_back_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alpaca", "c4", "slimpajama"):
        with pytest.raises(MissingError, match=str(tmp_path)):
            _open(name, data_dir=tmp_path)
    with pytest.raises(MissingError, match="nowhere is no folder"):
        _open("alpaca", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("LORS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingError, match="elsewhere is no folder"):
        _open("c4")
    assert next(iter(_open("pydoc").rows()))["text"]  # needs no folder


def test_c4_is_a_part_of_slimpajama(tmp_path: Path) -> None:
    rows = [
        {"text": "book", "meta": {"redpajama_set_name": "RedPajamaBook"}},
        {"text": "web", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    ]
    (tmp_path / "slimpajama_like").mkdir()
    _write(tmp_path / "slimpajama_like/train.jsonl.gz", rows)
    _write(tmp_path / "slimpajama_like/validation.jsonl.gz", rows[:1])
    assert list(_open("c4", data_dir=tmp_path).rows()) == [{"text": "web"}]
    assert [row["text"] for row in _open("slimpajama", data_dir=tmp_path).rows()] == ["book", "web"]
    with pytest.raises(UsageError, match=r"no row whose meta\.redpajama_set_name is RedPajamaC4"):
        list(_open("c4", data_dir=tmp_path, split="validation").rows())
    prints = {fingerprint_source(name, split="train", data_dir=tmp_path) for name in ("c4", "slimpajama")}
    assert len(prints) == 2


def test_wikitext2_has_only_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.txt.gz").write_bytes(gzip.compress(b" \n = A = \n \n\n text . \n \n"))
    assert list(_open("wikitext2-lines", split="validation", data_dir=tmp_path).rows()) == [
        {"text": " = A = \n text . "}
    ]
    with pytest.raises(MissingError, match="no train split of wikitext2"):
        _open("wikitext2", data_dir=tmp_path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_wikitext2_joins_all_rows_as_papers_do(tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(console, "warn", warned.append)
    table = ["", " = A = \n", "", " text . \n", " more . \n", ""]  # rows of the hub
    lines = [" ", " = A = ", " ", " text . ", " more . ", " "]  # of wiki.test.raw
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.txt.gz").write_bytes(gzip.compress("".join(line + ends for line in lines).encode()))
    assert list(_open("wikitext2", split="validation", data_dir=tmp_path).rows()) == [{"text": "\n\n".join(table)}]
    (found,) = warned
    assert "has 6 rows and the hub's table 4,358" in found
    assert list(_open("wikitext2-lines", split="validation", data_dir=tmp_path).rows()) == [
        {"text": " = A = \n text . \n more . "}
    ]
    assert len(warned) == 1
    digest = hashlib.sha256((tmp_path / "wikitext2/test.txt.gz").read_bytes()).hexdigest()
    prints = [
        fingerprint_source(name, split="validation", data_dir=tmp_path) for name in ("wikitext2-lines", "wikitext2")
    ]
    assert prints == [f"wikitext2:{digest}", f"wikitext2/rows:{digest}"]


def test_pydoc_gives_texts_or_pairs() -> None:
    assert set(next(iter(_open("pydoc").rows()))) == {"text"}
    pairs = _open("pydoc", want="instructions")
    assert (pairs.kind, set(next(iter(pairs.rows())))) == ("instructions", {"instruction", "input", "output"})
    prints = {fingerprint_source("pydoc", split=split, data_dir=None) for split in ("train", "validation")}
    assert len(prints) == 2


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a.jsonl", TEXTS), _write(tmp_path / "b.jsonl", TEXTS)
    before = fingerprint_source(str(a), split="train", data_dir=None)
    assert before == fingerprint_source(str(b), split="train", data_dir=None) == _open(a).fingerprint
    assert hashlib.sha256(a.read_bytes()).hexdigest() in before
    _write(a, TEXTS[:2])
    assert fingerprint_source(str(a), split="train", data_dir=None) != before


COMMIT = "c" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub cache, offline, that knows the commit of the main branch of the datasets with a name."""
    from huggingface_hub import constants

    for repo in {known.repo for known in KNOWN.values()}:
        folder = tmp_path / f"datasets--{repo.replace('/', '--')}" / "refs"
        folder.mkdir(parents=True)
        (folder / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget = (commit_of.cache_clear, listing_of.cache_clear, hub._commits.clear, hub._builder.cache_clear)
    for each in forget:
        each()
    yield
    for each in forget:
        each()


@pytest.mark.usefixtures("hub_cache")
def test_hub_fingerprints_hold_the_commit_and_need_no_network() -> None:
    found = {
        name: _open(name, want="instructions").fingerprint for name in ("alpaca", "c4", "wikitext2", "wikitext2-lines")
    }
    assert found == {
        "alpaca": f"hub:tatsu-lab/alpaca@{COMMIT}/default/train",
        "c4": f"hub:allenai/c4@{COMMIT}/en/train",
        "wikitext2": f"hub:Salesforce/wikitext@{COMMIT}/wikitext-2-raw-v1/train/rows",
        "wikitext2-lines": f"hub:Salesforce/wikitext@{COMMIT}/wikitext-2-raw-v1/train",  # as wikitext2 was
    }
    assert _open("c4").streamed
    assert _open("slimpajama").streamed
    assert not _open("alpaca").streamed
    with pytest.raises(UsageError, match="alpaca has no validation split"):
        _open("alpaca", split="validation")


@pytest.mark.usefixtures("hub_cache")
def test_that_lines_of_a_text_file_on_the_hub_are_texts_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files={"train": []}, sample_by="line"),
        as_streaming_dataset=lambda split: iter([{"text": "a"}]),
    )
    monkeypatch.setattr(hub, "_builder", lambda place: builder)
    for _ in range(2):  # looked at, and remembered
        assert "each line of its files a text of its own" in str(_open(f"org/book@{COMMIT}").found_at)
    builder.config = SimpleNamespace(data_files={"train": []})
    assert "each line" not in str(_open(f"org/rows@{COMMIT}").found_at)


@pytest.mark.usefixtures("hub_cache")
def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []
    tables = {
        "tatsu-lab/alpaca": [{**PAIRS[0], "text": "whole"}],
        "allenai/c4": [{"text": "a", "url": "b"}],
        "Salesforce/wikitext": [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " text . \n"}],
    }

    class Builder:
        hash, cache_dir = COMMIT, "/nowhere"
        config = SimpleNamespace(data_files=dict.fromkeys(("train", "validation", "test")))

        def __init__(self, repo: str, config: str | None, revision: str) -> None:
            assert revision == COMMIT
            self.asked = (repo, config)

        def download_and_prepare(self) -> None:
            pass

        def as_dataset(self, *, split: str, streaming: bool = False) -> Any:
            calls.append((*self.asked, split, streaming))
            return iter(tables[self.asked[0]])

        def as_streaming_dataset(self, *, split: str) -> Any:
            return self.as_dataset(split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    assert list(_open("alpaca", want="instructions").rows()) == [PAIRS[0]]
    assert list(_open("c4", split="validation").rows()) == [{"text": "a"}]
    assert list(_open("wikitext2", split="validation").rows()) == [{"text": "\n\n = A = \n\n\n\n\n text . \n"}]
    assert list(_open("wikitext2-lines", split="validation").rows()) == [{"text": " = A = \n text . "}]
    assert _open("alpaca", want="instructions").first_rows(1) == [PAIRS[0]]
    assert calls.pop() == ("tatsu-lab/alpaca", None, "train", True)
    assert calls == [
        ("tatsu-lab/alpaca", None, "train", False),
        ("allenai/c4", "en", "validation", True),
        *[("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)] * 2,
    ]


def test_real_files(shared_dir: Path) -> None:
    data = shared_dir / "data"
    alpaca = list(_open("alpaca", want="instructions", data_dir=data).rows())
    assert len(alpaca) == 15130
    assert sum(bool(row["input"]) for row in alpaca) == 5632
    assert len(list(_open("c4", data_dir=data).rows())) == 2268
    assert len(list(_open("slimpajama", split="validation", data_dir=data).rows())) == 158
    wiki = list(_open("wikitext2-lines", split="validation", data_dir=data).rows())
    assert len(wiki) == 1
    assert len(wiki[0]["text"].split("\n")) == 2891


def test_sizes_are_bounded_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lors_cli.data.text_files.MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr("lors_cli.data.text_files.MAX_FILE_BYTES", 1 << 20)
    row = json.dumps({"text": "a" * (2 << 20)}).encode()
    for name, content in (
        ("a.jsonl.gz", b'{"text": "x"}\n' + row),
        ("b.json.gz", b"[" + row + b"]"),
        ("c.txt.gz", row),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UsageError, match=r"more than 1 MiB"):
            list(_open(path).rows())
    (tmp_path / "d.jsonl").write_bytes(row[: 1 << 20])
    with pytest.raises(UsageError, match="broken JSON"):
        _open(tmp_path / "d.jsonl")


def test_parquet_whose_inside_is_broken(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"text": ["a", "b"] * 50}), path)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    for broken in (content[: -8 - footer] + b"\xff" * footer + content[-8:], b"PAR1" + b"\xff" * 40 + content[44:]):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match=r"x\.parquet:\d+: not a sound Parquet file"):
            list(_open(path).rows())


def test_a_number_that_python_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ' + "9" * 10_000 + "}\n")
    with pytest.raises(UsageError, match=r"x\.jsonl:1: broken JSON: a number that is too long"):
        _open(tmp_path / "x.jsonl")


def test_splits_by_name(tmp_path: Path, shared_dir: Path) -> None:
    """The split that a user names is that of the dataset or the folder; a single file has none."""
    data = shared_dir / "data"
    held = list(open_source("slimpajama", split="train", data_dir=data, chosen="validation").rows())
    assert len(held) == 158
    with pytest.raises(MissingError, match="has no test split of slimpajama, only"):
        open_source("slimpajama", split="train", data_dir=data, chosen="test")
    with pytest.raises(UsageError, match=r"alpaca has no held split, only train.\n.*Write split: train"):
        open_source("alpaca", split="train", data_dir=data, chosen="held")
    test = open_source("wikitext2-lines", split="train", data_dir=data, chosen="test")
    assert test.fingerprint == fingerprint_source("wikitext2-lines", split="validation", data_dir=data)
    file = str(_write(tmp_path / "a.jsonl", TEXTS))
    assert open_source(file, split="train", data_dir=None, chosen="train").fingerprint == _open(file).fingerprint
    with pytest.raises(UsageError, match=r"split: test is for datasets, and .*a.jsonl is one file without splits"):
        open_source(file, split="train", data_dir=None, chosen="test")
    parts = {
        open_source("pydoc", split="train", data_dir=None, chosen=name).fingerprint for name in ("train", "validation")
    }
    assert len(parts) == 2


def test_a_part_of_alpaca_says_so(
    shared_dir: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lors_cli.data.tokens import tuning_samples
    from lors_cli.recipe.schema import TuneDataConfig

    said: list[str] = []
    monkeypatch.setattr(console, "info", said.append)
    config = TuneDataConfig(num_samples=3)
    found = tuning_samples(config, tiny_tokenizer, seed=0, num_needed=None, model_max_length=4096,
                           data_dir=shared_dir / "data")  # fmt: skip
    assert said == ["  alpaca: 15,130 rows here, the original has 52,002."]
    assert (found.origin["rows"], found.origin["original_rows"]) == (15130, 52002)
