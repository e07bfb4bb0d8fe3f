"""Cases of what lors reads back: checkpoints, adapters, and the records of a run."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from fuzz_files import _broken

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**18, 1.5, 1e300, "", "x", "llama", "../x", "/etc/passwd",
    "../keep", "a/b", [], [1], ["x"], {}, {"x": 1}, "float16", "bfloat16", "nonsense", "<script>", "\x00", "é" * 50,
)  # fmt: skip
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def checkpoint_case(rng: Random, place: Path) -> list[str]:
    """A broken checkpoint, looked at, pruned, scored or tuned."""
    name = rng.choice(("dense", "sparse"))
    model = place / "model"
    shutil.copytree(place / name, model)
    rng.choice(_BREAKS)(model, rng)
    command = rng.random()
    if command < 0.35:
        return ["inspect", "model"]
    if command < 0.6:
        return ["prune", "model", "--out", "out", "--method", "magnitude"]
    if command < 0.7:
        return ["prune", "model", "--out", "out", "--method", "wanda", "--calibration", "text.jsonl",
                "--num-samples", "2", "--sequence-length", "8"]  # fmt: skip
    if command < 0.85:
        return ["eval", "model", "--tasks", "", "--perplexity", "text.jsonl", "--out", "out", "perplexity_windows=1",
                "perplexity_length=16"]  # fmt: skip
    if command < 0.95:
        return ["tune", "model", "--out", "out", "--dataset", "rows.jsonl", "--max-steps", "1", "--batch-size", "2",
                "--max-length", "256", "--init", "kaiming"]  # fmt: skip
    return ["data", "show", "tiny.yaml", "--model", "model", "--num", "1"]


def packed_case(rng: Random, place: Path) -> list[str]:
    """A broken packed checkpoint, or a broken one to pack."""
    model = place / "model"
    name = rng.choice(("packed", "packed-int4", "packed-int4", "packed-int8", "sparse", "int4"))
    shutil.copytree(place / name, model)
    kind = rng.random()
    if kind < 0.4:
        _packing(model, rng)
    else:
        (_weights if kind < 0.8 else _config)(model, rng)
    command = rng.random()
    if command < 0.3:
        return ["inspect", "model"]
    if command < 0.5:
        return ["pack", "model", "--out", "out", *rng.choice(([], ["--dtype", "float16"], ["--dry-run"]))]
    if command < 0.8:
        return ["pack", "model", "--out", "out", "--unpack"]
    return ["eval", "model", "--tasks", "", "--perplexity", "text.jsonl", "--out", "out", "perplexity_windows=1",
            "perplexity_length=16"]  # fmt: skip


def _packing(model: Path, rng: Random) -> None:
    """A config.json that says something else of what is packed."""
    path = model / "config.json"
    content = json.loads(path.read_text())
    packing = content.setdefault("quantization_config", {})
    modules = packing.get("modules")
    if isinstance(modules, dict) and modules and rng.random() < 0.6:
        name = rng.choice(sorted(modules))
        kept = modules.pop(name)
        modules[rng.choice((name, "lm_head", "model.norm", f"{name}.x", "", "\x00"))] = rng.choice((kept, *VALUES))
    else:
        keys = [
            "version",
            "pattern",
            "modules",
            "quant_method",
            "dequantize",
            "bits",
            "group_size",
            "symmetric",
            "floats",
        ]
        packing[rng.choice([*keys, "floats"])] = rng.choice(
            (*VALUES, 4, 8, 64, 128, "1:4", "4:8", "0:0", "9999:9999", "unstructured", ["lm_head"])
        )
    path.write_text(json.dumps(content))


def adapter_case(rng: Random, place: Path) -> list[str]:
    """A broken adapter, or one of another base, merged."""
    adapter = place / "adapter"
    shutil.copytree(place.parent / "base" / "run" / "tune" / "adapter", adapter)
    if rng.random() < 0.15:
        return ["merge", "dense", "adapter", "--out", "out"]
    if rng.random() < 0.6:
        _broken_json(adapter / "adapter_config.json", rng)
    else:
        _tensors(adapter / "adapter_model.safetensors", rng)
    return ["merge", "../base/run/prune", "adapter", "--out", "out"]


def run_folder_case(rng: Random, place: Path) -> list[str]:
    """A run's folder with broken records, run again, reported or looked at."""
    run = place / "out"
    shutil.copytree(place.parent / "base" / "run", run)
    (place / "keep").mkdir()
    (place / "keep" / "file").write_text("not to be touched")
    files = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml") and path.is_file()]
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(files)
        if path.name == "stage.json" and rng.random() < 0.5:
            _hostile_record(path, rng)
        elif path.suffix == ".json":
            _broken_json(path, rng)
        else:
            path.write_bytes(_broken(path.read_bytes(), rng))
    if rng.random() < 0.2:
        _begun(run, rng)
    command = rng.random()
    if command < 0.25:
        return ["report", "out"]
    if command < 0.4:
        return ["inspect", f"out/{rng.choice(('prune', 'tune'))}"]
    if command < 0.5:
        return ["run", "tiny.yaml", "--out", "out", "--dry-run"]
    return ["run", "tiny.yaml", "--out", "out", *rng.choice(([], [], ["prune.pattern=1:4"], ["--force", "tune"]))]


