"""What blocks are given besides hidden states: it may depend on the text, and on the blocks before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_walks import killed_when
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lors_cli.errors import UsageError
from lors_cli.models.streaming import BlockwiseModel, open_blockwise
from lors_cli.pruning.methods.owl import allocate, outlier_ratio
from lors_cli.pruning.stage import prune
from lors_cli.pruning.walk import block as walk_block
from lors_cli.pruning.walk.calibration import capture
from lors_cli.pruning.walk.passes import owl_shares
from lors_cli.recipe.schema import CalibrationConfig, ModelConfig, PruneConfig

Build = Callable[..., PreTrainedModel]
ISSUE: dict[str, Any] = {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 64, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"], ["per_layer_input_gate"], ["per_layer_projection"],
]  # fmt: skip
TOKENS = torch.randint(2, 512, (12, 64), generator=torch.Generator().manual_seed(0))


class Gemma:
    """Gemma 4 with per-layer inputs on disk, and pruned."""

    def __init__(self, folder: Path, build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.build, self.tokenizer = folder, build, copy.deepcopy(tokenizer)
        self.tokenizer.add_tokens([f"w{index}" for index in range(64, 512)])
        save_file({"input_ids": TOKENS}, folder / "tokens.safetensors")

    def dense(self, shared: int = 0) -> PreTrainedModel:
        return self.build("Gemma4", **ISSUE, num_kv_shared_layers=shared).requires_grad_(False)

    def save(self, shared: int = 0) -> ModelConfig:
        self.dense(shared).save_pretrained(self.folder / "dense")
        self.tokenizer.save_pretrained(self.folder / "dense")
        return ModelConfig(path=str(self.folder / "dense"), dtype="float32")

    def config(self, offload: Any = "auto", **settings: Any) -> PruneConfig:
        calibration = CalibrationConfig(dataset=str(self.folder / "tokens.safetensors"), batch_size=4, offload=offload)
        return PruneConfig(**{"method": "wanda", "calibration": calibration, **settings})

    def pruned(self, shared: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
        prune(self.config(**settings), self.save(shared), self.folder / "out")
        return AutoModelForCausalLM.from_pretrained(self.folder / "out").state_dict()


@pytest.fixture
def gemma(tmp_path: Path, build: Build, word_tokenizer: PreTrainedTokenizerFast) -> Gemma:
    return Gemma(tmp_path, build, word_tokenizer)


@contextmanager
def squares_of(linears: list[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Sums of squared inputs, by plain hooks."""
    sums: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sums[module] = sums.get(module, 0) + args[0].double().square().sum((0, 1))

    handles = [linear.register_forward_pre_hook(add) for linear in linears]
    yield sums
    for handle in handles:
        handle.remove()


def prune_whole(model: PreTrainedModel, groups: list[list[str]]) -> dict[str, torch.Tensor]:
    """Wanda by whole forward passes, all texts at once, anew for each group of each block; its masks by name."""
    for block in model.model.layers:
        linears = dict(block.named_modules())
        for names in groups:
            present = [linears[name] for name in names if name in linears]
            with squares_of(present) as sums, torch.no_grad():
                model(input_ids=TOKENS)
            for linear in present:
                score = linear.weight.abs().double() * sums[linear].sqrt()
                lowest = score.view(len(score), -1, 4).argsort(-1)[..., :2]
                linear.weight.view(len(score), -1, 4).scatter_(-1, lowest, 0.0)
    return {f"{name}.weight": module.weight == 0 for name, module in model.named_modules()
            if ".layers." in name and isinstance(module, nn.Linear)}  # fmt: skip


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_wanda_of_gemma_4_with_per_layer_inputs_is_that_of_the_whole_model(
    shared: int, sequential: bool, gemma: Gemma
) -> None:
    expected = prune_whole(gemma.dense(shared), GROUPS if sequential else [list(chain(*GROUPS))])
    assert len(expected) == 36 - 2 * shared
    found = gemma.pruned(shared, true_sequential=sequential)
    assert [name for name in expected if not torch.equal(found[name] == 0, expected[name])] == []


@pytest.mark.parametrize("shared", [0, 2])
def test_owl_is_that_of_the_whole_model(shared: int, gemma: Gemma, tmp_path: Path) -> None:
    model = gemma.dense(shared)
    ratios, sizes = [], []
    for block in model.model.layers:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        with squares_of(linears) as sums, torch.no_grad():
            model(input_ids=TOKENS)
        matrices = [linear.weight for linear in linears]
        ratios.append(outlier_ratio(matrices, [sums[linear].sqrt().float() for linear in linears]))
        sizes.append(sum(matrix.numel() for matrix in matrices))
    source = BlockwiseModel(model, torch.device("cpu"), None)
    shares = owl_shares(source, list(TOKENS.split(4)), CalibrationConfig(), tmp_path, 0.5)
    assert shares == pytest.approx(allocate(ratios, sizes, 0.5))
    assert len(set(shares)) > 1


