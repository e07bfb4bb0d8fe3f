"""Packing checkpoints whose weights lie on grids: codes of few bits, given back bit for bit, loaded in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import INT4, pack, quantised, same, unpack
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lors_cli.errors import UsageError
from lors_cli.grid import GridSpec
from lors_cli.models.grids import GRIDS_NAME, load_grids, save_grids
from lors_cli.models.inspection import inspect
from lors_cli.models.loading import load_model
from lors_cli.models.packed.checkpoint import Checkpoint
from lors_cli.models.packed.linear import PackedLinear
from lors_cli.models.packed.stage import foreseen_size
from lors_cli.models.sources import model_fingerprint
from lors_cli.output.console import gib
from lors_cli.recipe.schema import ModelConfig
from lors_cli.sparsity import Pattern
from lors_cli.tuning.loading import load

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SPECS = [INT4, GridSpec(4, 64, symmetric=False), GridSpec(8, 128)]


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "3:8", "unstructured"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_unpacking_gives_weights_and_grids_back_bit_for_bit(
    checkpoint: Path, tmp_path: Path, spec: GridSpec, pattern: str, dtype: torch.dtype
) -> None:
    plain = quantised(checkpoint, spec, Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None), dtype)
    record = pack(plain, tmp_path / "packed")
    assert record.metrics["pattern"] == ("unstructured" if pattern == "3:8" else pattern)  # 3:8 is none it looks for
    assert not (tmp_path / "packed" / GRIDS_NAME).exists()
    settings = said(tmp_path / "packed")
    assert settings == {"quant_method": "lors_packed", "version": 2, "pattern": record.metrics["pattern"],
                        "modules": settings["modules"], **asdict(spec)}  # fmt: skip
    tensors = load_file(tmp_path / "packed/model.safetensors")
    assert tensors[f"{Q_PROJ}.weight"].dtype == torch.uint8
    assert tensors[f"{Q_PROJ}.weight_scale"].dtype == dtype
    assert (f"{Q_PROJ}.weight_zero" in tensors) is not spec.symmetric
    assert record.metrics["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    names = tuple(f"{name}." for name in settings["modules"])
    num_bits = 8 * sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(names))
    num_weights = sum(layer["shape"][0] * layer["shape"][1] for layer in record.metrics["layers"])
    assert record.metrics["bits_a_weight"] == pytest.approx(num_bits / num_weights, abs=1e-4)
    assert record.metrics["quantize"] == asdict(spec)
    unpack(tmp_path / "packed", tmp_path / "plain")
    same(plain, tmp_path / "plain")
    assert (plain / GRIDS_NAME).read_bytes() == (tmp_path / "plain" / GRIDS_NAME).read_bytes()
    before, after = load_grids(plain), load_grids(tmp_path / "plain")
    assert before.keys() == after.keys()
    for name, grid in before.items():
        assert grid.spec == after[name].spec
        assert grid.scales.equal(after[name].scales)
        assert spec.symmetric or grid.zeros.equal(after[name].zeros)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_inspect_looks_at_float16_as_it_is_stored(checkpoint: Path) -> None:
    """Which a CPU computes as bfloat16: its values would lie on no grid."""
    assert inspect(ModelConfig(path=str(quantised(checkpoint, dtype=torch.float16)), device="cpu"))["off_grid"] == 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_packed_model_loads_in_one_line_and_gives_the_same_logits(
    checkpoint: Path, tmp_path: Path, spec: GridSpec
) -> None:
    plain = quantised(checkpoint, spec)
    pack(plain, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    linear = model.get_submodule(Q_PROJ)
    assert isinstance(linear, PackedLinear)
    assert f"{spec.bits} bits in groups of {spec.group_size}" in repr(linear)
    assert linear.packed.grid is not None
    assert linear.packed.grid.spec == spec
    tokens = torch.arange(2, 22).view(2, 10)
    dense = AutoModelForCausalLM.from_pretrained(plain)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    texts = [each.generate(tokens[:1], max_new_tokens=6, do_sample=False).tolist() for each in (model, dense)]
    assert texts[0] == texts[1]
    later = model.dequantize()
    for name in (Q_PROJ, DOWN_PROJ):
        assert later.get_submodule(name).weight.equal(dense.get_submodule(name).weight)


def test_a_loaded_model_compiles_whole(checkpoint: Path, tmp_path: Path) -> None:
    pack(quantised(checkpoint), tmp_path / "packed")
    mlp, x = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").model.layers[0].mlp, torch.randn(1, 3, 32)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_saving_and_loading_again_gives_equal_tensors(checkpoint: Path, tmp_path: Path, spec: GridSpec) -> None:
    pack(quantised(checkpoint, spec, dtype=torch.bfloat16), tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    same(tmp_path / "packed", tmp_path / "again")
    assert said(tmp_path / "packed") == said(tmp_path / "again")


def test_lors_takes_a_packed_model_for_what_was_packed(checkpoint: Path, tmp_path: Path) -> None:
    plain = quantised(checkpoint)
    pack(plain, tmp_path / "packed")
    states = [load_model(ModelConfig(path=str(path))).state_dict() for path in (plain, tmp_path / "packed")]
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    kept, _ = load(tmp_path / "packed")
    assert isinstance(kept.get_submodule(Q_PROJ), PackedLinear)


def test_whether_it_stays_packed_is_asked_of_the_device_that_it_goes_to(checkpoint: Path, tmp_path: Path) -> None:
    """It is read on the CPU, whose kernel knows codes; no other's does."""
    pack(quantised(checkpoint), tmp_path / "packed")
    source, elsewhere = ModelConfig(path=str(tmp_path / "packed")), torch.device("meta")
    assert isinstance(load_model(source, keep_packed=True).get_submodule(Q_PROJ), PackedLinear)
    moved = load_model(source, device=elsewhere, keep_packed=True)
    assert type(moved.get_submodule(Q_PROJ)) is torch.nn.Linear
    assert moved.device == elsewhere


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inspect_says_its_zeros_and_bits(checkpoint: Path, tmp_path: Path, spec: GridSpec, recorded: bool) -> None:
    plain = quantised(checkpoint, spec, Pattern.parse("unstructured", 0.6))
    record = pack(plain, tmp_path / "packed")
    if not recorded:
        (tmp_path / "packed/stage.json").unlink()
    found, expected = (inspect(ModelConfig(path=str(path))) for path in (tmp_path / "packed", plain))
    assert found["quantize"] == asdict(spec)
    assert found["bits_a_weight"] == pytest.approx(record.metrics["bits_a_weight"])
    assert found["packed"] == {"bytes": record.metrics["bytes"], "bytes_plain": record.metrics["bytes_before"]}
    for key in ("pattern", "sparsity", "violations", "layers"):
        assert found[key] == expected[key]
    card = (tmp_path / "packed/README.md").read_text()
    assert f"a code of {spec.bits} bits for each that is kept and a bit a place" in " ".join(card.split())


