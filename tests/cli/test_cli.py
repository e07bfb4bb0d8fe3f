"""Every command as a user types it: output, JSON, exit codes, messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forking import forked
from typer.testing import Result

from lors_cli.cli.flags import given

Lors = Callable[..., Result]
PRUNED, TUNED = "runs/tiny/prune", "runs/tiny/tune"
QUICK_EVAL = ["--tasks", "", "--perplexity", "text.jsonl", "perplexity_windows=2", "perplexity_length=64"]
QUICK_TUNE = ["--dataset", "rows.jsonl", "--rank", "2", "--max-steps", "2", "--batch-size", "2", "--max-length", "256"]


def document(result: Result) -> Any:
    """The one JSON document that stdout must be."""
    return json.loads(result.stdout)


def failed(result: Result, exit_code: int, *words: str) -> None:
    """One message, no traceback, the right exit code."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.count("error:") == 1
    for word in words:
        assert word in " ".join(result.stderr.split()), result.stderr


# Whole commands -------------------------------------------------------------------------------------------------


def test_help_needs_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from lors_cli.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as left: assert not left.code\n"
        "print([name for name in ('torch', 'transformers', 'pydantic', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("[]\n")
    assert "recipes" in run.stdout


def test_python_dash_m_works() -> None:
    run = subprocess.run([sys.executable, "-m", "lors_cli", "recipes", "--json"], capture_output=True, check=True)
    assert "quickstart" in [recipe["name"] for recipe in json.loads(run.stdout)]


def test_json_mode_leaves_stdout_to_the_document_in_a_real_process(at_finished: Path) -> None:
    run = forked("eval", PRUNED, "--tasks", "pydoc_choice", "--limit", "2", "--json").completed()
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["results"]["prune"]["tasks"]["pydoc_choice"]["num_samples"] == 2
    assert "pydoc_choice" in run.stderr


def test_a_closed_pipe_is_no_bug(at_workshop: Path) -> None:
    command = f"{sys.executable} -m lors_cli inspect dense --json | true"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert run.returncode in (0, 141)
    assert run.stderr == ""


def test_prune(at_workshop: Path, lors: Lors) -> None:
    flags = ("--method", "wanda", "--calibration", "text.jsonl", "--num-samples", "4", "--sequence-length", "16")
    found = document(lors("prune", "dense", "--out", "p", *flags, "--pattern", "4:8", "--seed", "3", "--json"))
    assert found["config"]["method"] == "wanda"
    assert found["config"]["calibration"]["seed"] == 3
    assert found["metrics"]["pattern"] == "4:8"
    assert found["metrics"]["violations"] == 0
    assert Path("p/model.safetensors").is_file()
    again = lors("prune", "dense", "--out", "p", *flags, "--pattern", "4:8", "--seed", "3")
    assert "nothing to do" in again.stderr
    assert "50.00 % zeros" in again.stdout