def _hostile_record(path: Path, rng: Random) -> None:
    """A record that names files elsewhere."""
    record = json.loads(path.read_text())
    outside = rng.choice(("../../keep/file", "../keep/file", str(path.parents[2] / "keep" / "file"), "..", "/", ""))
    record["files"] = rng.choice(
        ({**record["files"], outside: "0"}, {outside: "0"}, [outside], outside, {outside: None})
    )
    record["fingerprint"] = rng.choice((record["fingerprint"], "0" * 32, None))
    path.write_text(json.dumps(record))


def _begun(run: Path, rng: Random) -> None:
    """What a stopped stage leaves, made up."""
    stage = run / rng.choice(("prune", "tune"))
    for name in (
        ".publishing.json",
        ".work/fingerprint.json",
        ".staging/x.json",
        "checkpoints/checkpoint-1/state.json",
    ):
        if rng.random() < 0.5:
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rng.choice((["../../keep/file"], {"x": 1}, "x", None, 3, [["x"]]))))
    if rng.random() < 0.5:
        (stage / "stage.json").unlink(missing_ok=True)


def _broken_json(path: Path, rng: Random) -> None:
    """A JSON file with a value changed, a key lost, or bytes broken."""
    if not path.is_file():
        return
    kind = rng.random()
    if kind < 0.15:
        path.write_bytes(rng.choice((b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"\x00" * 64, b"[" * 100_000)))
    elif kind < 0.3:
        path.write_bytes(_broken(path.read_bytes(), rng))
    else:
        try:
            content = json.loads(path.read_text())
        except ValueError:  # broken by an earlier turn
            return
        for _ in range(rng.choice((1, 1, 2))):
            _change(content, rng)
        path.write_text(json.dumps(content))


def _change(content: Any, rng: Random) -> None:
    """Change something somewhere in nested JSON, in place."""
    while True:
        if isinstance(content, dict) and content:
            key: Any = rng.choice(sorted(content))
        elif isinstance(content, list) and content:
            key = rng.randrange(len(content))
        else:
            return
        if isinstance(content[key], (dict, list)) and content[key] and rng.random() < 0.6:
            content = content[key]
            continue
        if rng.random() < 0.25:
            del content[key]
        else:
            content[key] = deepcopy(rng.choice(VALUES))  # a later turn may change something in it
        return


def _config(model: Path, rng: Random) -> None:
    """One of the JSON files broken."""
    _broken_json(model / rng.choice(JSON_FILES), rng)


def _config_value(model: Path, rng: Random) -> None:
    """One value of config.json changed."""
    path = model / "config.json"
    content = json.loads(path.read_text())
    content[rng.choice(sorted(content))] = rng.choice(VALUES)
    path.write_text(json.dumps(content))


def _weights(model: Path, rng: Random) -> None:
    grids = model / "grid" / "scales.safetensors"
    _tensors(grids if grids.is_file() and rng.random() < 0.5 else model / "model.safetensors", rng)


