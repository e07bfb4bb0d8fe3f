"""Checkpoints of few bits from others: made plain numbers exactly as their formats say, or refused with the way out.

Every file is written here by hand, number by number, and its weights are computed here from the format's own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lors_cli.errors import MissingError, UsageError
from lors_cli.models import quantised
from lors_cli.models.inspection import inspect
from lors_cli.models.loading import load_config, load_model
from lors_cli.models.packed.stage import pack_model
from lors_cli.models.size import model_size
from lors_cli.models.streaming import open_blockwise
from lors_cli.pruning.stage import prune
from lors_cli.recipe.schema import ModelConfig, PackConfig, PruneConfig, TuneConfig, TuneDataConfig
from lors_cli.tuning.stage import tune

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj"
LOADERS = [load_model, open_blockwise, inspect, load_config]
every_path = pytest.mark.parametrize("load", LOADERS)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
"""The 16 numbers of QLoRA's appendix E, arXiv:2305.14314."""


def at(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", dtype="float32")


Change = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]


def store(folder: Path, quantization: dict[str, Any], change: Change) -> Tensors:
    """Put every linear of a checkpoint's blocks into another format; gives the weights that it then stands for."""
    stored = load_file(folder / "model.safetensors")
    plain: Tensors = {}
    for key in [key for key in stored if "_proj.weight" in key]:
        tensors, plain[key] = change(key.removesuffix(".weight"), stored.pop(key))
        stored |= {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))
    return plain


def assert_plain(folder: Path, plain: Tensors, tmp_path: Path) -> None:
    """Loaded, streamed, pruned: the numbers are those of `plain`, and what is written is an ordinary checkpoint."""
    loaded = load_model(at(folder)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in plain.items())
    source = open_blockwise(at(folder))
    with source.block(1):
        assert torch.equal(source.checkpoint_tensors(1)[f"{UP}.weight"], plain[f"{UP}.weight"])
    size = model_size(at(folder))
    assert size is not None
    assert (source.streamed, size.streamed) == (False, False)
    assert {layer["sparsity"] for layer in inspect(at(folder))["layers"]} <= {
        round(float((weight == 0).double().mean()), 6) for weight in plain.values()
    }
    prune(PruneConfig(method="magnitude", pattern="2:4"), at(folder), tmp_path / "sparse")
    kept = load_file(tmp_path / "sparse" / "model.safetensors")
    assert torch.equal(kept[f"{UP}.weight"], torch.where(kept[f"{UP}.weight"] == 0, 0.0, plain[f"{UP}.weight"]))
    assert "quantization_config" not in json.loads((tmp_path / "sparse" / "config.json").read_text())


def nf4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes: codes two a byte, the first in the high half, one absmax for 64 numbers in a row."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None]).flatten()[:, None] - torch.tensor(NF4)).abs().argmin(1)
    plain = (torch.tensor(NF4)[codes].view_as(blocks) * absmax[:, None]).view_as(weight)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    return {
        f"{name}.weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        f"{name}.weight.absmax": absmax, f"{name}.weight.quant_map": torch.tensor(NF4),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
    }, plain  # fmt: skip


def int8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes' LLM.int8(): a scale a row, 127 its largest number."""
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().to(torch.int8)
    stored = {
        f"{name}.weight": numbers,
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return stored, numbers * (largest[:, None] / 127)


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"}  # fmt: skip
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("bitsandbytes")

    @pytest.fixture
    def wide(self, checkpoint: Path, build: Callable[..., PreTrainedModel]) -> Path:
        """A checkpoint whose rows are whole blocks of 64."""
        build(num_hidden_layers=3, hidden_size=64, intermediate_size=128).save_pretrained(checkpoint)
        return checkpoint

    def test_nf4(self, wide: Path, tmp_path: Path) -> None:
        assert_plain(wide, store(wide, BNB4, nf4), tmp_path)

    def test_blocks_over_the_ends_of_rows_are_refused(self, checkpoint: Path) -> None:
        """bitsandbytes 0.50 makes other numbers of them on a CPU, without a word."""
        from bitsandbytes import functional

        weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
        _, plain = nf4("up", weight)
        assert not torch.allclose(
            functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4")), plain
        )
        store(checkpoint, BNB4, nf4)
        with pytest.raises(UsageError, match="has rows of 32 in blocks of 64"):
            load_model(at(checkpoint))

    def test_int8(self, checkpoint: Path) -> None:
        plain = store(checkpoint, BNB8, int8)
        loaded = load_model(at(checkpoint)).state_dict()
        for name, weight in plain.items():
            torch.testing.assert_close(loaded[name], weight, rtol=1e-6, atol=0)

    def test_a_network_without_linears_is_refused(self, build: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
        """GPT-2's layers are turned round; what comes back would be saved as weights of other shapes."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        build("GPT-2", hidden_size=64, n_inner=64).save_pretrained(tmp_path / "plain")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
        model.save_pretrained(tmp_path / "q")
        with pytest.raises(UsageError, match="does not make plain weights of"):
            load_model(at(tmp_path / "q"))

    def test_tuning_says_that_floats_are_written(
        self, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def sparse(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
            kept = weight.view(-1, 4).abs().argsort(1).argsort(1) >= 2
            return nf4(name, (weight.view(-1, 4) * kept).view_as(weight))

        plain = store(wide, BNB4, sparse)
        (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40)
        data = TuneDataConfig(dataset=str(tmp_path / "text.txt"), max_length=16)
        config = TuneConfig(rank=2, max_steps=1, batch_size=1, data=data)
        tune(config, at(wide), tmp_path / "tuned")
        assert "is quantised (bitsandbytes): its weights, and what is made of them, become float32" in " ".join(
            capsys.readouterr().err.split()
        )
        tuned = load_file(tmp_path / "tuned" / "model.safetensors")
        assert all(bool((tuned[name][weight == 0] == 0).all()) for name, weight in plain.items())
        assert not torch.equal(tuned[f"{UP}.weight"], plain[f"{UP}.weight"])
        assert "quantization_config" not in json.loads((tmp_path / "tuned" / "config.json").read_text())


@every_path
def test_bitsandbytes_names_the_package(load: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(checkpoint, BNB4, nf4)
    monkeypatch.setattr(quantised, "is_installed", lambda name: False)
    with pytest.raises(MissingError, match="bitsandbytes, which turns it back into plain weights") as raised:
        load(at(checkpoint))
    assert str(raised.value.hint).startswith("pip install bitsandbytes")


def mxfp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 in groups of 32 inputs, each times a power of two that is stored as a byte, 127 above its exponent."""
    groups = weight.view(len(weight), -1, 32)
    exponents = groups.abs().amax(-1).log2().floor().int() - 7
    numbers = (groups / 2.0 ** exponents[..., None]).to(torch.float8_e4m3fn)
    plain = (numbers.float() * 2.0 ** exponents[..., None]).view_as(weight)
    return {f"{name}.weight": numbers.view_as(weight),
            f"{name}.weight_scale_inv": (exponents + 127).to(torch.uint8)}, plain  # fmt: skip


def test_mxfp8(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32],
                "scale_fmt": "ue8m0"}  # fmt: skip
    assert_plain(checkpoint, store(checkpoint, settings, mxfp8), tmp_path)


# ---- compressed-tensors


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    numbers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers}},
    }  # fmt: skip