def test_sparsity_alone_means_unstructured(at_workshop: Path, lors: Lors) -> None:
    found = document(lors("prune", "dense", "--out", "p", "--method", "magnitude", "--sparsity", "0.7", "--json"))
    assert found["config"]["pattern"] == "unstructured"
    assert found["metrics"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    options = ("--method", "magnitude", "--sparsity", "0.6", "pattern=2:4")  # which is 0.5
    failed(lors("prune", "dense", "--out", "q", *options), 2, "contradicts pattern: 2:4")


def test_a_shipped_config_and_overrides(at_workshop: Path, lors: Lors) -> None:
    options = ("--config", "prune/wanda-2of4", "pattern=1:4", "--dry-run", "--json")
    (stage,) = document(lors("prune", "dense", "--out", "p", "calibration.dataset=text.jsonl", *options))["stages"]
    assert stage["what"].startswith("wanda 1:4")
    assert not Path("p").exists()


def test_tune_and_merge_give_the_same_weights(at_finished: Path, lors: Lors) -> None:
    found = document(lors("tune", PRUNED, "--out", "t", *QUICK_TUNE, "--json"))
    assert found["metrics"]["steps"] == 2
    merged = document(lors("merge", PRUNED, "t/adapter", "--out", "m", "--json"))
    assert merged["layers_merged"] == 14
    assert Path("m/model.safetensors").read_bytes() == Path("t/model.safetensors").read_bytes()
    assert lors("merge", PRUNED, "t", "--out", "m2").exit_code == 0  # the stage's folder will do
    assert Path("m2/model.safetensors").read_bytes() == Path("t/model.safetensors").read_bytes()


def test_merging_into_another_base_writes_nothing(at_finished: Path, lors: Lors) -> None:
    result = lors("merge", "dense", f"{TUNED}/adapter", "--out", "m", "--json")
    failed(result, 2, "another sparse model")
    assert document(result)["error"]["exit_code"] == 2
    assert not Path("m").exists()
    before = Path(TUNED, "model.safetensors").read_bytes()
    failed(lors("merge", PRUNED, f"{TUNED}/adapter", "--out", TUNED), 2, "results of tune")
    failed(lors("merge", PRUNED, f"{TUNED}/adapter", "--out", PRUNED), 2, "own folder")
    assert Path(TUNED, "model.safetensors").read_bytes() == before


def test_eval_of_several_models(at_finished: Path, lors: Lors) -> None:
    found = document(lors("eval", "dense", TUNED, "--out", "e", *QUICK_EVAL, "--json"))
    assert list(found["results"]) == ["dense", "tune"]
    assert json.loads(Path("e/tune.json").read_text()) == found["results"]["tune"]
    assert found["comparisons"] == []  # there are no tasks
    (text,) = found["texts_compared"]
    values = [found["results"][label]["perplexity"]["text.jsonl"]["value"] for label in ("tune", "dense")]
    assert (text["first"], text["second"], text["text"]) == ("tune", "dense", "text.jsonl")
    assert text["difference"] == pytest.approx(values[0] / values[1] - 1)
    again = lors("eval", "dense", TUNED, "--out", "e", *QUICK_EVAL)
    assert "nothing to do" in again.stderr
    assert "perplexity text.jsonl" in again.stdout
    assert f"tune − dense: perplexity of text.jsonl {100 * text['difference']:+.2f} %" in again.stdout


def test_a_run_tells_how_sure_its_differences_are(at_finished: Path, lors: Lors) -> None:
    found = document(lors("run", "tiny.yaml", "--json"))
    pairs = {(pair["first"], pair["second"]): pair for pair in found["comparisons"]}
    assert list(pairs) == [("tuned", "pruned"), ("pruned", "dense"), ("tuned", "dense")]
    for labels, pair in pairs.items():
        values = [found["results"][label]["average"]["value"] for label in labels]
        assert pair["difference"] == pytest.approx(values[0] - values[1])
        assert pair["tasks"]["pydoc_choice"]["num_documents"] == 3
        assert (pair["low"], pair["high"]) == (None, None)  # of three documents an interval would say nothing
    shown = lors("run", "tiny.yaml").stdout
    assert f"tuned − pruned: {100 * pairs['tuned', 'pruned']['difference']:+.2f} points, McNemar p = " in shown
    assert "### Significance" in Path("runs/tiny/report.md").read_text()
    alone = document(lors("eval", "dense", PRUNED, "--tasks", "pydoc_choice", "--limit", "3", "--json"))
    (pair,) = alone["comparisons"]
    assert {**pair, "first": "pruned"} == pairs["pruned", "dense"]


def test_eval_without_out_leaves_nothing_behind(at_workshop: Path, lors: Lors) -> None:
    before = sorted(at_workshop.rglob("*"))
    result = lors("eval", "dense", *QUICK_EVAL)
    assert result.exit_code == 0
    assert "not kept" in result.stdout
    assert sorted(at_workshop.rglob("*")) == before


def test_report(at_finished: Path, lors: Lors) -> None:
    Path("runs/tiny/report.md").unlink()
    paths = [f"runs/tiny/report.{kind}" for kind in ("md", "html", "csv", "tex")]
    assert document(lors("report", "runs/tiny", "--json")) == {"reports": paths}
    assert all(Path(path).is_file() for path in paths)
    before = Path(paths[2]).read_bytes()
    for path in paths:
        Path(path).unlink()
    chosen = lors("report", "runs/tiny", "--format", "csv")
    assert chosen.stdout == f"report {paths[2]}\n"
    assert [path for path in paths if Path(path).exists()] == [paths[2]]
    assert Path(paths[2]).read_bytes() == before


def test_recipes(at_workshop: Path, lors: Lors) -> None:
    listed = document(lors("recipes", "--json"))
    names = [recipe["name"] for recipe in listed]
    assert {"name": "quickstart", "kind": "recipe"}.items() <= listed[names.index("quickstart")].items()
    assert listed[names.index("table1")]["kind"] == "sweep"
    shown = lors("recipes", "-v").stdout
    assert all(name in shown for name in names)


def test_recipes_copy(at_workshop: Path, lors: Lors) -> None:
    assert document(lors("recipes", "copy", "quickstart", "--json")) == {"wrote": "quickstart.yaml"}
    assert document(lors("recipes", "--json", "-q", "copy", "quickstart", "b.yaml")) == {"wrote": "b.yaml"}
    failed(lors("recipes", "copy", "quickstart"), 2, "there already", "Name another file")
    assert "lors run mine.yaml" in lors("recipes", "copy", "quickstart", "mine.yaml").stdout
    assert lors("recipes", "copy", "quickstart", "dense").exit_code == 0
    assert Path("dense/quickstart.yaml").read_bytes() == Path("mine.yaml").read_bytes()
    failed(lors("recipes", "copy", "quickstrt"), 2, "Did you mean quickstart?")
    assert "lors sweep table1.yaml" in lors("recipes", "copy", "table1").stdout
    assert Path("table1.yaml").read_text().startswith("# Table 1 of the LoRS paper")


def test_recipes_schema(lors: Lors) -> None:
    schema = document(lors("recipes", "schema", "--json"))
    assert {"prune", "tune", "eval"} <= set(schema["properties"])
    assert document(lors("recipes", "schema")) == schema  # the plain output can be redirected into a file


def test_version(lors: Lors) -> None:
    from lors_cli import __version__

    assert lors("--version").stdout == lors("-V").stdout == f"lors {__version__}\n"


def test_quiet_shows_the_result_alone(at_workshop: Path, lors: Lors) -> None:
    result = lors("prune", "dense", "--out", "p", "--method", "magnitude", "-q")
    assert result.stderr == ""
    assert "prune p" in result.stdout


def test_tables_fit_80_columns(at_finished: Path, lors: Lors) -> None:
    for command in (["run", "tiny.yaml"], ["inspect", TUNED]):
        assert max(len(line) for line in lors(*command).stdout.splitlines() if "─" in line) <= 80, command


# Mistakes -------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, list[str]]] = [
    (["run", "nothere.yaml"], 2, ["nothere.yaml", "`lors recipes`"]),
    (["run", "quickstrt"], 2, ["Did you mean quickstart?"]),
    (["run", "dense"], 2, ["dense is a folder"]),
    (["run", "table1"], 2, ["table1 is no recipe", "lors sweep table1"]),
    (["sweep", "quickstart"], 2, ["quickstart is no sweep", "lors run quickstart"]),
    (["sweep", "tabel1"], 2, ["Did you mean table1?"]),
    (["sweep", "table1", "--tflops", "0", "--dry-run"], 2, ["--tflops 0"]),
    (["sweep", "table1", "--tflops", "9"], 2, ["--dry-run"]),
    (["sweep", "tiny.yaml"], 2, ["tiny.yaml is a recipe, not a sweep", "lors run tiny.yaml"]),
    (["run", "typo.yaml"], 2, ["typo.yaml:4:", "did you mean method?"]),
    (["run", "tiny.yaml", "tune.rnak=3"], 2, ["tune.rnak=3", "did you mean tune.rank?"]),
    (["run", "tiny.yaml", "tune.rank=many"], 2, ["tune.rank=many", "whole number"]),
    (["run", "tiny.yaml", "tune.rank"], 2, ["key=value"]),
    (["run", "tiny.yaml", "data_dir=/nowhere"], 3, ["/nowhere"]),
    (["run", "tiny.yaml", "model.path=./gone"], 3, ["./gone"]),
    (["run", "tiny.yaml", "model.path=nobody/nothing"], 3, ["nobody/nothing", "HF_HUB_OFFLINE is set"]),
    (["run", "tiny.yaml", "eval.tasks=[arc_eazy]"], 2, ["arc_eazy", "did you mean arc_easy?"]),
    (["run", "tiny.yaml", "tune.data.dataset=alpacca"], 2, ["alpacca", "Did you mean alpaca?"]),
    (["run", "tiny.yaml", "prune.calibration.dataset=gone.jsonl"], 3, ["gone.jsonl"]),
    (["run", "tiny.yaml", "prune.pattern=2:5"], 2, ["no multiple of 5"]),
    (["run", "tiny.yaml", "--from", "tunee"], 2, ["--from tunee", "Did you mean tune?"]),
    (["run", "tiny.yaml", "--force", "evl"], 2, ["--force evl", "Did you mean eval?"]),
    (["run", "tiny.yaml", "--out", "text.jsonl"], 2, ["text.jsonl is a file"]),
    (["run", "tiny.yaml", "--out", "dense"], 2, ["other files", "another --out"]),
    (["prune", "dense", "--out", "text.jsonl"], 2, ["text.jsonl is a file"]),
    (["prune", "dense", "--out", "dense"], 2, ["model's own folder"]),
    (["prune", "dense", "--out", "o", "--method", "wandaa"], 2, ["--method", "did you mean wanda?"]),
    (["prune", "dense", "--out", "o", "--calibration", "c5"], 2, ["'c5'", "Datasets:"]),
    (["prune", "dense", "--out", "o", "--config", "prune/wandaa"], 2, ["Did you mean prune/wanda"]),
    (["prune", "dense", "--out", "o", "--device", "gpu"], 2, ["--device", "gpu"]),
    (["prune", "dense", "--out", "o", "--num-samples", "0"], 2, ["--num-samples", "above 0"]),
    (["prune", "./gone", "--out", "o"], 3, ["./gone"]),
    (["prune", "caf\udce9", "--out", "o"], 2, [r"MODEL: is not UTF-8: caf\udce9"]),
    (["prune", "dense", "--out", "caf\udce9", "--dry-run"], 2, [r"caf\xe9: the name is not UTF-8"]),
    (["tune", "dense", "--out", "o", "--dataset", "rows.jsonl"], 2, ["the model is dense", "lors prune"]),
    (["tune", "dense", "--out", "o", "--rank", "0"], 2, ["--rank", "above 0"]),
    (["eval", "limit=3"], 2, ["no model is named", "lors eval [NAME=]MODEL"]),
    (["eval", "dense", "--tasks", "nope"], 2, ["'nope'", "Tasks:"]),
    (["eval", "dense", "--tasks", ""], 2, ["nothing to evaluate"]),
    (["eval", "dense", "--tasks", "", "--perplexity", "wikitext3"], 2, ["Did you mean wikitext2?"]),
    (["eval", "dense", "--data-dir", "/nowhere"], 3, ["/nowhere"]),
    (["merge", "dense", "gone", "--out", "o"], 3, ["gone"]),
    (["inspect", "./gone"], 3, ["./gone"]),
    (["inspect", "text.jsonl"], 2, ["text.jsonl is a file"]),
    (["inspect", "dense", "--pattern", "2-4"], 2, ["'2-4'", "N:M"]),
    (["report", "dense"], 3, ["no run folder", "runs/quickstart"]),
    (["report", "dense", "--format", "htlm"], 2, ["Did you mean html?", "md, html, csv, tex"]),
]


