"""Cases of text that people write: recipes, stage configs, sweeps, key=value settings and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz_world import RECIPE, SWEEP

from lors_cli.recipe.checking import subsection
from lors_cli.recipe.schema import Recipe

SCALARS = (
    "", "~", "null", "true", "no", "0", "-1", "1", "2", "16", "0.5", "1e-3", "1e999", "-1e999", ".nan", ".inf", "-.inf",
    "9" * 30, "0x10", "0o7", "1_000", "12:30:45", "2:4", "4:2", "0:0", "9999:9999", "2:4:8", "unstructured", "wanda",
    "sparsegpt", "lors", "dense", "dense/", "./dense", "../base/dense", "/", "/dev/null", "/dev/zero", "~root", "~",
    ".", "..", "rows.jsonl", "text.jsonl", "missing.jsonl", "c4", "alpaca", "pydoc", "arc_easy", "../../etc/passwd",
    "package://os/x.gguf", "package://../x.gguf", "package://lors_cli/../../x.gguf", "org/name", "org/name/more",
    "hf://x", "https://user:secret@example.org/x", "file:///etc/passwd", "'quoted'", '"double"', "[]", "{}", "[a, b]",
    "[[[[]]]]", "{a: {b: {c: d}}}", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!binary aGVsbG8=", "!!set {a, b}", "!include x.yaml", "&a 1", "*a", "*missing", "<<: *a", "| \n  block",
    ">-\n  x", "\u00e9\u4e2d\U0001f600", "\u202eabc", "\u2028", "\ufeff", "a" * 5000, "`id`", "$(id)", "; rm -rf x",
    "%s%n", "{{7*7}}", "<script>alert(1)</script>", "a\\0b", '"a\\0b"', '"\\ud800"', '"\\u202e"', "2026-01-01", "=",
    "- a", "? a", "# a", "@a", "`a", "{", "[", "]", "}", "'", '"', ": :", "---", "...", "%YAML 1.1", "\t",
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\r\n", b"\r", b"\t", b"\n---\n", b"\n...\n",
    b"%YAML 1.2\n---\n", b"&x ", b"*x", b"<<: ", b"!!python/object:os.system ", b"- ", b"  ", b": ", b"{", b"}", b"[",
    b"]", b"'", b'"', b"#", b"|", b">", b"? ", b"\x1b[31m", b"\xc2\x85", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"\x7f",
)  # fmt: skip
FLAGS = {
    "prune": ("--method", "--pattern", "--sparsity", "--calibration", "--num-samples", "--sequence-length", "--seed"),
    "tune": ("--method", "--dataset", "--rank", "--alpha", "--init", "--max-length", "--learning-rate", "--epochs",
             "--max-steps", "--max-tokens", "--batch-size", "--seed"),
    "eval": ("--tasks", "--perplexity", "--limit", "--batch-size"),
}  # fmt: skip
COMMON_FLAGS = ("--device", "--dtype", "--data-dir", "--config", "--out")


def recipe_case(rng: Random, place: Path) -> list[str]:
    """A recipe or a stage's config, changed or made up."""
    content = made_up_recipe(rng).encode() if rng.random() < 0.3 else changed(RECIPE.encode(), rng)
    (place / "r.yaml").write_bytes(content)
    if rng.random() < 0.12:
        return [rng.choice(("prune", "tune", "eval")), "dense", "--config", "r.yaml", "--out", "out", "--dry-run"]
    if rng.random() < 0.1:
        return ["data", "show", "r.yaml", "--model", "dense", "--num", "1"]
    return ["run", "r.yaml", "--out", "out", "--dry-run", *_json(rng)]


def sweep_case(rng: Random, place: Path) -> list[str]:
    """A sweep's file, changed."""
    (place / "s.yaml").write_bytes(changed(SWEEP.encode(), rng))
    only = ["--only", rng.choice((*SCALARS, "lors*", "[", "*"))] if rng.random() < 0.2 else []
    return ["sweep", "s.yaml", "--out", "out", "--dry-run", *_json(rng), *_as_flags(only)]


