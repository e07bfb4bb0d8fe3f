"""`quantize` through the whole stage: what lies on disk is on its grids, and so after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_walks import killed_when
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import Result

from lors_cli.errors import SparsityError, UsageError
from lors_cli.files import records
from lors_cli.grid import Grid, GridSpec, bits_a_weight, packed_metrics
from lors_cli.models.grids import GRIDS_NAME, load_grids
from lors_cli.models.size import model_size
from lors_cli.pruning import estimate, methods
from lors_cli.pruning.stage import prune, stage_fingerprint
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig, QuantizeConfig


def config_of(token_file: Path, method: str = "sparsegpt", **changes: Any) -> PruneConfig:
    calibration = CalibrationConfig(dataset=str(token_file), batch_size=4)
    given = {"method": method, "calibration": calibration, "quantize": QuantizeConfig(group_size=32), **changes}
    return PruneConfig(**given)


def assert_on_grids(folder: Path, spec: GridSpec, num_linears: int = 21) -> dict[str, Grid]:
    """Every value of every linear is one that its codes give back, and 0 where it is pruned."""
    tensors, grids = load_file(folder / "model.safetensors"), load_grids(folder)
    assert len(grids) == num_linears
    for name, grid in grids.items():
        weight = tensors[f"{name}.weight"]
        assert grid.spec == spec
        assert grid.scales.shape == (len(weight), -(-weight.shape[1] // spec.group_size))
        assert grid.values(grid.codes(weight)).equal(weight)
        for first in range(0, weight.shape[1], spec.group_size):
            most = max(len(row.unique()) for row in weight[:, first : first + spec.group_size])
            assert most <= 2**spec.bits
    return grids


@pytest.mark.parametrize(
    ("method", "quantize"),
    [
        ("sparsegpt", QuantizeConfig(group_size=32)),
        ("sparsegpt", QuantizeConfig(bits=8, group_size=32)),
        ("wanda", QuantizeConfig(group_size=32, symmetric=False)),
        ("ria", QuantizeConfig(group_size=128)),
        ("magnitude", QuantizeConfig(group_size=64, symmetric=False)),
    ],
)
def test_a_checkpoint_on_grids(
    method: str, quantize: QuantizeConfig, checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", config_of(token_file, method, quantize=quantize)
    record = prune(config, ModelConfig(path=str(checkpoint)), out)
    spec = GridSpec(quantize.bits, quantize.group_size, quantize.symmetric)
    assert_on_grids(out, spec)
    assert record.metrics["violations"] == 0
    assert record.metrics["sparsity"] == pytest.approx(0.5, abs=0.03)  # a kept value may be rounded to 0
    assert record.metrics["quantize"] == {
        "bits": quantize.bits, "group_size": quantize.group_size, "symmetric": quantize.symmetric,
    }  # fmt: skip
    assert record.metrics["calibration"]["tokens"] == 240
    assert GRIDS_NAME in record.files
    assert records.is_finished(out, record.fingerprint)
    card = (out / "README.md").read_text()
    assert f"grids of {quantize.bits} bits" in card
    assert f"{record.metrics['bits_a_weight']:.2f} bits a weight" in card
    assert f"{quantize.bits}-bit" in card


def test_bits_a_weight_by_hand(checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    record = prune(config_of(token_file), ModelConfig(path=str(checkpoint), dtype="bfloat16"), tmp_path / "out")
    shapes = [layer["shape"] for layer in record.metrics["layers"]]
    assert {columns for _, columns in shapes} == {32, 64}  # whole groups: half of 4 bits, a bit, 16 bits of 32 weights
    assert record.metrics["bits_a_weight"] == 0.5 * 4 + 1 + 16 / 32
    assert bits_a_weight(GridSpec(4, 128), [(10, 4096, 0.5)]) == 3.125
    assert bits_a_weight(GridSpec(4, 128, symmetric=False), [(10, 4096, 0.5)]) == 3.1875
    assert bits_a_weight(GridSpec(4, 128), [(1, 576, 0.5)]) == pytest.approx(3 + 5 * 16 / 576)
    assert bits_a_weight(GridSpec(8, 32), [(1, 32, 0.25), (3, 32, 0.5)], 32) == (2 + 3 * 4) / 4 + 2


def test_bits_are_those_of_what_can_be_packed(
    build: Callable[..., PreTrainedModel], word_tokenizer: Any, token_file: Path, tmp_path: Path
) -> None:
    """Experts in one tensor were counted too, though `lors pack` leaves them as they are."""
    build("Mixtral").save_pretrained(tmp_path / "dense")
    word_tokenizer.save_pretrained(tmp_path / "dense")
    model = ModelConfig(path=str(tmp_path / "dense"))
    config = config_of(token_file, "magnitude", quantize=QuantizeConfig(group_size=64))
    pruned = prune(config, model, tmp_path / "sparse")
    assert pruned.metrics["bits_a_weight"] == 0.5 * 4 + 1 + 32 / 32  # of attention's 32 inputs
    assert estimate.bits(config, model_size(model)) == 4.0  # type: ignore[arg-type]
    assert packed_metrics(GridSpec(4, 64), [], 16).keys() == {"quantize"}


def test_unstructured_counts_what_is_left(checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    config = config_of(token_file, pattern="unstructured", sparsity=0.75)
    record = prune(config, ModelConfig(path=str(checkpoint), dtype="bfloat16"), tmp_path / "out")
    assert record.metrics["bits_a_weight"] == pytest.approx((1 - record.metrics["sparsity"]) * 4 + 1.5, abs=1e-3)
    assert_on_grids(tmp_path / "out", GridSpec(4, 32))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_the_rows_of_a_grid_move_with_those_of_its_weight(
    method: str, sequential: bool, checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    """channel_permutation reorders rows that are already rounded: gate, up and v, each by a scale of its own."""
    up_proj = []
    for permuted in (False, True):
        out = tmp_path / str(permuted)
        config = config_of(token_file, method, channel_permutation=permuted, true_sequential=sequential)
        prune(config, ModelConfig(path=str(checkpoint)), out)
        grids = assert_on_grids(out, GridSpec(4, 32))
        up_proj.append((grids["model.layers.0.mlp.up_proj"].scales, load_file(out / "model.safetensors")))
    (plain, weights), (moved, moved_weights) = up_proj
    assert not plain.equal(moved)
    if not sequential:  # then up_proj's inputs are the same in both
        assert plain.sort(dim=0).values.equal(moved.sort(dim=0).values)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not weights[name].equal(moved_weights[name])


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_a_killed_run_keeps_the_grids_of_finished_blocks(
    method: str, checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    model, config = ModelConfig(path=str(checkpoint)), config_of(token_file, method)
    prune(config, model, tmp_path / "unbroken")
    out = tmp_path / "out"
    killed_when(lambda block, _: block == 2, config, model, out)
    assert not (out / GRIDS_NAME).exists()
    prune(config, model, out)
    for name in ("model.safetensors", GRIDS_NAME):
        assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_values_off_their_grid_publish_nothing(
    checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_group = methods.round_group

    def off(*args: Any, **settings: Any) -> Any:
        weights, grids = round_group(*args, **settings)
        weights[0][weights[0] != 0] *= 1.01
        return weights, grids

    monkeypatch.setattr(methods, "round_group", off)
    out = tmp_path / "out"
    with pytest.raises(SparsityError, match=r"off their grids, first model\.layers\.0\.self_attn\.q_proj") as raised:
        prune(config_of(token_file), ModelConfig(path=str(checkpoint)), out)
    assert raised.value.exit_code == 5
    assert {path.name for path in out.iterdir()} <= {".work", ".staging"}


def test_grids_of_an_earlier_result_do_not_stay(checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    model, out = ModelConfig(path=str(checkpoint)), tmp_path / "out"
    prune(config_of(token_file), model, out)
    assert load_grids(out)
    record = prune(config_of(token_file, quantize=None), model, out)
    assert load_grids(out) == {}
    assert "quantize" not in record.metrics


def test_experts_and_stored_transposed(build: Any, word_tokenizer: Any, token_file: Path, tmp_path: Path) -> None:
    """GPT-2's weights are stored (in, out); an expert that no token reaches is rounded to the nearest."""
    for name, options in (("GPT-2", {}), ("Mixtral", {"num_local_experts": 64, "num_experts_per_tok": 1})):
        folder, out = tmp_path / name, tmp_path / f"{name}-out"
        build(name, **options).save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
        record = prune(config_of(token_file), ModelConfig(path=str(folder)), out)
        layers = {layer["name"] for layer in record.metrics["layers"]}
        assert load_grids(out).keys() == layers
        assert record.metrics["violations"] == 0
        if name == "Mixtral":
            assert 0 in record.metrics["few_tokens"].values()


