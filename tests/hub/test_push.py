"""`lors push` with the real client library: what goes, what stays, who may, and that it comes back as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chains import Process, Server
from hub import STRANGER, TOKEN, Fault, Hub, Repo
from huggingface_hub import ModelCard
from safetensors.torch import load

from lors_cli.recipe.loading import load_recipe

Lors = Callable[..., Process]
BASE = "some-org/stories"
RECIPE = f"""\
name: mine
model: {{path: {BASE}, device: cpu, dtype: float32}}
prune: {{method: magnitude, pattern: 2:4}}
tune:
  rank: 4
  data: {{dataset: rows.jsonl, max_length: 256, template: alpaca_short}}
  learning_rate: 1e-3
  max_steps: 2
  batch_size: 2
eval: {{tasks: [pydoc_choice], limit: 3}}
"""


def said(found: Process) -> str:
    return " ".join(found.output.split())


@pytest.fixture(scope="module")
def run(online: Server, hub: Hub, model_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model of the hub, whose card says its licence."""
    hub.repos["model", BASE] = Repo(dict(model_files), card={"license": "mit", "language": ["en"], "tags": ["x"]})
    place = tmp_path_factory.mktemp("finished")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "mine.yaml").write_text(RECIPE)
    found = online.run(place, ["run", "mine.yaml"])
    assert found.code == 0, found.output
    return place / "runs" / "mine"


@pytest.fixture
def mine(run: Path, place: Path) -> Path:
    """A copy of the run, in the folder that commands are run in."""
    shutil.copytree(run, place / "runs" / "mine")
    return place / "runs" / "mine"


