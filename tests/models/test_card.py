"""The model card, read back as the hub's own library reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from lors_cli.models.card import CardScores, PackedSize, model_card
from lors_cli.models.origins import inherited, looks_like_hub_id, portable, with_dataset
from lors_cli.models.sources import fingerprint_suffix
from lors_cli.output.markdown import table
from lors_cli.recipe.loading import load_recipe
from lors_cli.recipe.schema import ModelConfig

PRUNE = {"method": "wanda", "pattern": "2:4", "sparsity": None, "calibration": {"dataset": "c4", "seed": 0}}
TUNE = {"method": "lors", "rank": 16, "data": {"dataset": "/home/me/secret/rows.jsonl", "template": "alpaca"}}
METRICS = {"pattern": "2:4", "sparsity": 0.5, "calibration": {"num_samples": 128}, "violations": 0,
           "prompt": {"format": "alpaca", "ends_with": "</s>"}}  # fmt: skip
ENVIRONMENT = {"python": "3.11.9", "packages": {"torch": "2.8.0"}}
FIELDS = {"base_model": "owner/base-1", "license": "apache-2.0", "language": ["no", "en"], "datasets": ["allenai/c4"]}


def text(**changes: Any) -> str:
    values: dict[str, Any] = {
        "base_model": "/home/me/models/base-1", "prune": PRUNE, "tune": TUNE, "metrics": METRICS,
        "environment": ENVIRONMENT, "fields": FIELDS,
    }  # fmt: skip
    return model_card(**{**values, **changes})


def card(**changes: Any) -> tuple[dict[str, Any], str]:
    _, front, body = text(**changes).split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter() -> None:
    front, _ = card()
    assert front == {
        **FIELDS, "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["sparse", "lors", "pruned", "wanda", "2:4"],
    }  # fmt: skip


def test_body() -> None:
    _, body = card()
    for part in ("50.00%", "pattern 2:4", "wanda, calibrated", "calibrated on c4", "rank 16", "torch 2.8.0",
                 "(https://huggingface.co/owner/base-1)", "from_pretrained(name", "neither faster nor smaller",
                 "those of the base model", "alpaca: one question", "### Instruction:\nName three colours.\n",
                 "An answer ends in `</s>`"):  # fmt: skip
        assert part in body, part


def test_no_path_of_this_machine_is_in_it() -> None:
    assert "/home" not in text()
    assert "rows.jsonl" in text()
    assert "/home" not in text(fields={})
    assert "base-1" in text(fields={})


def test_the_recipe_is_one(tmp_path: Path) -> None:
    """It can be copied out of the card and run."""
    prune = {"method": "wanda", "pattern": "2:4", "sparsity": 0.5, "calibration": {"dataset": "c4", "seed": 0}}
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text(prune=prune), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = load_recipe(tmp_path / "mine.yaml")
    assert (found.model.path, found.prune and found.prune.calibration.dataset) == ("owner/base-1", "c4")
    assert found.tune is not None
    assert found.tune.data.dataset == "rows.jsonl"


def test_the_recipe_has_the_settings_of_the_model() -> None:
    """Its number format, BOS token and commit were in no card."""
    model = ModelConfig(path="owner/base-1", dtype="float32", add_bos_token=False)
    for name in ("hub:owner/base-1@" + "0" * 40, "folder:1f"):
        settings = load_recipe_text(text(fingerprint=name + fingerprint_suffix(model)))["model"]
        revision = {"revision": "0" * 40} if name.startswith("hub:") else {}
        assert settings == {"path": "owner/base-1", "dtype": "float32", "add_bos_token": False, **revision}
    for usual in ("hub:owner/base-1@main:auto", "prune:1f:auto", ""):
        assert load_recipe_text(text(fingerprint=usual))["model"] == {"path": "owner/base-1"}


def test_scores_come_back_as_the_hub_reads_them() -> None:
    results = [
        EvalResult("text-generation", "allenai/ai2_arc", "arc_easy", "acc", 0.5, dataset_config="ARC-Easy"),
        EvalResult("text-generation", "Salesforce/wikitext", "wikitext2", "perplexity", 12.25),
    ]
    scores = CardScores(
        table(["task", "dense", "tuned"], [["arc_easy", "60", "50"]]), "A note.", results, {"tasks": []}
    )
    found = ModelCard(text(scores=scores, name="me/mine"))
    assert found.data.eval_results == results
    assert found.data.model_name == "mine"
    assert found.data.base_model == "owner/base-1"
    assert ModelCard(str(found)).data.to_dict() == found.data.to_dict()
    assert "| arc_easy | 60 | 50 |" in found.text.replace("\\_", "_")
    assert 'name = "me/mine"' in found.text


def test_pruned_only() -> None:
    metrics = {key: value for key, value in METRICS.items() if key != "prompt"} | {"pattern": "unstructured"}
    front, body = card(tune=None, metrics=metrics, prune={**PRUNE, "method": "ria"})
    assert front["tags"] == ["sparse", "lors", "pruned", "ria", "unstructured"]
    assert "tuned" not in body
    assert "Prompt format" not in body


def test_tuned_from_a_foreign_sparse_model() -> None:
    front, body = card(prune=None)
    assert "pruned" not in front["tags"]
    assert "pruned with" not in body


def test_tuned_with_lora_it_is_dense() -> None:
    """Its card said that the model is sparse."""
    front, body = card(tune={**TUNE, "method": "lora"}, metrics={**METRICS, "pattern": "dense", "sparsity": 0.0})
    assert front["tags"] == ["lors", "pruned", "wanda", "lora"]
    assert "A dense model, tuned from a pruned version of [owner/base-1]" in body
    assert "merged into these weights, whose zeros that filled." in body
    for part in ("A sparse version", "are zero", "every zero", "neither faster nor smaller"):
        assert part not in body, part


def test_chat_names_the_template_of_the_base() -> None:
    _, body = card(metrics={**METRICS, "prompt": {"format": "chat", "ends_with": "<|im_end|>"}})
    assert "The base model's own chat template." in body


@pytest.mark.parametrize(
    "name", ["/data/my model", "./folder", "llama", "a/b/c", "x/y.gguf", "package://m/f.gguf", "data/rows.jsonl"]
)
def test_no_hub_id(name: str) -> None:
    assert not looks_like_hub_id(name)
    front, body = card(base_model=name, fields={})
    assert "base_model" not in front
    assert "license" not in front
    assert "huggingface.co" not in body


def test_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_like_hub_id("owner/base-1")
    (tmp_path / "owner/base-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not looks_like_hub_id("owner/base-1")


def test_hostile_values_stay_values() -> None:
    front, body = card(
        prune={**PRUNE, "method": "x: y\n---\nlicense: mit", "note": "a|b\n# heading\n```\n# more"},
        base_model="a/b\n---\nlicense: mit", fields={},
    )  # fmt: skip
    assert "license" not in front
    assert "x: y\n---\nlicense: mit" in front["tags"]
    fenced = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "# heading" not in fenced
    assert "# more" not in fenced


# ---- where it comes from


def folder_with(path: Path, front: str) -> ModelConfig:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text(f"---\n{front}---\n# A model\n")
    return ModelConfig(path=str(path))


def test_licence_and_language_are_those_of_the_base(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "base", "license: llama3\nlanguage: [en]\nbase_model: some/other\ntags: [chat]\n")
    assert inherited(model) == {"license": "llama3", "language": ["en"]}


def test_a_model_made_here_hands_its_origin_on(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "sparse", "base_model: some/base\ndatasets: [allenai/c4]\ntags: [sparse, lors]\n")
    assert inherited(model) == {"base_model": "some/base", "datasets": ["allenai/c4"]}


def test_a_folder_of_the_hub_s_cache_is_the_model_on_the_hub(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "models--some-org--base" / "snapshots" / ("0" * 40), "license: mit\n")
    assert inherited(model) == {"base_model": "some-org/base", "license": "mit"}


@pytest.mark.parametrize("front", ["a: [", "- list\n", "\x00"])
def test_a_broken_card_of_the_base_says_nothing(tmp_path: Path, front: str) -> None:
    assert inherited(folder_with(tmp_path / "base", front)) == {}


def test_data_sets_are_those_that_the_hub_gave() -> None:
    fields = with_dataset({"datasets": ["allenai/c4"]}, "hub:tatsu-lab/alpaca/default/train")
    assert fields["datasets"] == ["allenai/c4", "tatsu-lab/alpaca"]
    assert with_dataset({}, "alpaca:0123") == {}


def test_settings_without_paths() -> None:
    found = portable({"a": ["/x/rows.jsonl", "org/name", "package://m/f.gguf", "2:4"], "b": {"c": "data/rows.csv"}})
    assert found == {"a": ["rows.jsonl", "org/name", "package://m/f.gguf", "2:4"], "b": {"c": "rows.csv"}}
    kept = {"dataset": "HuggingFaceFW/fineweb:sample-10BT@main", "system_instruction": "Answer yes/no."}
    assert portable(kept) == kept
    assert portable({"dataset": "/home/me/fineweb:x@main"}) == {"dataset": "fineweb:x@main"}


def test_of_a_packed_model() -> None:
    """How to load it, its size, its speed where it was measured; and nothing of what only plain weights are."""
    plain = text()
    front, body = card(packed=PackedSize(600 << 20, 1000 << 20, "Twice as fast."))
    assert front["tags"][-1] == "lors_packed"
    assert body.startswith("\n# base-1, pruned, tuned and packed\n")
    for part in ("import lors_cli  # knows packed weights; pip install lors-cli\nfrom transformers import",
                 "600.0 MiB instead of 1000.0 MiB (60.0%)", "pip install lors-cli", "without it the load fails",
                 "a C compiler and torch 2.10", "from Ampere on", "Twice as fast.", "pack: {}"):  # fmt: skip
        assert part in body, part
        assert part not in plain, part
    assert "Ampere" not in text(packed=PackedSize(600 << 20, 1000 << 20, bits=4)), "no kernel reads codes there"
    assert "neither faster nor smaller" not in body
    assert load_recipe_text(body)["pack"] == {}
    assert "pack" not in load_recipe_text(card()[1])


def load_recipe_text(body: str) -> dict[str, Any]:
    (found,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    return yaml.safe_load(found)