def override_case(rng: Random, place: Path) -> list[str]:
    """Settings and flags on the command line."""
    if rng.random() < 0.7:
        keys = [*key_paths(Recipe)]
        settings = [setting(rng, keys) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        command = ["sweep", "../base/search.yaml"] if rng.random() < 0.1 else ["run", "tiny.yaml"]
        return [*command, "--out", "out", "--dry-run", *_json(rng), "--", *settings]
    stage = rng.choice(("prune", "tune", "eval"))
    model = rng.choice(("dense", "dense", "sparse", *SCALARS))
    schema = subsection(Recipe, stage)
    assert schema is not None
    flags: list[str] = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        flags += _as_flags([rng.choice((*FLAGS[stage], *COMMON_FLAGS)), _argument(rng)])
    settings = [setting(rng, [*key_paths(schema)]) for _ in range(rng.choice((0, 1, 2)))]
    return [stage, "--out", "out", "--dry-run", *_json(rng), *flags, "--", model, *settings]


def setting(rng: Random, keys: list[str]) -> str:
    """A KEY=VALUE, mostly of a key that there is."""
    key = rng.choice(keys)
    if rng.random() < 0.25:
        key = changed_text(key, rng)
    return f"{key}{rng.choice(('=', '=', '=', '=', '==', '', ' = ', ':'))}{_argument(rng)}"


def _argument(rng: Random) -> str:
    """A value as a shell can hand it over: no NUL, but bytes that are no UTF-8 are possible."""
    text = rng.choice(SCALARS)
    if rng.random() < 0.15:
        text = changed_text(text, rng)
    return text.replace("\x00", "")


def _as_flags(words: list[str]) -> list[str]:
    """`--flag=value`, so that a value may begin with a dash."""
    return [f"{flag}={value}" for flag, value in zip(words[::2], words[1::2], strict=True)]


def _json(rng: Random) -> list[str]:
    return ["--json"] if rng.random() < 0.2 else []


def key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a dataclass of the recipe."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = subsection(schema, field.name)
        if inner is not None:
            yield from key_paths(inner, f"{prefix}{field.name}.")


def made_up_recipe(rng: Random) -> str:
    """Keys of the schema with any values."""
    lines = ["name: x", "model: {path: dense}"] if rng.random() < 0.8 else []
    for stage in ("prune", "tune", "eval"):
        if rng.random() < 0.5:
            schema = subsection(Recipe, stage)
            assert schema is not None
            lines.append(f"{stage}:")
            for field in rng.sample(dataclasses.fields(schema), rng.randint(0, 4)):
                inner = subsection(schema, field.name)
                if inner is not None and rng.random() < 0.8:
                    lines.append(f"  {field.name}:")
                    names = [entry.name for entry in dataclasses.fields(inner)]
                    lines += [f"    {name}: {rng.choice(SCALARS)}" for name in rng.sample(names, 2)]
                else:
                    lines.append(f"  {field.name}: {rng.choice(SCALARS)}")
    return "\n".join(lines) + "\n"


def changed(content: bytes, rng: Random) -> bytes:
    """The content after one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        content = rng.choice(_CHANGES)(content, rng)
    return content


def changed_text(text: str, rng: Random) -> str:
    """A text after some changes, with bytes that are no UTF-8 as Python shows those of a command line."""
    content = text.encode("utf-8", "surrogateescape")
    return (_bytes if rng.random() < 0.5 else _piece)(content, rng).decode("utf-8", "surrogateescape")


def _lines(content: bytes, rng: Random) -> bytes:
    """Lines deleted, doubled, swapped or indented."""
    lines = content.split(b"\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[first]
    elif kind == 1:
        lines.insert(second, lines[first])
    elif kind == 2:
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines[first] = b" " * rng.randint(1, 40) + lines[first]
    return b"\n".join(lines)


def _value(content: bytes, rng: Random) -> bytes:
    """A value, or the key before it, replaced."""
    lines = content.split(b"\n")
    index = rng.randrange(len(lines))
    key, colon, _ = lines[index].partition(b":")
    scalar = rng.choice(SCALARS).encode("utf-8", "surrogatepass")
    lines[index] = scalar + colon + b" x" if rng.random() < 0.15 else key + colon + b" " + scalar
    return b"\n".join(lines)


def _bytes(content: bytes, rng: Random) -> bytes:
    """Bytes changed, or the end cut off."""
    if rng.random() < 0.2:
        return content[: rng.randint(0, len(content))]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _piece(content: bytes, rng: Random) -> bytes:
    """A hostile piece put in."""
    where = rng.randint(0, len(content))
    return content[:where] + rng.choice(PIECES) + content[where:]


def _bulk(content: bytes, rng: Random) -> bytes:
    """Something large: depth, length, many keys, aliases of aliases."""
    size = rng.choice((10, 1000, 60_000))
    bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (i, i, *([i - 1] * 8)) for i in range(98, 98 + 9)
    )
    return content + rng.choice(
        (b"x: " + b"[" * size, b"x: " + b"{a: " * size, b"x: " + b"y" * size + b"\n", bomb, b"\n" * size,
         b"".join(b"k%d: 1\n" % i for i in range(size)), b"x:\n" + b"- " * size, b"#" * size)
    )  # fmt: skip


_CHANGES = (*[_lines] * 3, *[_value] * 12, *[_bytes] * 2, *[_piece] * 2, _bulk)
