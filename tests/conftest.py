"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
from byte_tokens import byte_tokenizer
from typer.testing import CliRunner, Result

from lors_cli.cli.app import app
from lors_cli.output import console

pytest_plugins = ("tiny_models", "packed_cases", "scored_models")


SLOW = (
    "sweep/test_running.py", "test_gpu_benchmark.py", "walk/test_parallel.py", "pipeline/test_running.py",
    "test_real_model.py", "sweep/test_spread.py", "bench/test_measure.py", "faults/test_failures.py",
    "training/test_distributed.py",
)  # fmt: skip
"""Modules that take a minute or two: first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow modules first; each worker takes the next module that is left."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(SLOW))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data and models beside the checkout; tests that need it are skipped without it."""
    folder = Path(os.environ.get("LORS_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set LORS_SHARED")
    return folder


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the developer's own data folder."""
    monkeypatch.delenv("LORS_DATA_DIR", raising=False)


@pytest.fixture(autouse=True)
def _usual_console() -> None:
    """No test writes as the one before it was told to, such as `--json`."""
    console.configure()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """`byte_tokenizer` for 64 tokens."""
    return byte_tokenizer(64)


TINY_RECIPE = """\
name: tiny
model: {path: dense, dtype: bfloat16}
prune:
  method: sparsegpt
  pattern: 2:4
  calibration: {dataset: text.jsonl, num_samples: 8, sequence_length: 32}
tune:
  rank: 4
  data: {dataset: rows.jsonl, max_length: 256}
  learning_rate: 1e-3
  max_steps: 6
  batch_size: 4
  save_steps: 2
eval:
  tasks: [pydoc_choice]
  limit: 3
  perplexity: [text.jsonl]
  perplexity_windows: 4
  perplexity_length: 64
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """What a tiny run needs: `dense/` (a two-block bfloat16 Llama), text.jsonl, rows.jsonl, tiny.yaml."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("workshop")
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, pad_token_id=257,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    tiny_tokenizer.save_pretrained(folder / "dense")
    texts = [{"text": f"Line {i}: fox number {i * 7 % 31} jumps over {i % 5} lazy dogs. " * 4} for i in range(60)]
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i * 7 % 10}"} for i in range(40)]
    for name, content in (("text", texts), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    return folder


@pytest.fixture(scope="session")
def finished_workshop(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workshop in which `lors run tiny.yaml` has run to its end."""
    folder = tmp_path_factory.mktemp("finished") / "workshop"
    shutil.copytree(workshop, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, ["run", "tiny.yaml"])
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def at_workshop(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a fresh copy of the workshop."""
    return _move_to_copy(workshop, tmp_path, monkeypatch)


@pytest.fixture
def at_finished(finished_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a fresh copy of the workshop with the finished run runs/tiny."""
    return _move_to_copy(finished_workshop, tmp_path, monkeypatch)


def _move_to_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "workshop"
    shutil.copytree(source, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lors() -> Callable[..., Result]:
    """Runs a `lors` command in this process; stdout and stderr are told apart."""

    def invoke(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output, result.output
        return result

    return invoke


@pytest.fixture(scope="session")
def ahead() -> Any:
    """benchmarks/gpu/ahead.py, which compiles for GPUs that are not here."""
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    if not (Path(__file__).parents[1] / "benchmarks").is_dir():
        pytest.skip("an sdist has no benchmarks")
    import ahead

    if not ahead.TOOL.is_file():
        pytest.skip(f"this wheel of Triton has no {ahead.TOOL.name}: registers and spills cannot be read")
    return ahead
