"""A process that has imported everything once and runs `lors` commands in forked children, which may be killed.

A job is a line of JSON on stdin; so is its answer on stdout. A child leads a process group of its own, and SIGKILL goes
to the whole of it: by the child itself when it comes to a chosen moment (`moments.py`), or from here after a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED_FIRST = (
    "lors_cli.cli", "lors_cli.pipeline.running", "lors_cli.pruning.walk.driver", "lors_cli.tuning.training.preparation",
    "lors_cli.evaluation.harness", "lors_cli.report.run", "lors_cli.report.sweep", "lors_cli.sweep.running",
    "lm_eval.models.huggingface", "lm_eval.tasks", "transformers.models.llama.modeling_llama", "matplotlib.pyplot",
)  # fmt: skip


def main() -> None:
    """Answer jobs until stdin ends."""
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections need not look at all of this
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one command.

    Args:
        job: {"arguments", "folder", "output", "trace"}, and as is wanted {"moment", "after_s", "memory_mib", "faults",
            "environment"}.

    Returns:
        {"code", "elapsed_s"}: the exit code, -9 after SIGKILL.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_lors(job)
    limit_s = job.get("after_s", 300.0)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > limit_s:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return {"code": os.waitstatus_to_exitcode(status), "elapsed_s": time.monotonic() - started}


def _become_lors(job: dict[str, Any]) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(job["folder"])
        os.environ.update(job.get("environment", {}))
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.path.insert(0, str(Path(__file__).parent))
        import moments

        if "memory_mib" in job:
            _limit_memory(job["memory_mib"])
        moments.install(Path(job["folder"]), Path(job["trace"]), job.get("moment"), job.get("faults", {}))
        from lors_cli.cli.app import app

        try:
            app(job["arguments"], prog_name="lors")
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit_memory(mib: int) -> None:
    """Let this process take only so much more address space than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
