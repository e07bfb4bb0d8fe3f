"""Cases of data files: rows, texts and tokens that are broken in every way that files are."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from random import Random
from typing import Any

from fuzz_text import changed
from fuzz_world import ROWS, TEXTS

NAMES = ("d.jsonl", "d.jsonl", "d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.txt", "d.txt.gz", "d.parquet",
         "d.safetensors", "d.csv", "d.JSONL")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**40, "", " ", "\n", "x", "\x00", "a\x00b", "\ud800", "\u202e", "\ufeff", "\U0001f600",
    "</s>", "<s>", "[/INST]", "{{7*7}}", "{% for x in range(9) %}", "a" * 3000, [], ["x"], {}, {"text": "x"}, [[]],
)  # fmt: skip
KEYS = ("text", "instruction", "input", "output", "Text", "", "\x00", "meta", "label")
TASKS = {"arc_easy": "test", "boolq": "validation", "winogrande": "validation", "hellaswag": "validation"}
TASK_ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {"id": "1", "question": "q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "boolq": {"question": "q", "passage": "p", "idx": 0, "label": 1},
    "winogrande": {"sentence": "the _ is x", "option1": "a", "option2": "b", "answer": "1"},
    "hellaswag": {"ind": 1, "activity_label": "x", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", "endings": ["a", "b"],
                  "source_id": "s", "split": "val", "split_type": "x", "label": "0"},
}  # fmt: skip


def data_case(rng: Random, place: Path) -> list[str]:
    """A file to tune, calibrate or measure on."""
    name = rng.choice(NAMES)
    _put(place, name, rng)
    kind = rng.random()
    if kind < 0.8:
        more = [f"tune.data.{rng.choice(_DATA_SETTINGS)}"] if rng.random() < 0.4 else []
        return ["data", "show", "tiny.yaml", f"tune.data.dataset={name}", *more, "--num", "1"]
    if kind < 0.9:
        return ["eval", "dense", "--tasks", "", "--perplexity", name, "--out", "out", "perplexity_windows=1",
                "perplexity_length=16"]  # fmt: skip
    if kind < 0.97:
        return ["prune", "dense", "--out", "out", "--method", "wanda", "--calibration", name, "--num-samples", "2",
                "--sequence-length", "8"]  # fmt: skip
    return ["tune", "sparse", "--out", "out", "--dataset", name, "--max-steps", "1", "--batch-size", "2",
            "--max-length", "256", "--init", "kaiming"]  # fmt: skip


_DATA_SETTINGS = ("template=chat", "template=vicuna", "packing=isolated", "packing=concatenated", "max_length=2",
                  "num_samples=1", "train_on_prompt=true", "stream=on", "max_length=1")  # fmt: skip


def data_folder_case(rng: Random, place: Path) -> list[str]:
    """A folder of data sets, one of them broken."""
    folder = place / "data"
    if rng.random() < 0.5:
        task = rng.choice(list(TASKS))
        rows = [TASK_ROWS[task]] * 3
        rows = [_broken_row(row, rng) if rng.random() < 0.5 else row for row in rows]
        name = f"{TASKS[task]}.jsonl{rng.choice(('', '.gz'))}"
        (folder / "eval" / task).mkdir(parents=True)
        _write(folder / "eval" / task / name, _lines(rows), rng)
        return ["eval", "dense", "--tasks", task, "--limit", "2", "--data-dir", "data", "--out", "out"]
    dataset, name = rng.choice((
        ("alpaca", "alpaca/train.jsonl.gz"), ("c4", "slimpajama_like/train.jsonl.gz"),
        ("slimpajama", "slimpajama_like/train.jsonl.gz"),
    ))  # fmt: skip
    (folder / name).parent.mkdir(parents=True)
    _put(folder / Path(name).parent, Path(name).name, rng)
    return ["data", "show", "tiny.yaml", f"tune.data.dataset={dataset}", "--data-dir", "data", "--num", "1"]


def _put(folder: Path, name: str, rng: Random) -> None:
    """A broken file, or something else under its name."""
    path, kind = folder / name, rng.random()
    if kind < 0.03:
        path.mkdir()
    elif kind < 0.05:
        os.mkfifo(path)
    elif kind < 0.07:
        path.symlink_to(path.name)  # a loop
    elif kind < 0.08:
        path.symlink_to("/dev/zero")
    elif kind < 0.10:
        path.symlink_to("nowhere")
    elif name.endswith(".parquet"):
        path.write_bytes(_broken(_parquet(rng), rng))
    elif name.endswith(".safetensors"):
        path.write_bytes(_broken(_tokens(rng), rng))
    else:
        _write(path, _content(name, rng), rng)


def _write(path: Path, content: bytes, rng: Random) -> None:
    """The content, in a gzip where its name says so, that is sometimes broken in turn."""
    if path.name.lower().endswith(".gz") and rng.random() < 0.9:
        content = gzip.compress(content, mtime=0)
        if rng.random() < 0.4:
            content = content[: rng.randint(0, len(content))] if rng.random() < 0.5 else _broken(content, rng)
    path.write_bytes(content)


def _content(name: str, rng: Random) -> bytes:
    """Rows or text, broken one way."""
    rows: list[Any] = [dict(row) for row in (ROWS if rng.random() < 0.6 else TEXTS)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        rows[rng.randrange(len(rows))] = _broken_row(rng.choice(rows), rng)
    if name.startswith("d.json") and not name.startswith("d.jsonl") and rng.random() < 0.8:
        content = json.dumps(rows).encode()
    else:
        content = _lines(rows)
    kind = rng.random()
    if kind < 0.05:
        return rng.choice((b"", b"\n", b" ", b"\xef\xbb\xbf", b"[]", b"{}", b"null", b"[", b"\x00" * 100))
    if kind < 0.1:
        return b'{"text": "' + b"a" * rng.choice((10_000, 300_000)) + rng.choice((b'"}', b""))
    if kind < 0.13:
        return rng.choice((b"[" * 100_000, b'{"text":' * 100_000, b'{"text": ' + b"9" * 100_000 + b"}"))
    return changed(content, rng) if kind < 0.6 else content


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def _broken_row(row: Any, rng: Random) -> Any:
    """A row with a key lost, renamed or given a strange value; or no row at all."""
    if rng.random() < 0.15 or not isinstance(row, dict):
        return rng.choice(VALUES)
    broken = dict(row)
    key = rng.choice(list(broken) or ["text"])
    if rng.random() < 0.3:
        broken.pop(key, None)
    if rng.random() < 0.3:
        broken[rng.choice(KEYS)] = rng.choice(VALUES)
    if rng.random() < 0.6:
        broken[key] = rng.choice(VALUES)
    return broken


def _broken(content: bytes, rng: Random) -> bytes:
    """Bytes lost or changed, or none."""
    kind = rng.random()
    if kind < 0.3:
        return content
    if kind < 0.6:
        return content[: rng.randint(0, len(content))]
    spoilt = bytearray(content)
    for _ in range(rng.randint(1, 8) if spoilt else 0):
        spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    return bytes(spoilt)


def _parquet(rng: Random) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    columns: dict[str, Any] = {
        rng.choice(KEYS[:6]): rng.choice((["x", "y"], [1, 2], [None, "y"], [["x"], []], [b"\xff", b"x"], [1.5, 2.5]))
        for _ in range(rng.randint(1, 3))
    }  # fmt: skip
    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def _tokens(rng: Random) -> bytes:
    import torch
    from safetensors.torch import save

    shape = rng.choice(((4, 16), (1, 1), (0, 8), (8, 0), (16,), (2, 2, 2), (4, 64)))
    low, high = rng.choice(((0, 250), (0, 250), (-5, 3), (250, 100_000), (2**40, 2**41)))
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    dtype = rng.choice((torch.int64, torch.int64, torch.int32, torch.float32, torch.uint8, torch.bool))
    return bytes(save({rng.choice(("input_ids", "input_ids", "input_ids", "ids")): values.to(dtype)}))
