"""The embedded source: enough text, held-out text unseen, fair questions."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from lors_cli.data import pydoc_text
from lors_cli.errors import UsageError


def _digest_in_new_process(hash_seed: str) -> str:
    code = (
        "import hashlib, json, sys; from lors_cli.data import pydoc_text as p\n"
        "v = [list(p.documents(s)) + list(p.instructions(s)) for s in ('train', 'validation')]\n"
        "v += [p.choice_items(150), p.fingerprint()]\n"
        "assert 'torch' not in sys.modules and 'tkinter' not in sys.modules\n"
        "print(hashlib.sha256(json.dumps(v).encode()).hexdigest())"
    )
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return run.stdout


def test_same_text_in_every_process() -> None:
    assert _digest_in_new_process("1") == _digest_in_new_process("2")


def test_there_is_enough_text() -> None:
    train = sum(map(len, pydoc_text.documents("train")))
    validation = sum(map(len, pydoc_text.documents("validation")))
    assert train >= 1_400_000
    assert validation >= 150_000
    assert 0.08 < validation / (train + validation) < 0.22
    assert len(list(pydoc_text.instructions("train"))) >= 2000


def test_a_document_holds_its_modules_docstrings() -> None:
    text = "\n\n\n".join([*pydoc_text.documents("train"), *pydoc_text.documents("validation")])
    assert "textwrap.dedent(text)\n" + textwrap.dedent.__doc__.split("\n")[0] in text
    assert "Module json\n\n" in text
    assert 'The "if" statement is used for conditional execution:' in text
    assert "Module _pyio" not in text
    assert "Module test." not in text


def test_no_machine_path() -> None:
    library = sysconfig.get_path("stdlib")
    for split in ("train", "validation"):
        for text in pydoc_text.documents(split):
            assert library not in text


def test_held_out_modules_and_docstrings_are_unseen() -> None:
    names: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        firsts = [text.split("\n", 1)[0] for text in pydoc_text.documents(split)]
        names[split] = {first[7:].split(".")[0] for first in firsts if first.startswith("Module ")}
    assert names["train"]
    assert names["validation"]
    assert not names["train"] & names["validation"]
    trained = {row["output"] for row in pydoc_text.instructions("train")}
    assert sum(row["output"] in trained for row in pydoc_text.instructions("validation")) <= 5


def test_held_out_topics_repeat_no_paragraph() -> None:
    train = {part for text in pydoc_text.documents("train") for part in text.split("\n\n") if len(part) > 200}
    held_out = [part for text in pydoc_text.documents("validation") for part in text.split("\n\n") if len(part) > 200]
    assert len(held_out) > 100
    assert sum(part in train for part in held_out) / len(held_out) < 0.01


def test_instructions_have_alpacas_shape() -> None:
    rows = list(pydoc_text.instructions("train"))
    for row in rows:
        assert set(row) == {"instruction", "input", "output"}
        assert row["input"] == ""
        assert 40 <= len(row["output"]) <= 1200
        assert "\x08" not in row["output"]
    starts = Counter(row["instruction"].split("`")[0] for row in rows)
    assert len(starts) >= 4
    assert max(starts.values()) < len(rows) / 2
    assert len({row["instruction"] for row in rows}) == len(rows)


def test_choice_items_are_fair() -> None:
    items = pydoc_text.choice_items(160)
    assert len({item["question"] for item in items}) == 160
    assert Counter(item["answer"] for item in items) == {0: 40, 1: 40, 2: 40, 3: 40}
    for item in items:
        assert set(item) == {"question", "choices", "answer"}
        assert len(item["choices"]) == len(set(item["choices"])) == 4
        call = item["question"].split("`")[1]
        name = call.partition("(")[0].rpartition(".")[2].lower()
        assert name not in item["choices"][item["answer"]].lower()


def test_the_marked_answer_is_the_functions_own_docstring() -> None:
    checked = 0
    for item in pydoc_text.choice_items(160):
        call = item["question"].split("`")[1]
        module, *rest = _split_call(call)
        doc = " ".join((_docstring(module, rest) or "").split())
        assert item["choices"][item["answer"]].rstrip(".") in doc
        checked += 1
    assert checked == 160


def _split_call(call: str) -> list[str]:
    """`logging.handlers.QueueHandler.emit(record)` -> the file, then the names in it."""
    parts = call.partition("(")[0].split(".")
    root = Path(sysconfig.get_path("stdlib"))
    for size in range(len(parts) - 1, 0, -1):
        for path in (root.joinpath(*parts[:size]).with_suffix(".py"), root.joinpath(*parts[:size], "__init__.py")):
            if path.is_file():
                return [str(path), *parts[size:]]
    raise AssertionError(call)


def _docstring(path: str, names: list[str]) -> str | None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    node: ast.AST = ast.parse(Path(path).read_bytes())
    for name in names:
        found = [item for item in ast.walk(node) if isinstance(item, definitions) and item.name == name]
        node = next(item for item in found if ast.get_docstring(item))
    assert isinstance(node, definitions)
    return ast.get_docstring(node)


def test_choice_items_begin_alike_and_are_not_shared() -> None:
    few, many = pydoc_text.choice_items(8), pydoc_text.choice_items(20)
    assert few == many[:8]
    few[0]["choices"].clear()
    assert len(pydoc_text.choice_items(1)[0]["choices"]) == 4


def test_too_many_choice_items() -> None:
    with pytest.raises(UsageError, match="multiple-choice items, not 1000000"):
        pydoc_text.choice_items(1_000_000)


def test_fingerprint_names_the_python() -> None:
    assert ".".join(map(str, sys.version_info[:3])) in pydoc_text.fingerprint()
