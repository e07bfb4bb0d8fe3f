"""The libraries' own words and progress bars, kept or passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

from lors_cli.output import console, progress


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' bars and notices off the screen below -vv."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if console.verbosity() < 2:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def library_bars(description: str, unit: str) -> Iterator[None]:
    """Show a loop that transformers counts (weights read, shards written) as one of our own steps."""
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):  # an early version 5: its loops stay unseen
        yield
        return
    with ExitStack() as shown:

        def counted(items: Any) -> Iterator[Any]:
            task = shown.enter_context(progress.progress(description, len(items), unit))
            for item in items:
                yield item
                task.advance()
            shown.close()

        def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            return counted(args[0]) if args and isinstance(args[0], Sized) else factory(*args, **options)

        before = logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)
