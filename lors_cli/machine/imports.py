"""What is to be done once a library has been imported, without importing it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(name: str, do: Callable[[], object]) -> None:
    """Call `do` right after the module `name` has been imported, at once where it has been already."""
    if name in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Waiting(name, do))  # it need not inherit


class _Waiting:
    """Finds one module, by the finders after it, and adds to what its loader does; it is gone then."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:  # fmt: skip
        """The module's spec with the longer loader; None for any other module."""
        if name != self.name:
            return None
        from importlib import util

        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_do(module: ModuleType) -> None:
                load(module)
                self.do()

            spec.loader.exec_module = load_and_do  # type: ignore[method-assign]
        return spec