@pytest.mark.parametrize("name", [Q_PROJ, DOWN_PROJ])
def test_a_weight_that_has_left_its_grid_is_refused_by_name_with_the_way_out(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    """As a merge into floats leaves it where the grids still lie beside."""
    plain = quantised(checkpoint)
    tensors = load_file(plain / "model.safetensors")
    tensors[f"{name}.weight"] *= 1.1
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"{name} .*its values do not lie on its grid") as caught:
        pack(plain, tmp_path / "packed")
    assert "remove the folder grid" in str(caught.value.hint)
    with pytest.raises(UsageError, match="do not lie on its grid"):
        foreseen_size(ModelConfig(path=str(plain)))
    assert not (tmp_path / "packed/config.json").exists()
    shutil.rmtree(plain / "grid")
    assert "quantize" not in pack(plain, tmp_path / "packed").metrics
    assert said(tmp_path / "packed")["version"] == 1


def test_layers_without_a_grid_are_packed_as_values_or_stay_dense(checkpoint: Path, tmp_path: Path) -> None:
    plain = quantised(checkpoint, floats="layers.1.", dense="layers.2.")
    record = pack(plain, tmp_path / "packed")
    settings = said(tmp_path / "packed")
    assert settings["floats"] == [name for name in settings["modules"] if "layers.1." in name] != []
    assert all("layers.2." in name for name in record.metrics["left_dense"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.get_submodule(DOWN_PROJ).packed.grid is None
    assert model.get_submodule(Q_PROJ).packed.grid is not None
    model.save_pretrained(tmp_path / "again")
    same(tmp_path / "packed", tmp_path / "again")
    unpack(tmp_path / "packed", tmp_path / "plain")
    same(plain, tmp_path / "plain")
    assert load_grids(tmp_path / "plain").keys() == load_grids(plain).keys()


def test_a_weight_on_a_grid_is_packed_however_few_zeros_it_has(checkpoint: Path, tmp_path: Path) -> None:
    plain = quantised(checkpoint, pattern=Pattern.parse("unstructured", 0.1))
    record = pack(plain, tmp_path / "packed")
    assert record.metrics["left_dense"] == []
    unpack(tmp_path / "packed", tmp_path / "plain")
    same(plain, tmp_path / "plain")


def test_another_number_format_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    plain = quantised(checkpoint)
    with pytest.raises(UsageError, match="lies on grids in float32"):
        pack(plain, tmp_path / "packed", dtype="bfloat16")
    pack(plain, tmp_path / "packed", dtype="float32")
    with pytest.raises(UsageError, match="lies on grids in float32"):
        unpack(tmp_path / "packed", tmp_path / "plain", dtype="bfloat16")


def test_unpacking_over_an_older_result_leaves_no_grid_of_it(checkpoint: Path, tmp_path: Path) -> None:
    plain = quantised(checkpoint)
    for number, name in enumerate(("codes", "values")):
        pack(plain, tmp_path / name)
        unpack(tmp_path / name, tmp_path / "plain")
        assert (tmp_path / "plain" / GRIDS_NAME).is_file() is (number == 0)
        shutil.rmtree(plain / "grid", ignore_errors=True)
    same(plain, tmp_path / "plain")


def test_the_grids_are_part_of_what_a_model_is(checkpoint: Path, tmp_path: Path) -> None:
    plain, prints = quantised(checkpoint), []
    prints.append(model_fingerprint(ModelConfig(path=str(plain))))
    grids = load_grids(plain)
    grids.pop(Q_PROJ)
    save_grids(plain, grids)
    prints.append(model_fingerprint(ModelConfig(path=str(plain))))
    shutil.rmtree(plain / "grid")
    prints.append(model_fingerprint(ModelConfig(path=str(plain))))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_dry_run_says_the_size_that_packing_then_makes(
    checkpoint: Path, tmp_path: Path, lors: Callable[..., Any], spec: GridSpec, pattern: str
) -> None:
    plain = quantised(checkpoint, spec, Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None))
    found = lors("pack", plain, "--out", tmp_path / "packed", "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    (stage,) = json.loads(found.stdout)["stages"]
    metrics = pack(plain, tmp_path / "packed").metrics
    before, after = (gib(metrics[key]) for key in ("bytes_before", "bytes"))
    share = metrics["bytes"] / metrics["bytes_before"]
    assert stage["makes"] == f"{before} → {after}, {share:.1%}; {len(metrics['layers'])} linears packed"


def test_weights_that_change_while_they_are_packed_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, reads = quantised(checkpoint), {}
    read = Checkpoint.read

    def changing(self: Checkpoint, key: str) -> torch.Tensor:
        reads[key] = reads.get(key, 0) + 1
        return read(self, key) * (1.1 if reads[key] > 1 else 1)

    monkeypatch.setattr(Checkpoint, "read", changing)
    with pytest.raises(UsageError, match="has changed while the model was packed"):
        pack(plain, tmp_path / "packed")


def filled(key: str, value: float) -> Callable[[Any, dict[str, torch.Tensor]], Any]:
    return lambda settings, tensors: tensors[f"{Q_PROJ}.{key}"].fill_(value)


BREAKS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "no scales": lambda settings, tensors: tensors.pop(f"{Q_PROJ}.weight_scale"),
    "no zero points": lambda settings, tensors: tensors.pop(f"{Q_PROJ}.weight_zero"),
    "no codes": lambda settings, tensors: tensors.pop(f"{Q_PROJ}.weight"),
    "scales of 0": filled("weight_scale", 0),
    "scales of nothing": filled("weight_scale", float("nan")),
    "zero points beyond": filled("weight_zero", 16),
    "another mask": filled("weight_mask", -1),
    "fewer scales": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight_scale": tensors[f"{Q_PROJ}.weight_scale"][:-1].clone()}
    ),
    "a code more": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight": torch.cat([tensors[f"{Q_PROJ}.weight"], torch.zeros(1, dtype=torch.uint8)])}
    ),
    "codes of floats": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight": tensors[f"{Q_PROJ}.weight"].float()}  # which transformers would cast
    ),
    "a mask of floats": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight_mask": tensors[f"{Q_PROJ}.weight_mask"].double()}
    ),
    "a single code": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight": torch.tensor(3, dtype=torch.uint8)}  # ended in an IndexError
    ),
    "zero points of floats": lambda settings, tensors: tensors.update(
        {f"{Q_PROJ}.weight_zero": tensors[f"{Q_PROJ}.weight_zero"].float()}
    ),
    "3 bits": lambda settings, tensors: settings.update(bits=3),
    "8 bits": lambda settings, tensors: settings.update(bits=8),
    "bits of text": lambda settings, tensors: settings.update(bits="4"),
    "true bits": lambda settings, tensors: settings.update(bits=True),
    "no bits": lambda settings, tensors: settings.pop("bits"),
    "no groups": lambda settings, tensors: settings.pop("group_size"),
    "groups of another size": lambda settings, tensors: settings.update(group_size=32),
    "groups of nothing": lambda settings, tensors: settings.update(group_size=0),
    "symmetric of text": lambda settings, tensors: settings.update(symmetric="no"),
    "version 1": lambda settings, tensors: settings.update(version=1),
    "version 3": lambda settings, tensors: settings.update(version=3),
    "floats that is no list": lambda settings, tensors: settings.update(floats=3),
    "floats of numbers": lambda settings, tensors: settings.update(floats=[3]),
    "floats that are codes": lambda settings, tensors: settings.update(floats=[Q_PROJ]),
    "fewer bytes": lambda settings, tensors: settings["modules"].update({Q_PROJ: 3}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_packed_models_are_refused_in_words_by_every_way_of_loading(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    packed = tmp_path / "packed"
    pack(quantised(checkpoint, GridSpec(4, 64, symmetric=False)), packed)
    settings: Any = json.loads((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    BREAKS[kind](settings["quantization_config"], tensors)
    (packed / "config.json").write_text(json.dumps(settings))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError):
        inspect(ModelConfig(path=str(packed)))
    (packed / "stage.json").unlink()
    with pytest.raises(UsageError):
        inspect(ModelConfig(path=str(packed)))
    with pytest.raises(UsageError):
        load_model(ModelConfig(path=str(packed)))
    with pytest.raises(UsageError):
        unpack(packed, tmp_path / "plain")
    assert not (tmp_path / "plain/config.json").exists()
    with pytest.raises(Exception, match=r"."):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("key", ["model.norm.weight", f"{Q_PROJ}.weight_scale", f"{DOWN_PROJ}.weight"])
def test_number_formats_that_are_not_written_are_refused_in_words(checkpoint: Path, tmp_path: Path, key: str) -> None:
    """A tensor of eight-bit floats ended in a KeyError, values of them in a RuntimeError."""
    packed = tmp_path / "packed"
    pack(quantised(checkpoint, floats="layers.1."), packed)
    tensors = load_file(packed / "model.safetensors")
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    for recorded in (True, False):
        if not recorded:
            (packed / "stage.json").unlink()
        with pytest.raises(UsageError):
            inspect(ModelConfig(path=str(packed)))
    with pytest.raises(UsageError):
        unpack(packed, tmp_path / "plain")