def test_the_fingerprint_counts_it(token_file: Path) -> None:
    plain = config_of(token_file, quantize=None)
    changes: list[dict[str, Any]] = [{}, {"bits": 8}, {"group_size": 64}, {"symmetric": False}]
    configs = [plain, *(replace(plain, quantize=QuantizeConfig(**change)) for change in changes)]
    assert len({stage_fingerprint(config, "model:0", None) for config in configs}) == 5


def test_refit_is_what_admm_ends_in_on_grids(token_file: Path) -> None:
    for method, apart in (("admm", 1), ("sparsegpt", 2)):
        configs = [config_of(token_file, method=method, refit=refit) for refit in (False, True)]
        assert len({stage_fingerprint(config, "model:0", None) for config in configs}) == apart


@pytest.mark.parametrize(("method", "kind"), [("magnitude", "hessian"), ("wanda", "hessian"), ("sparsegpt", "hessian")])
def test_every_method_sums_the_hessian_then(method: Any, kind: str) -> None:
    assert methods.statistics_kind(PruneConfig(method=method, quantize=QuantizeConfig())) == kind
    assert PruneConfig(method="magnitude", quantize=QuantizeConfig(), true_sequential=True).sequential


def test_eight_bits_are_symmetric() -> None:
    with pytest.raises(ValueError, match="8 bits are symmetric"):
        QuantizeConfig(bits=8, symmetric=False)
    with pytest.raises(UsageError, match="bits"):
        QuantizeConfig(bits=5)  # type: ignore[arg-type]