@pytest.mark.parametrize("shared", [0, 2])
def test_reconstruction_goes_from_what_pruned_blocks_give_to_what_dense_ones_do(
    shared: int, gemma: Gemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its own model, with its own keys and values where blocks share them."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def noted(block: nn.Module, weights: Any, run: Any, inputs: Any, **options: Any) -> None:
        given = [each() for each in inputs]
        outputs = [run(block, x, number) for x, _, number in given]
        found.append((torch.cat(outputs), torch.cat([target for _, target, _ in given])))

    monkeypatch.setattr(walk_block, "reconstruct", noted)
    pruned, dense = gemma.dense(shared), gemma.dense(shared)
    pruned.load_state_dict(gemma.pruned(shared, reconstruct_epochs=1))
    for place, model in enumerate((pruned, dense)):
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in model.model.layers:
                stack.enter_context(block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out)))
            model(input_ids=TOKENS)
        for outputs, expected in zip(found, seen, strict=True):
            torch.testing.assert_close(outputs[place], expected)
    assert len(found) == 4


@pytest.mark.parametrize("offload", ["auto", "disk"])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_killed_run_ends_in_the_same_weights(
    shared: int, offload: str, gemma: Gemma, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys and values that blocks share are not on disk: then the run starts at the first block again."""
    expected = gemma.pruned(shared)
    config, out = gemma.config(offload), gemma.folder / "again"
    killed_when(lambda block, _: block == 3, config, gemma.save(shared), out)
    assert (out / ".work" / "inputs_0003.0of1.safetensors").exists()
    prune(config, gemma.save(shared), out)
    assert ("resuming after 3 of 4 blocks" in capsys.readouterr().err) == (not shared)
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_depend_on_the_text_is_held_once(gemma: Gemma) -> None:
    model = gemma.dense()
    _, arguments = capture(model, list(model.model.layers), list(TOKENS.split(4)))
    (inputs, other), (first, second) = ([arguments[1].by_batch[number][place] for number in (0, 2)] for place in (0, 1))
    assert not torch.equal(inputs[0], other[0])
    for one, two in zip(first["position_embeddings"], second["position_embeddings"], strict=True):
        assert one is two
    assert first["shared_kv_states"] is arguments[2].by_batch[0][1]["shared_kv_states"]
    assert first["shared_kv_states"] is not second["shared_kv_states"]


class TestRefusals:
    """Models that do more between blocks than hand hidden states on, made out of a Llama."""

    def refused(self, forward: Callable[..., torch.Tensor], build: Build, message: str) -> None:
        model = build()
        layers = list(model.model.layers)

        def call(input_ids: torch.Tensor, **_: Any) -> Any:
            return model.lm_head(forward(layers, model.model.embed_tokens(input_ids)))

        model.forward = call
        with pytest.raises(UsageError, match=f"LlamaForCausalLM is not supported: {message}"):
            capture(model, layers, [torch.zeros(2, 8, dtype=torch.long)])

    def test_hidden_states_that_are_changed(self, build: Build) -> None:
        self.refused(lambda layers, x: layers[1](layers[0](x) + 1), build, "it changes hidden states")

    def test_blocks_that_are_called_twice(self, build: Build) -> None:
        self.refused(lambda layers, x: layers[1](layers[0](layers[1](layers[0](x)))), build, "it calls its blocks more")

    def test_a_block_that_is_not_called(self, build: Build) -> None:
        self.refused(lambda layers, x: layers[0](x), build, "it calls only 1 of its 2 blocks")

    def test_blocks_that_hand_more_on(self, build: Build) -> None:
        def forward(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
            x, extra = layers[0](x)
            x, extra = layers[1](x, extra)
            return x

        self.refused(forward, build, "its blocks hand more than hidden states on")


class TestWrapper:
    """A Gemma 3 for images whose vision tower is as deep as its text model."""

    @pytest.fixture
    def wrapper(self, tmp_path: Path, build: Build, word_tokenizer: PreTrainedTokenizerFast) -> Path:
        build("Gemma3-vision").save_pretrained(tmp_path / "dense")
        word_tokenizer.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    def test_only_the_decoder_is_pruned_and_what_is_left_is_named(
        self, wrapper: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = PruneConfig(method="wanda", calibration=CalibrationConfig(dataset=str(token_file), batch_size=4))
        prune(config, ModelConfig(path=str(wrapper), dtype="float32"), tmp_path / "out")
        metrics = json.loads((tmp_path / "out" / "stage.json").read_text())["metrics"]
        assert metrics["left_out"] == ["model.vision_tower", "model.multi_modal_projector"]
        assert "left as they are: model.vision_tower, model.multi_modal_projector" in capsys.readouterr().err
        dense, found = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (wrapper, tmp_path / "out"))
        changed = {name for name in dense if not torch.equal(dense[name], found[name])}
        assert changed == {f"{layer['name']}.weight" for layer in metrics["layers"]}
        assert len(changed) == 14
        assert all(name.startswith("model.language_model.layers.") for name in changed)

    def test_blocks_are_those_of_the_decoder(self, wrapper: Path) -> None:
        source = open_blockwise(ModelConfig(path=str(wrapper), dtype="float32"))
        assert source.prefix == "model.language_model.layers"
