"""A YAML reader for settings: YAML 1.2 scalars, no tags, no duplicate keys, and the line of every value.

PyYAML parses; composing and resolving are done here, because its YAML 1.1 rules turn `2:4` into 124, `no` into
false and leave `2e-5` a text. What is read is bounded in size and depth, aliases included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from lors_cli.errors import shorten

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 32

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class YamlError(Exception):
    """Text that cannot be read as settings; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass
class Node:
    """A value with its line; `raw` is the text of an unquoted scalar."""

    line: int
    value: Any
    raw: str | None = None
    size: int = 1
    depth: int = 1


@dataclass
class Document:
    """What a YAML text holds: plain data, the line and raw text of every key path in it, and comments at its end."""

    data: Any = None
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)
    raws: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    comments: str = ""


def resolve(text: str) -> Any:
    """The value of an unquoted scalar by YAML 1.2's core schema, hexadecimal and octal left as text.

    A whole number beyond 64 bits is a float.
    """
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < 19:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def read(text: str) -> Document:
    """Read one YAML document; keys are always text, duplicate keys and the like are in its `problems`.

    Raises:
        YamlError: the text is not YAML, or not a kind that settings may use.
    """
    strange = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if strange:
        line = text.count("\n", 0, strange.start()) + 1
        raise YamlError(line, f"the character U+{ord(strange.group()):04X} may not stand in a YAML file")
    composer = _Composer(text)
    try:
        root = composer.document()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text) from None
    except yaml.YAMLError as error:
        raise YamlError(1, f"not valid YAML: {error}") from None
    document = Document(problems=composer.problems, comments=text[composer.end :].strip())
    if root is not None:
        document.data = _flatten(root, (), root.line, document)
    return document


def _flatten(node: Node, path: tuple[str | int, ...], line: int, document: Document) -> Any:
    document.lines[path] = line
    if node.raw is not None:
        document.raws[path] = node.raw
    if isinstance(node.value, list):
        return [_flatten(item, (*path, i), item.line, document) for i, item in enumerate(node.value)]
    if isinstance(node.value, dict):
        return {k: _flatten(item, (*path, k), at, document) for k, (at, item) in node.value.items()}
    return node.value


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> YamlError:
    """A parser's error in plain words, at the line where the trouble shows."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = error.problem or "it cannot be read"
    lines = text.splitlines()
    written = lines[line - 1] if line <= len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or ("start any token" in problem and "\t" in written):
        return YamlError(line, "a tab is used where YAML wants spaces")
    if "scanning an alias" in str(error.context):
        return YamlError(line, "a text that starts with * must be in quotes")
    if "start any token" in problem:
        return YamlError(line, "a text that starts with a special character must be in quotes")
    if "mapping values are not allowed" in problem:
        problem = "a `: ` stands where no key can be; put the text in quotes, or check the indentation"
    if "flow" in str(error.context):
        problem = "a list `[…]` or mapping `{…}` is not closed, or something in it cannot be read"
    where = f" ({error.context}" if error.context else ""
    if where and error.context_mark and error.context_mark.line + 1 != line:
        where += f" that starts on line {error.context_mark.line + 1}"
    return YamlError(line, f"not valid YAML: {problem}{where + ')' if where else ''}")


class _Composer:
    """Nodes from PyYAML's events; recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str) -> None:
        self.end = 0
        self.events = self.parsed(text)
        self.anchors: dict[str, Node | None] = {}
        self.problems: list[tuple[int, str]] = []
        self.keys: list[str] = []
        self.made = 0

    def parsed(self, text: str) -> Iterator[Any]:
        """PyYAML's events; `end` is where the last one ends that has a text of its own."""
        event: Any
        for event in yaml.parse(text, Loader=_LOADER):
            if event.end_mark.index > event.start_mark.index:
                self.end = event.end_mark.index
            yield event

    def document(self) -> Node | None:
        """The only document's root, or None when there is none."""
        root = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise YamlError(_line(event), "a second document starts here; only one is read")
                root = self.node(next(self.events), 1)
        return root

    def node(self, event: Any, depth: int) -> Node:
        """The node that `event` opens, with all that is in it."""
        line = _line(event)
        if depth > MAX_DEPTH:
            raise YamlError(line, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), line)
        self._refuse_tag(event, line)
        if event.anchor:
            self.anchors[event.anchor] = None
        self._count(line, 1)
        if isinstance(event, yaml.ScalarEvent):  # unquoted, it may stand for something else than a text
            plain = event.implicit[0]
            made = Node(line, resolve(event.value), raw=event.value) if plain else Node(line, event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            made = self.sequence(line, depth)
        else:
            made = self.mapping(line, depth)
        if made.depth + depth - 1 > MAX_DEPTH:
            raise YamlError(line, f"nested more than {MAX_DEPTH} levels deep")
        if event.anchor:
            self.anchors[event.anchor] = made
        return made

    def alias(self, name: str, line: int) -> Node:
        """The node that was anchored before."""
        if name not in self.anchors:
            said = f"*{name} refers to an anchor &{name} that is not defined before it"
            raise YamlError(line, f"{said}; a text that starts with * must be in quotes")
        known = self.anchors[name]
        if known is None:
            raise YamlError(line, f"*{name} refers to a value that contains it")
        self._count(line, known.size)
        return known

    def sequence(self, line: int, depth: int) -> Node:
        """A list."""
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return _container(line, items, items)

    def mapping(self, line: int, depth: int) -> Node:
        """A mapping; keys of `<<` come after its own."""
        entries: dict[str, tuple[int, Node]] = {}
        merges = False
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError(at, "a key must be a plain text")
            self._refuse_tag(event, at)
            key = event.value
            self.keys.append(key)
            value = self.node(next(self.events), depth + 1)
            named = ".".join(map(shorten, self.keys))
            self.keys.pop()
            if key in entries:
                self.problems.append((at, f"{named}: given twice; the first is on line {entries[key][0]}"))
                continue
            entries[key] = (at, value)
            merges = merges or (key == "<<" and event.implicit[0])
        if merges:
            at, merged = entries.pop("<<")
            for source in merged.value if isinstance(merged.value, list) else [merged]:
                if not isinstance(source.value, dict):
                    raise YamlError(at, "<< must be given a mapping or a list of mappings")
                for key, entry in source.value.items():
                    entries.setdefault(key, entry)
        return _container(line, entries, [node for _, node in entries.values()])

    def _count(self, line: int, more: int) -> None:
        self.made += more
        if self.made > MAX_NODES:
            raise YamlError(line, f"more than {MAX_NODES} values, aliases counted where they are used")

    def _refuse_tag(self, event: Any, line: int) -> None:
        tag = event.tag
        if tag in (None, "!") or (tag == "tag:yaml.org,2002:str" and isinstance(event, yaml.ScalarEvent)):
            return
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        raise YamlError(line, f"the tag {shorten(shown)} is not allowed; write the value without it")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _container(line: int, value: Any, children: list[Node]) -> Node:
    size = 1 + sum(child.size for child in children)
    return Node(line, value, size=size, depth=1 + max((child.depth for child in children), default=0))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1 or `resolve` would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    ambiguous = not isinstance(resolve(text), str)
    style = '"' if not text.isprintable() else "'" if ambiguous else None  # a line break is written as \n
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write(data: Any) -> str:
    """YAML text that `read` reads back to the same plain data; lists of scalars stay on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