Lors = Callable[..., Result]


def test_from_the_command_line(at_workshop: Path, lors: Lors) -> None:
    command = ("prune", "dense", "--out", "sparse", "--calibration", "text.jsonl", "calibration.num_samples=4",
               "calibration.sequence_length=32", "quantize={bits: 4, group_size: 32}")  # fmt: skip
    planned = json.loads(lors(*command, "--dry-run", "--json").stdout)["stages"][0]
    assert planned["what"].startswith("sparsegpt 2:4, rounded to 4 bits")
    assert planned["makes"] == "3.50 bits a weight of the pruned linears, once they are packed"
    done = lors(*command)
    assert done.exit_code == 0, done.output
    assert "4 bits, 3.50 a weight once packed" in done.output
    found = json.loads(lors("inspect", "sparse", "--json").stdout)
    assert found["quantize"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert (found["bits_a_weight"], found["off_grid"], found["violations"]) == (3.5, 0, 0)
    assert (
        "4 bits in groups of 32, 3.50 bits a weight once packed, 0 values off them" in lors("inspect", "sparse").output
    )
    refused = lors("prune", "dense", "--out", "other", "quantize.bits=8", "quantize.symmetric=false")
    assert refused.exit_code == 2
    assert "8 bits are symmetric" in refused.output


@pytest.mark.parametrize("recorded", [True, False])
def test_inspect_counts_values_off_their_grids(
    recorded: bool, checkpoint: Path, token_file: Path, tmp_path: Path, lors: Lors
) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    prune(config_of(token_file), ModelConfig(path=str(checkpoint)), out)
    tensors = load_file(out / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    row, column = (weight != 0).nonzero()[7].tolist()
    weight[row, column] *= 1.003
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if not recorded:
        (out / "stage.json").unlink()
    found = json.loads(lors("inspect", out, "--json").stdout)
    assert (found["off_grid"], found["bits_a_weight"]) == (1, 0.5 * 4 + 1 + 32 / 32)
    shutil.rmtree(out / "grid")
    assert "quantize" not in json.loads(lors("inspect", out, "--json").stdout)


def test_the_estimate_knows_scales_and_the_hessian(checkpoint: Path, token_file: Path) -> None:
    size = model_size(ModelConfig(path=str(checkpoint)))
    assert size is not None
    plain, quantised = config_of(token_file, "wanda", quantize=None), config_of(token_file, "wanda")
    assert estimate.memory_parts(plain, size)["statistics"] == 0
    assert estimate.memory_parts(quantised, size)["statistics"] == 4 * (3 * 32**2 + 64**2)
    scales = 3 * 4 * (4 * 32 * 1 + 2 * 64 * 1 + 32 * 2)
    # q, k, v and o of 32 × 32 (k and v fewer rows), gate and up of 64 × 32, down of 32 × 64
    scales -= 3 * 4 * (4 * 32 - sum(rows for rows, columns in size.linears[:4]))
    assert estimate.needs(quantised, size).disk - estimate.needs(plain, size).disk == 2 * scales
    assert estimate.operations(quantised, size) > estimate.operations(plain, size)
