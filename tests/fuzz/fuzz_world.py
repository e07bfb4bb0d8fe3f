"""A small world to run `lors` in: tiny models, a finished run, data, and what no case may change.

Layout: `base/` holds whole inputs and is never written to; `place/` is a case's current folder, made anew for each,
with its results in `place/out`; `home/` and `tmp/` stand for the user's cache and the machine's temporary files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from byte_tokens import byte_tokenizer
from typer.testing import CliRunner

from lors_cli.cli.app import app
from lors_cli.grid import GridSpec, fit_grid
from lors_cli.models.grids import save_grids

RECIPE = """\
name: tiny
model: {path: dense, dtype: float32}
prune:
  method: magnitude
  pattern: 2:4
tune:
  rank: 2
  init: kaiming
  data: {dataset: rows.jsonl, max_length: 256}
  learning_rate: 1e-3
  max_steps: 2
  batch_size: 2
eval:
  tasks: []
  perplexity: [text.jsonl]
  perplexity_windows: 1
  perplexity_length: 16
"""
SWEEP = """\
name: search
recipe: tiny.yaml
set:
  eval.perplexity_windows: 1
grid:
  tune.method: [lors, sqft]
  tune.rank: [2, 4]
per:
  tune.method:
    lors: {tune.learning_rate: 3e-3}
    sqft: {tune: {alpha: 4}}
"""
ROWS = [{"instruction": f"say {i}", "input": "", "output": f"it is {i * 7 % 10}"} for i in range(12)]
TEXTS = [{"text": f"Line {i}: fox number {i * 7 % 31} jumps over {i % 5} lazy dogs."} for i in range(12)]

GRIDS = {"int4": GridSpec(4, 32, symmetric=False), "int8": GridSpec(8, 64)}


def on_grids(sparse: Path, folder: Path, spec: GridSpec) -> None:
    """A copy of a sparse checkpoint whose weights are rounded to grids that lie beside it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sparse, folder)
    (folder / "stage.json").unlink()
    tensors, grids = load_file(folder / "model.safetensors"), {}
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            grid = grids[key.removesuffix(".weight")] = fit_grid(tensor, tensor != 0, spec)
            tensors[key] = grid.rounded(tensor) * (tensor != 0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_grids(folder, grids)


class World:
    """The folders, and a look at everything that a case may not touch.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.place = root, root / "base", root / "place"
        self.out = self.place / "out"
        for name in ("base", "place", "home", "tmp"):
            (root / name).mkdir(parents=True)
        for name, content in (("tiny.yaml", RECIPE), ("search.yaml", SWEEP)):
            (self.base / name).write_text(content)
        for name, rows in (("rows", ROWS), ("text", TEXTS)):
            (self.base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(self) -> None:
        """Make the models and the finished run, by lors itself."""
        tiny_model(self.base / "dense")
        with at(self.base):
            for arguments in (
                ["run", "tiny.yaml", "--out", "run"],
                ["prune", "dense", "--out", "sparse", "--method", "magnitude", "--dtype", "float32"],
                ["pack", "sparse", "--out", "packed"],
            ):
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, result.output
            for name, spec in GRIDS.items():
                on_grids(Path("sparse"), Path(name), spec)
                result = CliRunner().invoke(app, ["pack", name, "--out", f"packed-{name}"])
                assert result.exit_code == 0, result.output

    def new_place(self) -> Path:
        """The empty current folder of the next case, with the base's files and models as links."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        models = ("dense", "sparse", "packed", *GRIDS, *(f"packed-{name}" for name in GRIDS))
        for entry in (*models, "tiny.yaml", "rows.jsonl", "text.jsonl"):
            (self.place / entry).symlink_to(self.base / entry)
        return self.place

    def snapshot(self) -> dict[str, tuple[int, int, int]]:
        """Every file but the results and the cache of hashes: kind, size and time of change."""
        return {path: entry for top in (self.base, self.place, self.root / "tmp") for path, entry in self._walk(top)}

    def _walk(self, folder: Path | str) -> Iterator[tuple[str, tuple[int, int, int]]]:
        for entry in os.scandir(folder):
            if entry.path == str(self.out):
                continue
            stat = entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            yield entry.path, (stat.st_mode, *((0, 0) if is_folder else (stat.st_size, stat.st_mtime_ns)))
            if is_folder:
                yield from self._walk(entry.path)


@contextmanager
def at(folder: Path) -> Iterator[None]:
    """Work in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """The environment of a world: its own home, cache and temporary folder, no hub."""
    changed = {
        "HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "home" / "cache"), "TMPDIR": str(root / "tmp"),
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in (*changed, "LORS_DATA_DIR")}
    os.environ.update(changed)
    os.environ.pop("LORS_DATA_DIR", None)
    temporary, tempfile.tempdir = tempfile.tempdir, None
    try:
        yield
    finally:
        tempfile.tempdir = temporary
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def tiny_model(folder: Path) -> None:
    """A one-block Llama of 16 channels with a byte tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, pad_token_id=257,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(512).save_pretrained(folder)
