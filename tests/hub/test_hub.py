"""What a newcomer does first, on a hub on loopback with the real client libraries."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from chains import Process
from hub import STRANGER, TOKEN, Fault, Hub, Repo

Lors = Callable[..., Process]
PRUNE = ("--method", "magnitude", "--pattern", "2:4", "--device", "cpu", "--dtype", "float32")


def said(found: Process) -> str:
    """What a command wrote, on one line."""
    return " ".join(found.output.split())


def prune(lors: Lors, model: str, **how: object) -> Process:
    return lors("prune", model, "--out", "sparse", *PRUNE, **how)


def asked_for(hub: Hub, repo: str, begin: int = 0) -> list[str]:
    return [request for _, request, _ in hub.asked[begin:] if repo in request]


def test_prune_by_id_then_offline(hub: Hub, lors: Lors, model: str, place: Path, model_files: dict[str, bytes]) -> None:
    assert prune(lors, model).code == 0
    record = json.loads((place / "sparse" / "stage.json").read_text())
    commit = hub.repos["model", model].commit
    assert record["inputs"]["model"] == f"hub:{model}@{commit}:float32"
    assert record["metrics"]["commit"] == commit
    again = prune(lors, model, connected=False)
    assert "finished earlier, nothing to do" in again.output, again.output
    other = lors("prune", model, "--out", "other", *PRUNE, connected=False)
    assert other.code == 0, other.output
    folder = place / "folder"
    folder.mkdir()
    for name, data in model_files.items():
        (folder / name).write_bytes(data)
    assert lors("prune", "folder", "--out", "from-folder", *PRUNE).code == 0
    for name in ("model-00001-of-00003.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        same = {(place / out / name).read_bytes() for out in ("sparse", "other", "from-folder")}
        assert len(same) == 1, f"{name} must not tell where the model came from"


def test_offline_without_the_weights_is_said_before_anything_runs(hub: Hub, lors: Lors, model: str) -> None:
    """A dry run brings the settings alone, and the next one, offline, found nothing in the way."""
    dry = lors("prune", model, "--out", "sparse", *PRUNE, "--dry-run")
    assert dry.code == 0, dry.output
    for more in (("--dry-run",), ()):
        found = lors("prune", model, "--out", "sparse", *PRUNE, *more, connected=False)
        assert found.code == 3, found.output
        assert "its weights are not all in the hub's cache here" in said(found)


def test_offline_weights_of_a_model_that_is_scored_already_are_not_asked_for(
    lors: Lors, model: str, place: Path, home: Path
) -> None:
    (place / "text.txt").write_text("One day a cat sat. " * 40)
    measured = ("--tasks", "", "--perplexity", "text.txt", "perplexity_length=16", "perplexity_windows=2")
    score = ("--out", "scores", *measured)
    assert prune(lors, model).code == 0
    assert lors("eval", f"dense={model}", *score).code == 0
    (weights,) = {file.parent for file in home.rglob("*.safetensors") if model.split("/")[1] in str(file)}
    for file in weights.glob("*.safetensors"):
        file.unlink()
    found = lors("eval", f"dense={model}", "pruned=sparse", *score, connected=False)
    assert found.code == 0, found.output
    refused = lors("eval", f"dense={model}", *score, "perplexity_windows=1", connected=False)
    assert "its weights are not all in the hub's cache here" in said(refused)


def test_a_hub_that_cannot_be_reached_is_none_that_refuses(hub: Hub, lors: Lors, model: str) -> None:
    """Its word of the last time counts where no connection can be made, and not where it answers otherwise."""
    assert prune(lors, model).code == 0
    hub.faults.append(Fault(f"GET .*{model}", "cut", times=1))
    assert "finished earlier, nothing to do" in prune(lors, model).output
    hub.repos["model", model].disabled = True
    refused = prune(lors, model)
    assert refused.code == 3
    assert "disabled on the hub" in said(refused)


def test_busy_once_then_nothing_to_do(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    for status in (503, 429):
        hub.faults.append(Fault(f"GET /api/models/{model}/revision", "status", status, times=1))
    first = prune(lors, model)
    assert first.code == 0, first.output
    assert "asked again in 2 s" in first.output
    assert (
        hub.repos["model", model].commit in json.loads((place / "sparse" / "stage.json").read_text())["inputs"]["model"]
    )
    assert "finished earlier, nothing to do" in prune(lors, model).output


def test_busy_for_good_is_exit_3(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    assert prune(lors, model).code == 0
    hub.faults.append(Fault(f"GET /api/models/{model}/revision", "status", 503))
    found = prune(lors, model)
    assert found.code == 3, found.output
    assert "The hub cannot answer now" in said(found)
    assert "@main" not in (place / "sparse" / "stage.json").read_text()


def test_weights_cut_off_then_gone_on_with(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    hub.faults.append(Fault(rf"GET .*{model}/.*model\.safetensors", "cut"))
    found = prune(lors, model)
    assert found.code == 3, found.output
    assert "connection to the hub failed" in said(found)
    assert not (place / "sparse" / "stage.json").exists()
    hub.faults.clear()
    assert prune(lors, model).code == 0


def test_a_hub_that_hangs_is_exit_3(hub: Hub, lors: Lors, model: str) -> None:
    hub.faults.append(Fault(f"GET /api/models/{model}/revision", "hang"))
    found = prune(lors, model)
    assert found.code == 3, found.output
    assert "the hub cannot be reached" in said(found)


def test_inspect_by_id_sees_grids_at_once(
    hub: Hub, lors: Lors, model: str, place: Path, model_files: dict[str, bytes]
) -> None:
    """They come with the weights, which inspect has to ask for before it looks for grids."""
    made = lors("prune", model, "--out", "sparse", *PRUNE, "quantize={bits: 4, group_size: 32}",
                "--calibration", "pydoc", "--num-samples", "2", "--sequence-length", "32")  # fmt: skip
    assert made.code == 0, made.output
    made_here = (path.relative_to(place / "sparse").as_posix() for path in (place / "sparse").rglob("*.*"))
    files = {name: (place / "sparse" / name).read_bytes() for name in made_here if name not in ("stage.json", ".lock")}
    assert "grid/scales.safetensors" in files
    hub.repos["model", "me/on-grids"] = Repo(files)
    found = lors("inspect", "me/on-grids", "--json")
    assert found.code == 0, found.output
    document = json.loads(found.output[found.output.index("{") :])
    assert document["off_grid"] == 0
    assert document["bits_a_weight"] < 8


def test_a_download_is_in_the_log(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    found = lors("eval", model, "--tasks", "pydoc_choice", "--limit", "2", "--device", "cpu")
    assert found.code == 0, found.output
    assert f"downloading {model} at {hub.repos['model', model].commit[:8]}" in said(found)
    assert "Fetching" not in found.output, "the libraries' own bars"


def test_revision_is_a_flag_of_every_stage(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    commit = hub.repos["model", model].commit
    found = lors("prune", model, "--out", "sparse", "--revision", commit, *PRUNE)
    assert found.code == 0, found.output
    assert not [request for request in asked_for(hub, model) if "/revision/main" in request]
    for command in (("eval", model, "--tasks", "pydoc_choice"), ("tune", model, "--out", "tuned")):
        missing = lors(*command, "--revision", "v9")
        assert missing.code == 3, missing.output
        assert "no such branch, tag or commit" in said(missing)


# ---- who may have what


def test_gated_model(hub: Hub, lors: Lors, model: str) -> None:
    hub.repos["model", model].gated = True
    nobody, stranger = prune(lors, model), prune(lors, model, token=STRANGER)
    assert (nobody.code, stranger.code) == (3, 3)
    assert f"{model} is gated" in said(nobody)
    assert "hf auth login" in said(nobody)
    assert "this token has no access" in said(stranger)
    assert prune(lors, model, token=TOKEN).code == 0


def test_bad_token(lors: Lors, model: str) -> None:
    found = prune(lors, model, token="hf_" + "x" * 30)
    assert found.code == 3
    assert "refuses the token" in said(found)
    assert "x" * 30 not in found.output


def test_names_that_are_not_there(hub: Hub, lors: Lors) -> None:
    found = prune(lors, "some-org/mispelt")
    assert found.code == 3
    assert "some-org/mispelt is not on the hub" in said(found)


def test_the_token_goes_nowhere_else(hub: Hub, lors: Lors, model: str, place: Path, home: Path) -> None:
    hub.repos["model", model].gated = True
    begin = len(hub.asked)
    found = lors("prune", model, "--out", "sparse", *PRUNE, "-vv", token=TOKEN)
    assert found.code == 0, found.output
    asked = hub.asked[begin:]
    assert any(token == f"Bearer {TOKEN}" for _, _, token in asked)
    assert any(host == "localhost" for host, _, _ in asked), "weights come from another host"
    assert not any(token for host, _, token in asked if host != "127.0.0.1")
    written = [path for root in (place, home) for path in root.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in found.output


# ---- what is no model


def test_adapter_is_refused(hub: Hub, lors: Lors, model: str, model_files: dict[str, bytes]) -> None:
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere/base"}).encode()
    for files in ({}, model_files):
        hub.repos["model", model] = Repo({**files, "adapter_config.json": adapter, "adapter_model.safetensors": b"0"})
        for command in (("prune", model, "--out", "sparse"), ("eval", model, "--tasks", "pydoc_choice")):
            found = lors(*command)
            assert found.code == 2, found.output
            assert "adapter" in said(found)
    assert not asked_for(hub, "elsewhere/base")


def test_pickles_by_id_give_the_conversion_line(hub: Hub, lors: Lors, model: str) -> None:
    files = hub.repos["model", model].files
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    for command in (("prune", model, "--out", "sparse"), ("eval", model, "--tasks", "pydoc_choice")):
        found = lors(*command)
        assert found.code == 2, found.output
        assert f"AutoModelForCausalLM.from_pretrained('{model}').save_pretrained(NEW_FOLDER)" in said(found)
    assert not [request for request in asked_for(hub, model) if "pytorch_model" in request]


# ---- data


def texts(number: int) -> bytes:
    rows = (
        {"text": f"Once upon a time there was cat {index}, who saw {index * 7 % 31} birds. " * 20}
        for index in range(number)
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def calibrated(lors: Lors, shared_dir: Path, dataset: str, **how: object) -> Process:
    return lors(
        "prune",
        str(shared_dir / "data" / "models" / "stories260k"),
        "--out",
        "sparse",
        "--method",
        "wanda",
        "--calibration",
        dataset,
        "--num-samples",
        "4",
        "--sequence-length",
        "64",
        "--device",
        "cpu",
        **how,
    )


def test_compressed_json_lines_are_streamed(hub: Hub, lors: Lors, shared_dir: Path, place: Path) -> None:
    """SlimPajama's own format."""
    packed = zstandard.compress(texts(60))
    hub.repos["dataset", "cerebras/SlimPajama-627B"] = Repo(
        {"train/chunk1/example_0.jsonl.zst": packed, "validation/chunk1/example_0.jsonl.zst": packed}
    )
    found = calibrated(lors, shared_dir, "slimpajama")
    assert found.code == 0, found.output
    assert json.loads((place / "sparse" / "stage.json").read_text())["metrics"]["calibration"]["tokens"] == 256