@pytest.mark.parametrize(("arguments", "exit_code", "words"), MISTAKES, ids=[" ".join(item[0]) for item in MISTAKES])
def test_mistakes(at_workshop: Path, lors: Lors, arguments: list[str], exit_code: int, words: list[str]) -> None:
    recipe = Path("tiny.yaml").read_text()
    Path("typo.yaml").write_text(recipe.replace("  method: sparsegpt", "  methd: sparsegpt"))
    result = lors(*arguments, "--json")
    failed(result, exit_code, *words)
    error = document(result)["error"]
    assert error["exit_code"] == exit_code
    assert error["message"] in result.stderr
    assert not list(Path().rglob("model.safetensors"))[1:]  # the dense one alone


def test_a_task_that_is_not_there_is_found_before_any_work(at_workshop: Path, lors: Lors) -> None:
    failed(lors("run", "tiny.yaml", "eval.tasks=[pydoc_choise]"), 2, "did you mean pydoc_choice?")
    assert not Path("runs").exists()


def test_all_problems_of_a_recipe_are_told_at_once(at_workshop: Path, lors: Lors) -> None:
    text = Path("tiny.yaml").read_text().replace("rank: 4", "rnak: 4").replace("save_steps: 2", "save_steps: no")
    Path("bad.yaml").write_text(text)
    result = lors("run", "bad.yaml")
    assert result.exit_code == 2
    assert len(re.findall(r"bad\.yaml:\d+:", result.stderr)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "dense"], "--out"),
        (["prune", "--out", "o"], "MODEL"),
        (["prune", "dense", "--out", "o", "--methd", "wanda"], "--method"),
        (["inspct", "dense"], "inspect"),
        (["recipes", "foo"], "foo"),
    ],
)
def test_mistakes_in_the_command_line_itself(lors: Lors, arguments: list[str], said: str) -> None:
    result = lors(*arguments, "--json")
    assert result.exit_code == 2
    assert said in document(result)["error"]["message"]
    assert said in result.stderr
    assert lors(*arguments).stdout == ""


# The small parts ------------------------------------------------------------------------------------------------


def test_lists() -> None:
    others = dict.fromkeys(("perplexity", "limit", "num_fewshot", "apply_chat_template", "batch_size"))
    assert given("eval", {**others, "tasks": None}) == {}
    assert given("eval", {**others, "tasks": ""}) == {"tasks": []}
    assert given("eval", {**others, "tasks": " a, b ,"}) == {"tasks": ["a", "b"]}


def test_a_recipes_choice_of_models_means_nothing_to_eval(at_workshop: Path, lors: Lors) -> None:
    result = lors("eval", "dense", "models=[pruned]", "--perplexity", "text.jsonl", "--tasks", "")
    assert result.exit_code == 2
    assert "a recipe's" in result.stderr


def test_a_model_that_is_no_decoder_is_refused(at_workshop: Path, lors: Lors) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, vocab_size=258).save_pretrained("t5")
    result = lors("prune", "t5", "--out", "o", "--method", "magnitude", "--dry-run")
    assert result.exit_code == 2
    assert "not a decoder-only causal language model" in result.stdout
    assert "t5 has no model.safetensors" in result.stderr
    result = lors("prune", "t5", "--out", "o", "--method", "magnitude")
    assert result.exit_code == 2
