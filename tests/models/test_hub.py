"""Downloads from the hub, as far as they need none; tests/hub has a server."""

from __future__ import annotations

import threading

from lors_cli.models.hub import _shown


def test_a_download_starts_no_thread_of_tqdm() -> None:
    """As a thread starts, tqdm holds its lock, and a bar that is collected in that thread waits for it for ever."""
    before = {thread.ident for thread in threading.enumerate()}
    with _shown("org/name", "0" * 40, ["*"], {}) as bar, bar(total=2, unit="B") as shown:
        shown.update(1)
        assert {thread.ident for thread in threading.enumerate()} == before
