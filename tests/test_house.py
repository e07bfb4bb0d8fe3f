"""The house's one rule: a room imports only rooms below it. Imports inside functions count as any other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lors_cli

PACKAGE = Path(lors_cli.__file__).parent
FLOORS = (
    ("errors",), ("machine",), ("output",), ("files",), ("recipe",), ("data", "sparsity", "grid"), ("models",),
    ("pruning", "tuning", "evaluation"), ("report",), ("bench", "doctor"), ("pipeline",), ("sweep",), ("cli",),
    ("__main__",),
)  # fmt: skip
"""From the ground up; rooms of one floor never import each other."""
FACES = {"lors_cli.pruning.methods"}
"""Packages whose face their own modules may import: the dict of methods."""

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that a module imports, and the line."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES or node.module in MODULES:
                    yield (inner if inner in MODULES else str(node.module)), node.lineno


def room(module: str) -> str | None:
    """The room a module lies in; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in MODULES} - {None}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_only_go_down() -> None:
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    upward = [
        f"{module}:{line} imports {other}"
        for module in MODULES
        for other, line in imports(module)
        if None not in (mine := room(module), theirs := room(other))
        and mine != theirs
        and height[str(theirs)] >= height[str(mine)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_module_imports_its_own_package_s_face() -> None:
    own = [
        f"{module}:{line} imports {other}"
        for module in MODULES
        for other, line in imports(module)
        if module.startswith(f"{other}.") and other not in FACES and other != "lors_cli"
    ]
    assert not own, "\n".join(sorted(own))


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = MODULES.keys() - {"lors_cli"}  # its names come from everywhere, when they are asked for
    below = {module: {other for other, _ in imports(module)} & modules - {module} for module in modules}
    while leaves := {module for module, others in below.items() if not others}:
        below = {module: others - leaves for module, others in below.items() if module not in leaves}
    assert not below, f"in circles, or above one: {sorted(below)}"


def test_the_package_s_face_imports_next_to_nothing() -> None:
    body = ast.parse(MODULES["lors_cli"].read_text(encoding="utf-8")).body
    at_once = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    names = {
        name.name for part in at_once for node in ast.walk(part) if isinstance(node, ast.Import) for name in node.names
    }
    sources = {node.module for part in at_once for node in ast.walk(part) if isinstance(node, ast.ImportFrom)}
    assert names | sources == {"__future__", "importlib", "typing", "lors_cli.machine.imports"}


def test_no_home_is_looked_for_with_pathlib() -> None:
    """It raises RuntimeError where there is no such user; `os.path.expanduser` leaves the path as it is."""
    of_pathlib = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "expanduser" and ast.unparse(node.value) != "os.path"
    ]
    assert not of_pathlib


def test_few_files_at_the_root_and_none_too_long() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    long = {str(path.relative_to(PACKAGE)): lines for path in MODULES.values()
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 320}  # fmt: skip
    assert not long