def test_slimpajama_and_its_part(hub: Hub, lors: Lors, shared_dir: Path, place: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    hub.repos.pop(("dataset", "cerebras/SlimPajama-627B"), None)
    gone = calibrated(lors, shared_dir, "slimpajama")
    assert gone.code == 3, gone.output
    assert "slimpajama-6b" in said(gone)
    file = io.BytesIO()
    rows = [json.loads(line) for line in texts(60).splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    hub.repos["dataset", "DKYoon/SlimPajama-6B"] = Repo({"data/train-00000-of-00001.parquet": file.getvalue()})
    found = calibrated(lors, shared_dir, "slimpajama-6b")
    assert found.code == 0, found.output


@pytest.mark.parametrize("where", ["resolve", "tree|paths-info", "revision"])
def test_data_cut_off_is_exit_3(hub: Hub, lors: Lors, shared_dir: Path, where: str) -> None:
    hub.repos["dataset", "allenai/c4"] = Repo(
        {
            "en/c4-train.00000.json": texts(60),
            "README.md": (
                b"---\nconfigs:\n- config_name: en\n  data_files: [{split: train, path: en/c4-train.*.json}]\n---\n"
            ),
        }
    )
    hub.faults.append(Fault(f"GET .*allenai/c4.*({where})|POST .*allenai/c4.*({where})", "cut"))
    found = calibrated(lors, shared_dir, "c4")
    assert found.code == 3, found.output
    assert "this is a bug" not in found.output
    hub.faults.clear()
    assert calibrated(lors, shared_dir, "c4").code == 0


def test_datasets_say_why(hub: Hub, lors: Lors, shared_dir: Path) -> None:
    hub.repos.pop(("dataset", "tatsu-lab/alpaca"), None)
    missing = calibrated(lors, shared_dir, "alpaca")
    hub.repos["dataset", "tatsu-lab/alpaca"] = Repo({"README.md": b"", "train.jsonl": texts(9)}, gated=True)
    gated = calibrated(lors, shared_dir, "alpaca")
    bad = calibrated(lors, shared_dir, "alpaca", token="hf_" + "y" * 30)
    assert (missing.code, gated.code, bad.code) == (3, 3, 3), missing.output + gated.output + bad.output
    assert "tatsu-lab/alpaca cannot be had: tatsu-lab/alpaca is not on the hub" in said(missing)
    assert "gated" in said(gated)
    assert "refuses the token" in said(bad)


def test_task_with_a_loading_script_is_exit_3(hub: Hub, lors: Lors, shared_dir: Path) -> None:
    hub.repos["dataset", "EleutherAI/logiqa"] = Repo(
        {"README.md": b"---\nlicense: mit\n---\n", "logiqa.py": b"import datasets\n"}
    )
    stories = str(shared_dir / "data" / "models" / "stories260k")
    found = lors("eval", stories, "--tasks", "logiqa", "--limit", "2")
    assert found.code == 3, found.output
    assert "needs a loading script, which datasets ≥ 4 does not run: logiqa.py" in said(found)
    assert "Score another task" in said(found)


# ---- before the first stage


def test_a_dry_run_says_all_that_is_in_the_way(hub: Hub, lors: Lors, model: str, place: Path) -> None:
    """A gated model, a task that is a script, data that is not there: known before anything is pruned."""
    hub.repos["model", model].gated = True
    hub.repos["dataset", "EleutherAI/logiqa"] = Repo({"README.md": b"", "logiqa.py": b"import datasets\n"})
    hub.repos.pop(("dataset", "allenai/c4"), None)
    (place / "mine.yaml").write_text(
        f"name: mine\nmodel: {{path: {model}, device: cpu}}\n"
        "prune: {method: wanda, pattern: 3:7, calibration: {dataset: c4, num_samples: 4, sequence_length: 64}}\n"
        "eval: {tasks: [logiqa]}\n"
    )
    for arguments in (("--dry-run",), ()):
        found = lors("run", "mine.yaml", *arguments)
        assert found.code == 3, found.output
        for what in (f"{model} is gated", "allenai/c4 cannot be had", "needs a loading script"):
            assert what in said(found), found.output
    assert not (place / "runs" / "mine" / "prune" / "stage.json").exists()
    ready = lors("run", "mine.yaml", "--dry-run", "eval.tasks=[pydoc_choice]", "prune.method=magnitude",
                 "prune.pattern=2:4", token=TOKEN)  # fmt: skip
    assert ready.code == 0, ready.output
    assert "Nothing is in its way." in ready.output
    odd = lors("run", "mine.yaml", "--dry-run", "eval.tasks=[pydoc_choice]", "prune.method=magnitude", token=TOKEN)
    assert odd.code == 2, odd.output
    assert "no multiple of 7" in said(odd)


def test_more_than_the_machine_has_is_exit_4(lors: Lors, hub: Hub, model: str, place: Path) -> None:
    files = hub.repos["model", model].files
    large = {**json.loads(files["config.json"]), "num_hidden_layers": 1500, "hidden_size": 16384}
    files["config.json"] = json.dumps(large).encode()
    (place / "mine.yaml").write_text(
        f"name: mine\nmodel: {{path: {model}, device: cpu}}\nprune: {{method: magnitude}}\n"
        "eval: {tasks: [pydoc_choice]}\n"
    )
    found = lors("run", "mine.yaml", "--dry-run")
    assert found.code == 4, found.output
    assert "of disk" in said(found)
