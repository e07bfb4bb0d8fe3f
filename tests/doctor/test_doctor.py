"""`lors doctor`: each finding told from a state that the test makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lors_cli.doctor import checkups, examine
from lors_cli.doctor import devices as device_checkups
from lors_cli.doctor.checkups import Finding

Lors = Callable[..., Result]
ROOT = Path(__file__).parents[2]


def only(findings: Iterator[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_all_is_well_in_the_tests_own_environment(lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    result = lors("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ok"] is True
    by_name = {check["name"]: check for check in found["checks"]}
    assert set(checkups.NEEDED) | {"lors", "python", "processor", "memory", "token", "LoRS merge"} <= set(by_name)
    assert by_name["access"]["status"] == "warn"  # tests/conftest.py sets HF_HUB_OFFLINE
    for check in found["checks"]:
        assert (check["advice"] is None) == (check["status"] == "ok"), check


def test_people_get_a_line_a_finding_and_what_to_do(lors: Lors) -> None:
    result = lors("doctor")
    assert result.exit_code == 0
    assert re.search(r"^  warn +access +off by HF_HUB_OFFLINE=1", result.stdout, re.MULTILINE)
    assert "→ To download: unset HF_HUB_OFFLINE" in result.stdout
    assert "lors works here; " in result.stdout.splitlines()[-1]


def test_the_packages_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("dependencies = [")[2].partition("]")[0]
    oldest = dict(re.findall(r'"([\w-]+)[>=]=([\d.]+)', listed))
    assert {name: version for name, (_, version) in checkups.NEEDED.items()} == oldest


def test_a_missing_package_is_a_failure(lors: Lors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkups.NEEDED, "lors-no-such-package", ("lors_no_such_package", "1.0"))
    result = lors("doctor")
    assert result.exit_code == 3
    assert "pip install 'lors-no-such-package>=1.0'" in result.stdout
    assert "1 to repair" in result.stdout


def test_a_broken_an_old_and_a_new_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, version in (("broken-one", "2.0"), ("old-one", "0.9"), ("new-one", "3.1")):
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text("raise OSError('libfoo.so is missing')" if "broken" in name else "")
        (tmp_path / f"{module}-{version}.dist-info").mkdir()
        (tmp_path / f"{module}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setattr(
        checkups, "NEEDED", {name: (name.replace("-", "_"), "1.0") for name in ("broken-one", "old-one", "new-one")}
    )
    monkeypatch.setattr(checkups, "BELOW", {"new-one": "3"})
    found = {finding.name: finding for finding in checkups.packages()}
    assert (found["broken-one"].status, found["old-one"].status, found["new-one"].status) == ("fail", "fail", "warn")
    assert "OSError: libfoo.so is missing" in found["broken-one"].text
    assert found["new-one"].advice is not None
    assert "new-one>=1.0,<3" in found["new-one"].advice


def test_without_torch_it_says_so_and_ends_with_3(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'psutil'): sys.modules[name] = None\n"
        "from lors_cli.cli.app import app\n"
        "app(['doctor', '--json'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stderr
    found = json.loads(run.stdout)
    assert found["ok"] is False
    status = {(check["group"], check["name"]): check["status"] for check in found["checks"]}
    assert status["packages", "torch"] == status["packages", "psutil"] == "fail"
    assert status["devices", "devices"] == status["memory", "memory"] == "warn"
    assert "Traceback" not in run.stderr


def test_versions_are_compared_as_numbers() -> None:
    assert checkups._numbers("2.13.0+cpu") == (2, 13, 0) > checkups._numbers("2.8")
    assert checkups._numbers("5.0.0rc1") == (5, 0, 0)


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Memory:
        total, available = 16 << 30, 1 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(checkups, "container_memory", lambda: iter(()))
    (found,) = checkups.memory()
    assert (found.status, found.text) == ("warn", "1.0 GiB free of 16.0 GiB")
    Memory.available = 8 << 30
    monkeypatch.setattr(checkups, "container_memory", lambda: iter([(4 << 30, 3 << 30)]))
    (found,) = checkups.memory()
    assert found.status == "warn"
    assert "this container may take 4.0 GiB and has taken 3.0 GiB" in found.text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkups.shutil, "disk_usage", lambda place: usage._replace(free=1 << 30))
    found = {finding.name: finding for finding in checkups.disk()}
    assert found["run folders"].text == f"1.0 GiB free at {tmp_path}/runs"
    assert found["run folders"].status == "warn"
    assert str(tmp_path / "cache" / "hub") in found["hub cache"].text
    assert "HF_HOME" in str(found["hub cache"].advice)
    monkeypatch.setattr(checkups.os, "access", lambda place, mode: False)
    assert "cannot be written" in only(checkups.disk(), "temporary").text


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in checkups.OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (404, "ok"), (503, "warn")])
def test_the_hub_is_asked(code: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    found = only(checkups.hub(), "access")
    thread.join()
    server.server_close()
    assert found.status == status
    assert str(code) in found.text or status == "ok"


@pytest.mark.usefixtures("online")
def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    found = only(checkups.hub(), "access")
    assert found.status == "warn"
    assert "refused" in found.text
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert only(checkups.hub(), "access").status == "warn"


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "endpoint", ["http://me:secret@127.0.0.1:9", "secret@127.0.0.1", "http://secret@[::1", "secret"]
)
def test_a_password_in_the_hubs_address_is_never_shown(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    found = only(checkups.hub(), "access")
    assert found.status == "warn"
    assert ("secret" in found.text) == ("@" not in endpoint)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_made-up-for-this-test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = list(checkups.hub())
    assert "there is one" in only(iter(findings), "token").text
    assert not any("hf_made-up" in f"{finding}" for finding in findings)


def test_a_data_folder_with_some_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not set" in only(checkups.data(), "folder").text
    (tmp_path / "alpaca").mkdir()
    row = {"instruction": "a", "input": "", "output": "b"}
    (tmp_path / "alpaca" / "train.jsonl.gz").write_bytes(__import__("gzip").compress(json.dumps(row).encode()))
    (tmp_path / "eval" / "boolq").mkdir(parents=True)
    (tmp_path / "eval" / "boolq" / "validation.jsonl").write_text("{}\n")
    monkeypatch.setenv("LORS_DATA_DIR", str(tmp_path))
    found = list(checkups.data())
    assert only(iter(found), "texts").text.startswith("alpaca (")
    assert only(iter(found), "tasks").text == "boolq of 7"
    assert {finding.name for finding in found if finding.status == "warn"} == {
        "c4", "slimpajama", "slimpajama-6b", "wikitext2", "arc_challenge", "arc_easy", "hellaswag", "openbookqa", "rte",
        "winogrande",
    }  # fmt: skip
    monkeypatch.setenv("LORS_DATA_DIR", str(tmp_path / "gone"))
    assert only(checkups.data(), "folder").status == "warn"


@pytest.mark.parametrize(("threads", "cores", "status"), [(4, 4, "ok"), (1, 4, "warn"), (8, 4, "warn")])
def test_threads(threads: int, cores: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(device_checkups, "usable_cores", lambda: cores)
    found = device_checkups._threads()
    assert found.status == status
    assert status == "ok" or f"OMP_NUM_THREADS={cores}" in str(found.advice)


def test_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checkups, "cpu_has_bfloat16", lambda: False)
    assert device_checkups._bfloat16().status == "warn"
    monkeypatch.setattr(device_checkups, "cpu_has_bfloat16", lambda: True)
    assert device_checkups._bfloat16().status == "ok"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    found = device_checkups._gpu(1)
    assert (found.name, found.status) == ("cuda:1", "warn")
    assert found.text == "Some GPU, 10.0 GiB free of 80.0 GiB, compute capability 9.0"


def test_the_merge_without_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lors_cli.models.packed.kernels import cuda
    from lors_cli.tuning.kernels import masked_merge

    for module in (cuda, masked_merge):
        monkeypatch.setattr(module, "why_no_cuda_kernel", lambda *_: "the package triton is not installed")
    found = device_checkups._merge(torch.device("cuda"), torch.bfloat16)
    assert found.status == "warn"
    assert "triton is not installed" in found.text


def test_the_merge_on_a_processor_with_a_compiler_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lors_cli.models.packed.kernels import ops

    on = (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(ops, "_why_no_library", lambda: None)
    assert device_checkups._merge(*on).status == "ok"
    assert "one pass in C" in device_checkups._merge(*on).text
    assert "the C kernel reads it as it is" in device_checkups._packed(*on).text
    monkeypatch.setattr(ops, "_why_no_library", lambda: "there is no C compiler")
    found = device_checkups._merge(*on)
    assert found.status == "warn"
    assert "no C kernel: there is no C compiler" in found.text
    assert "gcc or clang" in str(found.advice)
    assert "costs time" in device_checkups._packed(*on).text


def test_tokenizers_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert device_checkups._tokenizers().advice == "unset TOKENIZERS_PARALLELISM"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert device_checkups._tokenizers().status == "ok"


def test_a_checkup_that_breaks_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", "ok", "there")
        raise RuntimeError("driver too old")

    monkeypatch.setattr(examine, "CHECKUPS", {"one": broken, "two": lambda: iter([Finding("x", "ok", "y")])})
    found = examine.examine()
    statuses = {group: [finding.status for finding in findings] for group, findings in found.items()}
    assert statuses == {"one": ["ok", "warn"], "two": ["ok"]}
    assert "RuntimeError: driver too old" in found["one"][1].text


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (None, None),
        ("there is no C compiler (cc, gcc, clang) on the PATH", "Install a C compiler"),
        ("gcc -O3 failed: packed.c:1: error", "Install a C compiler"),
        ("torch 2.8.0 does not lend its threads; 2.10 and later do", "torch>=2.10"),
        ("others may write /x; remove it, or set XDG_CACHE_HOME to a folder of yours", "Set XDG_CACHE_HOME"),
        ("this processor has neither AVX2 nor NEON, and plain C is slower than torch", "Nothing to do"),
    ],
)
def test_what_computes_with_packed_weights(
    reason: str | None, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors_cli.models.packed.kernels import ops

    monkeypatch.setattr(ops, "available", lambda dtype: reason)
    monkeypatch.setattr(ops, "instructions", lambda: "AVX2")
    found = only(device_checkups.fast_paths(), "packed weights")
    if advice is None:
        assert (found.status, found.advice) == ("ok", None)
        assert found.text.endswith("C kernels, AVX2")
    else:
        assert found.status == "warn"
        assert found.text.endswith(f"dense speed: {reason}")
        assert advice in str(found.advice)


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, with an empty PATH and an empty cache."""
    code = "from lors_cli.doctor.devices import _packed_weights as p; found = p(); print(found.status, found.text)"
    env = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
           "HOME": str(tmp_path)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("warn unpacked when they are loaded, dense speed: there is no C compiler"), done