def _tensors(path: Path, rng: Random) -> None:
    """A safetensors file whose tensors, header or bytes are wrong."""
    import torch
    from safetensors.torch import load_file, save

    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    kind = rng.randrange(7)
    if kind == 0:
        content = content[: rng.randint(0, len(content))]
    elif kind == 1:
        lie = rng.choice((0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1))
        content = struct.pack("<Q", lie) + content[8:]
    elif kind == 2:
        content = content[:8] + _broken(content[8 : 8 + length], rng)[:length].ljust(length) + content[8 + length :]
    elif kind == 3:
        header = json.loads(content[8 : 8 + length])
        _change(header, rng)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    else:
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        old = tensors[name]
        values = (float("nan"), float("inf"), 3e38)
        if not old.is_floating_point():
            values = (max(-1, torch.iinfo(old.dtype).min), 0, 15, torch.iinfo(old.dtype).max)
        new = rng.choice((
            *(torch.full_like(old, value) for value in values), torch.zeros_like(old), old.flatten()[:-1].clone(),
            old[:1].clone(), old.mT.contiguous() if old.dim() == 2 else old.flip(0),
            old.to(torch.int8), old.to(torch.bool), old.to(torch.float64), old.to(torch.float8_e4m3fn),
            torch.zeros(0), torch.tensor(1.0),
        ))  # fmt: skip
        if rng.random() < 0.2:
            del tensors[name]
            name = f"{name}{rng.choice(('x', '.weight', ''))}"
        tensors[name] = new
        content = save(tensors, metadata={"format": rng.choice(("pt", "pt", "tf", "x"))})
    path.write_bytes(content)


def _pickled(model: Path, rng: Random) -> None:
    """Pickled weights, which would leave a trace if they were read."""
    import torch

    (model / "model.safetensors").unlink()
    name = rng.choice(("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json", "consolidated.00.pth"))
    if name.endswith(".json"):
        (model / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "pytorch_model-1.bin"}}))
        name = "pytorch_model-1.bin"
    torch.save(Trap(), model / name)


class Trap:
    """Says that it was unpickled by a file beside the models."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (Path("unpickled"), "x"))


def _shards(model: Path, rng: Random) -> None:
    """An index whose shards are missing, elsewhere or no shards."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    os.replace(model / "model.safetensors", model / "model-00001-of-00002.safetensors")
    half = dict(sorted(tensors.items())[: len(tensors) // 2])
    rest = dict(sorted(tensors.items())[len(tensors) // 2 :])
    save_file(half, model / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(rest, model / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    shards = {**dict.fromkeys(half, "model-00001-of-00002.safetensors"),
              **dict.fromkeys(rest, "model-00002-of-00002.safetensors")}  # fmt: skip
    index: Any = {
        "metadata": {"total_size": sum(tensor.numel() * 4 for tensor in tensors.values())},
        "weight_map": shards,
    }
    kind = rng.randrange(6)
    if kind == 0:
        (model / "model-00002-of-00002.safetensors").unlink()
    elif kind == 1:
        name = rng.choice(sorted(shards))
        shards[name] = rng.choice((
            "../dense/model.safetensors", str(model.parent / "dense" / "model.safetensors"), "..", "", "/", None, 3,
            "x/../model-00001-of-00002.safetensors", "model\x00.safetensors", "config.json", "x" * 300,
        ))  # fmt: skip
    elif kind == 2:
        index = rng.choice(([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, None, 3, "x"))
    elif kind == 3:
        shards.pop(rng.choice(sorted(shards)))
    elif kind == 4:
        _change(index, rng)
    else:
        torch.save(Trap(), model / "pytorch_model.bin")
        shards[rng.choice(sorted(shards))] = "pytorch_model.bin"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(model: Path, rng: Random) -> None:
    """A file missing, a folder, a pipe or a loop in its place."""
    path = model / rng.choice((*JSON_FILES, "model.safetensors"))
    path.unlink(missing_ok=True)
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")


def _vocabulary(model: Path, rng: Random) -> None:
    """A tokenizer that knows more tokens than the model, or other ones."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    shift = rng.choice((1, 100, 10**6))
    content["model"]["vocab"] = {token: number + shift for token, number in vocabulary.items()}
    for added in content["added_tokens"]:
        added["id"] += rng.choice((0, shift))
    path.write_text(json.dumps(content))


def _own_code(model: Path, rng: Random) -> None:
    """A model that brings Python code, which would leave a trace if it ran."""
    (model / "modeling_x.py").write_text("from pathlib import Path\nPath('executed').write_text('x')\n")
    for name in ("config.json", "tokenizer_config.json"):
        if rng.random() < 0.7:
            content = json.loads((model / name).read_text())
            content["auto_map"] = {
                "AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X",
                "AutoTokenizer": rng.choice(("modeling_x.X", ["modeling_x.X", None])),
            }  # fmt: skip
            if rng.random() < 0.6:
                content["model_type"] = "own"
            if rng.random() < 0.5:
                content.pop("tokenizer_class", None)
            (model / name).write_text(json.dumps(content))


_BREAKS: tuple[Callable[[Path, Random], None], ...] = (
    _config, _config, _config_value, _config_value, _weights, _weights, _weights, _pickled, _shards, _shards, _files,
    _vocabulary, _own_code,
)  # fmt: skip