def test_a_pushed_model_comes_back_bit_for_bit(lors: Lors, hub: Hub, mine: Path, home: Path, tmp_path: Path) -> None:
    """A run's tuned model by its hub id, in a process that knows nothing but transformers."""
    found = lors("push", "runs/mine", "back-again", "--yes", token=TOKEN)
    assert found.code == 0, found.output
    assert "its tuned model goes, runs/mine/tune" in said(found)
    files = hub.repos["model", "me/back-again"].files
    shards = sorted(path.name for path in (mine / "tune").glob("model-*.safetensors"))
    assert len(shards) == 3
    assert all(files[name] == (mine / "tune" / name).read_bytes() for name in shards)
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('me/back-again')\n"
        "state, kept = model.state_dict(), {k: v for name in sys.argv[1:] for k, v in load_file(name).items()}\n"
        "assert len(kept) > 40 and all(torch.equal(state[name], kept[name]) for name in kept)\n"
        "tokenizer = AutoTokenizer.from_pretrained('me/back-again')\n"
        "talk = [{'role': 'user', 'content': 'say 3'}]\n"
        "print(tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))\n"
    )
    fresh = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    kept = [str(mine / "tune" / name) for name in shards]
    loaded = subprocess.run([sys.executable, "-c", code, *kept], env=fresh, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == "<s>### Instruction:\nsay 3\n\n### Response:\n\n"


def test_a_pushed_packed_model_loads_with_one_line(
    lors: Lors, hub: Hub, mine: Path, tmp_path: Path
) -> None:  # fmt: skip
    """All files go; after `import lors_cli` the logits are the tuned model's; the card says how, size and scores."""
    packed = lors("pack", "runs/mine/tune", "--out", "runs/mine/packed")
    assert packed.code == 0, packed.output
    found = lors("push", "runs/mine/packed", "packed-one", "--yes", token=TOKEN)
    assert found.code == 0, found.output
    files = hub.repos["model", "me/packed-one"].files
    here = {path.name for path in (mine / "packed").iterdir() if path.is_file()}
    assert set(files) == (here - {"stage.json", ".lock"}) | {"recipe.yaml"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == (BASE, "mit")
    assert card.data.tags == ["sparse", "lors", "pruned", "magnitude", "2:4", "lors_packed"]
    assert "| task | dense | pruned | Δ dense | tuned | Δ dense |" in card.text.replace("\\", "")
    assert " instead of " in card.text
    assert "pack: {}" in files["recipe.yaml"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = code.replace("max_new_tokens=64", "max_new_tokens=3") + (
        "\nimport sys, torch\n"
        "from lors_cli.models.packed.linear import PackedLinear\n"
        "packed = any(isinstance(module, PackedLinear) for module in model.modules())\n"
        "plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(1, 33)[None]\n"
        "assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)\n"
        "print(packed, type(model.get_submodule('model.layers.0.mlp.up_proj')).__name__)\n"
    )
    fresh = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    loaded = subprocess.run([sys.executable, "-c", code, str(mine / "tune")], env=fresh, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-2:] in (["True", "PackedLinear"], ["False", "Linear"])
    without = subprocess.run([sys.executable, "-c", code.replace("import lors_cli ", "")], env=fresh,
                             capture_output=True, text=True)  # fmt: skip
    assert without.returncode != 0


def test_what_goes_and_what_stays(lors: Lors, hub: Hub, mine: Path) -> None:
    (mine / "tune" / "checkpoints").mkdir(exist_ok=True)
    (mine / "tune" / "secret.txt").write_text("of mine")
    found = lors("push", "runs/mine/tune", "me/what-goes", "--yes", "--json", token=TOKEN)
    assert found.code == 0, found.output
    files = hub.repos["model", "me/what-goes"].files
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert set(files) == shards | {
        "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "chat_template.jinja",
        "config.json", "generation_config.json", "model.safetensors.index.json", "recipe.yaml", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    document = json.loads(found.output[found.output.index("{") :])
    assert {each["path"]: each["size"] for each in document["files"]} == {k: len(v) for k, v in files.items()}
    assert {"checkpoints", "log.jsonl", "secret.txt", "stage.json"} <= set(document["left_out"])
    here = [str(mine.parents[1]).encode(), str(Path.home()).encode() + b"/", b"runs/mine", b"/tmp/"]
    for name, content in files.items():
        assert not [path for path in here if path in content], name
    assert load(files["adapter/adapter_model.safetensors"])


def test_the_card_has_scores_and_origin(lors: Lors, hub: Hub, mine: Path, tmp_path: Path) -> None:
    assert lors("push", "runs/mine", "me/card", "--yes", token=TOKEN).code == 0
    files = hub.repos["model", "me/card"].files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.language) == (BASE, "mit", ["en"])
    assert card.data.tags == ["sparse", "lors", "pruned", "magnitude", "2:4"]
    (result,) = [each for each in card.data.eval_results if each.metric_type == "acc"]
    scored = json.loads((mine / "eval" / "tuned.json").read_text())["tasks"]["pydoc_choice"]["acc"]
    assert (result.dataset_name, result.metric_value) == ("pydoc_choice", round(scored, 4))
    assert result.dataset_args == {"limit": 3}
    assert "| task | dense | pruned | Δ dense | tuned | Δ dense |" in card.text.replace("\\", "")
    assert "alpaca_short" in card.text
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model.path, recipe.model.dtype) == (BASE, "float32")
    assert re.fullmatch("[0-9a-f]{40}", recipe.model.revision)
    assert (recipe.tune and recipe.tune.data.dataset, recipe.eval and recipe.eval.limit) == ("rows.jsonl", 3)


def test_a_card_edited_by_hand_goes_as_it_is_and_unmakes_no_stage(lors: Lors, hub: Hub, mine: Path, run: Path) -> None:
    """A changed README.md once made `lors run` tune anew."""
    (mine / "tune" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    found = lors("push", "runs/mine", "me/edited", "--yes", token=TOKEN)
    assert found.code == 0, found.output
    assert "was edited: it goes as it is" in said(found)
    assert hub.repos["model", "me/edited"].files["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    place = mine.parents[1]
    (place / "mine.yaml").write_text(RECIPE)
    shutil.copy(run.parents[1] / "rows.jsonl", place)
    again = lors("run", "mine.yaml")
    assert "Every stage was finished already" in again.output, again.output
    assert (mine / "tune" / "README.md").read_text().endswith("# Mine\n")


def test_a_dry_run_shows_all_and_writes_nothing(lors: Lors, hub: Hub, mine: Path) -> None:
    found = lors("push", "runs/mine", "me/dry", "--dry-run", "--private", token=TOKEN)
    assert found.code == 0, found.output
    for part in (
        "me/dry (new, private), branch main",
        "model-00001-of",
        "stays here: checkpoints, log.jsonl, stage.json",
        f"base_model {BASE}; license mit",
        "2 scores",
        "Nothing was uploaded",
    ):
        assert part in said(found), part
    assert ("model", "me/dry") not in hub.repos


def test_a_push_replaces_the_checkpoint_that_is_there(lors: Lors, hub: Hub, mine: Path) -> None:
    """Its files stayed: transformers reads model.safetensors, of before, and takes no notice of the new index."""
    old = {"model.safetensors": b"old", "grid/scales.safetensors": b"old", "vocab.json": b"{}"}
    kept = {"LICENSE": b"mine", "images/a.safetensors": b"mine", "notes.txt": b"mine"}
    repo = hub.repos["model", "me/again"] = Repo({**old, **kept, "config.json": b"{}"})
    push = "push", "runs/mine/tune", "me/again"
    dry = lors(*push, "--dry-run", token=TOKEN)
    assert f"goes from there: {', '.join(sorted(old))} card:" in said(dry)
    for branch, files in (("v2", lambda: repo.branches["v2"]), ("main", lambda: repo.files)):
        found = lors(*push, "--revision", branch, "--yes", token=TOKEN)
        assert found.code == 0, found.output
        assert kept.items() <= files().items()
        assert not old.keys() & files().keys()
        assert "model-00003-of-00003.safetensors" in files()
    shutil.rmtree(mine / "tune" / "adapter")
    (mine / "tune" / "chat_template.jinja").unlink()
    assert lors(*push, "--revision", "v2", "--yes", token=TOKEN).code == 0
    gone = repo.files.keys() - repo.branches["v2"].keys()
    assert gone >= {"adapter/adapter_model.safetensors", "chat_template.jinja"}


def test_private_and_branch(lors: Lors, hub: Hub, mine: Path) -> None:
    assert lors("push", "runs/mine", "me/hidden", "--private", "--revision", "v1", "--yes", token=TOKEN).code == 0
    repo = hub.repos["model", "me/hidden"]
    assert repo.private
    assert "config.json" in repo.branches["v1"]
    assert not repo.files
    hub.repos["model", "me/open"] = Repo({})
    refused = lors("push", "runs/mine", "me/open", "--private", "--yes", token=TOKEN)
    assert refused.code == 2, refused.output
    assert "on the hub already, and public" in said(refused)


def test_nobody_to_ask_is_exit_2(lors: Lors, hub: Hub, mine: Path) -> None:
    found = lors("push", "runs/mine", "me/unasked", token=TOKEN)
    assert found.code == 2, found.output
    assert "add --yes" in said(found)
    assert ("model", "me/unasked") not in hub.repos


def test_who_may_not_write_is_exit_3(lors: Lors, hub: Hub, mine: Path) -> None:
    for token, words in ((None, "There is no token"), ("hf_" + "x" * 30, "refuses the token"),
                         (STRANGER, "may not write to me/denied")):  # fmt: skip
        found = lors("push", "runs/mine", "me/denied", "--yes", token=token)
        assert found.code == 3, found.output
        assert words in said(found)
        assert "hf auth login" in said(found)
        assert "hf_" + "x" * 30 not in found.output
    assert ("model", "me/denied") not in hub.repos


def test_a_broken_network_is_exit_3_and_the_next_push_sends_the_rest(lors: Lors, hub: Hub, mine: Path) -> None:
    offline = lors("push", "runs/mine", "me/broken", "--yes", token=TOKEN, connected=False)
    assert offline.code == 3, offline.output
    assert "HF_HUB_OFFLINE is set" in said(offline)
    hub.stored.clear()
    hub.faults.append(Fault("POST /api/models/me/broken/commit", "status", 503))
    stopped = lors("push", "runs/mine", "me/broken", "--yes", token=TOKEN)
    assert stopped.code == 3, stopped.output
    hub.faults.clear()
    begin = len(hub.asked)
    assert lors("push", "runs/mine", "me/broken", "--yes", token=TOKEN).code == 0
    assert not [request for _, request, _ in hub.asked[begin:] if request.startswith("PUT")], "weights sent twice"
    assert "model-00003-of-00003.safetensors" in hub.repos["model", "me/broken"].files


def test_a_busy_hub_and_a_card_it_refuses(lors: Lors, hub: Hub, mine: Path) -> None:
    hub.faults.append(Fault("GET /api/whoami-v2", "status", 503))
    busy = lors("push", "runs/mine", "me/busy", "--yes", token=TOKEN)
    assert busy.code == 3, busy.output
    hub.faults.clear()
    (mine / "tune" / "README.md").write_text("---\nlicense: [\n---\n")
    refused = lors("push", "runs/mine", "me/busy", "--yes", token=TOKEN)
    assert refused.code == 2, refused.output
    assert "license is no text" in said(refused)


@pytest.mark.parametrize(
    ("folder", "repo", "code", "words"),
    [
        ("runs", "me/x", 3, "not a checkpoint folder"),
        ("runs/mine/tune/adapter", "me/x", 3, "It is an adapter"),
        ("nowhere", "me/x", 3, "No such folder: nowhere"),
        ("runs/mine", "a/b/c", 2, "is no name on the hub"),
        ("runs/mine", "me/with space", 2, "is no name on the hub"),
    ],
)
def test_what_cannot_be_pushed(lors: Lors, mine: Path, folder: str, repo: str, code: int, words: str) -> None:
    found = lors("push", folder, repo, "--yes", token=TOKEN)
    assert found.code == code, found.output
    assert words in said(found)


def test_a_run_without_its_tuned_model_gives_the_pruned_one(lors: Lors, hub: Hub, mine: Path) -> None:
    shutil.rmtree(mine / "tune")
    found = lors("push", "runs/mine", "me/pruned", "--yes", token=TOKEN)
    assert found.code == 0, found.output
    assert "its pruned model goes" in said(found)
    card = ModelCard(hub.repos["model", "me/pruned"].files["README.md"].decode())
    assert card.data.base_model == BASE
    assert [each.metric_type for each in card.data.eval_results] == ["acc", "acc_norm"]


def test_scores_from_elsewhere(lors: Lors, hub: Hub, mine: Path) -> None:
    """`lors eval` of the folders, its labels its own."""
    shutil.move(mine / "tune", "/".join([str(mine.parents[1]), "alone"]))
    missing = lors("push", "alone", "me/scored", "--scores", "nowhere", "--yes", token=TOKEN)
    assert missing.code == 3, missing.output
    shutil.copytree(mine / "eval", mine.parents[1] / "scores")
    assert lors("push", "alone", "me/scored", "--scores", "scores", "--yes", token=TOKEN).code == 0
    front = hub.repos["model", "me/scored"].files["README.md"].decode()
    assert re.search(r"type: acc", front)
    other = lors("prune", BASE, "--out", "other", "--method", "magnitude", "--pattern", "1:4", "--device", "cpu")
    assert other.code == 0, other.output
    foreign = lors("push", "other", "me/foreign", "--scores", "scores", "--yes", token=TOKEN)
    assert foreign.code == 2, foreign.output
    assert "has no scores of the model in other" in said(foreign)