def pack_quantized(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Eight codes an int32, the first lowest, 8 the code of 0; a scale for 32 inputs of a row."""
    groups = weight.view(len(weight), -1, 32)
    scales = groups.abs().amax(-1) / 7
    numbers = (groups / scales[..., None]).round().clamp(-8, 7).int()
    plain = (numbers * scales[..., None]).view_as(weight)
    codes = (numbers + 8).view(len(weight), -1, 8).long()
    words = (codes << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor(weight.shape)}, plain  # fmt: skip


def test_pack_quantized(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    assert_plain(checkpoint, store(checkpoint, compressed("pack-quantized"), pack_quantized), tmp_path)


def marked(suffix: str) -> Change:
    """A tensor more beside each packed weight."""

    def change(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors, plain = pack_quantized(name, weight)
        return {**tensors, f"{name}.{suffix}": torch.arange(weight.shape[1])}, plain

    return change


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every package is installed; what is refused is refused before one is used."""
    monkeypatch.setattr(quantised, "is_installed", lambda name: True)


@pytest.mark.usefixtures("all_there")
class TestCompressedTensorsThatWouldBeOtherWeights:
    @pytest.mark.parametrize(("suffix", "what"), [
        ("weight_g_idx", "columns out of their order"), ("bitmask", "kept values and where they stand"),
    ])  # fmt: skip
    def test_what_is_not_undone(self, suffix: str, what: str, checkpoint: Path) -> None:
        store(checkpoint, compressed("pack-quantized"), marked(suffix))
        with pytest.raises(UsageError, match=rf"holds {what} \(.*{suffix}\)") as raised:
            load_model(at(checkpoint))
        assert "Give the checkpoint in bfloat16" in str(raised.value.hint)

    def test_two_kinds_of_numbers(self, checkpoint: Path) -> None:
        settings = compressed("pack-quantized")
        settings["config_groups"]["group_1"] = {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "type": "int"}}
        store(checkpoint, settings, pack_quantized)
        with pytest.raises(UsageError, match=r"is quantised in several ways \(group_0, group_1\)"):
            load_model(at(checkpoint))


@pytest.mark.usefixtures("all_there")
def test_pack_takes_plain_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    store(checkpoint, BNB4, nf4)
    with pytest.raises(UsageError, match=r"is quantised \(bitsandbytes\); only plain weights are packed") as raised:
        pack_model(PackConfig(), at(checkpoint), tmp_path / "packed")
    assert str(raised.value.hint) == "lors prune makes a sparse model of it."


# ---- kinds that nothing undoes


REFUSED = ["gptq", "awq", "hqq", "auto-round", "quanto", "torchao", "aqlm", "fbgemm_fp8", "eetq", "modelopt", "bitnet"]


@every_path
@pytest.mark.parametrize("method", REFUSED)
def test_refused_with_the_way_out(load: Any, method: str, checkpoint: Path) -> None:
    """Before the files are looked at: config.json is enough, so that no weights need to be downloaded."""
    settings = json.loads((checkpoint / "config.json").read_text())
    stored = {"quant_method": method, "bits": 4, "group_size": 128}
    (checkpoint / "config.json").write_text(json.dumps({**settings, "quantization_config": stored}))
    (checkpoint / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UsageError, match=rf"is quantised \({method}\); lors needs the weights themselves") as raised:
        load(at(checkpoint))
    assert "base model" in str(raised.value.hint)
