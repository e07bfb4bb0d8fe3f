"""What the standard library's source files say of themselves: docstrings and signatures, read but never imported."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from lors_cli.errors import MissingError

_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
    "encodings", "pydoc_data", "antigravity", "this", "config",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A documented public function, method or class."""

    module: str
    name: str
    """Inside the module: `dedent`, `TextWrapper.wrap`."""
    kind: Literal["function", "method", "class"]
    signature: str
    """With parentheses and without self or cls; empty for a class."""
    doc: str

    @property
    def call(self) -> str:
        """`textwrap.dedent(text)`."""
        return f"{self.module}.{self.name}{self.signature}"


@dataclass(frozen=True)
class Module:
    """One module's documentation."""

    name: str
    doc: str
    entries: tuple[Entry, ...]


@cache
def module_files() -> tuple[tuple[str, Path], ...]:
    """(dotted name, file) of the public modules, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part in _SKIPPED or part[0] == "_" or not part.isidentifier() for part in parts):
            found[".".join(parts)] = path
    if not found:
        raise MissingError(
            f"No standard library in source form at {root}, which the text source pydoc is made from.",
            "Use another source or a local file.",
        )
    return tuple(sorted(found.items()))


def topics_files() -> list[tuple[str, Path]]:
    """The language reference as plain text; some distributions leave it out."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    return [("pydoc_data.topics", path)] if path.is_file() else []


@cache
def all_modules() -> tuple[Module, ...]:
    """Every public module that has documentation, sorted by name."""
    modules = []
    for name, path in module_files():
        tree = ast.parse(path.read_bytes())
        entries: dict[str, Entry] = {}
        _collect(tree.body, name, "", entries)
        doc = _clean(ast.get_docstring(tree) or "")
        if doc or entries:
            modules.append(Module(name, doc, tuple(entries.values())))
    return tuple(modules)


def _collect(body: list[ast.stmt], module: str, prefix: str, entries: dict[str, Entry]) -> None:
    """Add the documented public definitions of a module's or class's body, the first of each name."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            _collect([*node.body, *node.orelse], module, prefix, entries)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name[0] == "_":
            continue
        name = prefix + node.name
        doc = _clean(ast.get_docstring(node) or "")
        if doc and name not in entries:
            kind: Literal["function", "method", "class"] = "method" if prefix else "function"
            if isinstance(node, ast.ClassDef):
                entries[name] = Entry(module, name, "class", "", doc)
            else:
                entries[name] = Entry(module, name, kind, _signature(node, is_method=bool(prefix)), doc)
        if isinstance(node, ast.ClassDef):
            _collect(node.body, module, f"{name}.", entries)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_method: bool) -> str:
    """`(text, width=70)`."""
    decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
    arguments = node.args
    if is_method and "staticmethod" not in decorators:
        for positional in (arguments.posonlyargs, arguments.args):
            if positional:
                del positional[0]
                break
    num_positional = len(arguments.posonlyargs) + len(arguments.args)
    arguments.defaults = arguments.defaults[max(0, len(arguments.defaults) - num_positional) :]
    return f"({ast.unparse(arguments)})"


def _clean(doc: str) -> str:
    """A docstring without indentation, control characters and spaces at the ends of lines."""
    lines = inspect.cleandoc(doc).splitlines()
    return "\n".join("".join(c for c in line if c.isprintable()).rstrip() for line in lines).strip()


@cache
def all_topics() -> dict[str, str]:
    """Name and text of each topic of the language reference, sorted by name."""
    topics: dict[str, str] = {}
    for _, path in topics_files():
        for node in ast.parse(path.read_bytes()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
                topics = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return {name: _clean(topics[name]) for name in sorted(topics)}
