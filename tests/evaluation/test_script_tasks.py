"""A task whose dataset is a script, on a hub on loopback with the real client libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FILES = {"README.md": b"---\nlicense: mit\n---\n", "logiqa.py": b"import datasets\n"}


class Hub(BaseHTTPRequestHandler):
    """Serves the two files of EleutherAI/logiqa, and nothing else."""

    def do_GET(self) -> None:
        repository, _, name = self.path.partition("/resolve/")
        content = FILES.get(name.partition("/")[2]) if repository == "/datasets/EleutherAI/logiqa" else None
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{name.partition("/")[2]}"')
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_task_with_a_loading_script_is_exit_3(hub: str, shared_dir: Path, tmp_path: Path) -> None:
    online = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
              "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    model = shared_dir / "data" / "models" / "stories260k"
    command = [sys.executable, "-m", "lors_cli", "eval", str(model), "--tasks", "logiqa", "--limit", "2"]
    found = subprocess.run(command, env=online, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.returncode == 3, found.stderr
    said = " ".join(found.stderr.split())
    assert "The task logiqa cannot be loaded" in said
    assert "needs a loading script, which datasets ≥ 4 does not run: logiqa.py" in said
    assert "Traceback" not in said
    assert "Score another task" in said
