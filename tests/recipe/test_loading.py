"""Recipes from text: values, traps, and every message with its exact place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors_cli.errors import UsageError
from lors_cli.recipe import yaml12
from lors_cli.recipe.loading import dump_recipe, load_recipe, load_stage, recipe_schema
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PruneConfig, Recipe, TuneConfig

BASE = "name: a\nmodel: {path: m}\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, *overrides: str) -> Recipe:
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(Path("x.yaml"), overrides)


def problems(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.splitlines()


def test_a_whole_recipe() -> None:
    recipe = load(
        """
name: llama
model: {path: owner/model, dtype: bfloat16}
prune:
  method: wanda
  pattern: 2:4
  calibration: {dataset: pydoc, num_samples: 8}
tune: {learning_rate: 2e-5, alpha: 16, epochs: 1}
eval:
  tasks: [boolq, rte]
"""
    )
    assert recipe.model == ModelConfig(path="owner/model", dtype="bfloat16")
    assert recipe.prune is not None
    assert recipe.prune.pattern == "2:4"
    assert recipe.tune is not None
    assert recipe.tune.learning_rate == 2e-5
    assert isinstance(recipe.tune.alpha, float)
    assert recipe.eval == EvalConfig(models=("dense", "pruned", "tuned"), tasks=("boolq", "rte"))


@pytest.mark.parametrize(
    "text", ["no", "on", "2:4", "0o17", "0x1F", "2024-01-01", "1_000", "12:30:45", "y", "=", "1.2.3"]
)
def test_text_stays_text(text: str) -> None:
    assert yaml12.resolve(text) == text
    assert load(f"{BASE}prune: {{}}\ndata_dir: {text}\n").data_dir == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2e-5", 2e-5), ("010", 10), ("-3", -3), (".5", 0.5), ("1.", 1.0), (".inf", float("inf")),
     ("-.INF", -float("inf")), ("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    assert yaml12.resolve(text) == value
    assert type(yaml12.resolve(text)) is type(value)


def test_all_problems_at_once_in_file_order() -> None:
    text = """# a comment
name: 123
modl: {path: x}
prune:
  method: wnda
  pattern: 2:4
  sparsity: 0.7
  calibration: 5
tune:
  learning_rat: 3
  rank: "16"
  alpha: true
  rank: 3
  data:
    datset: x
eval:
  tasks: boolq
  models: [dense, prund]
  limit: 1.5
  batch_size:
seed: -1
rank: 3
"""
    assert problems(text, "tune.epochs=abc", "tune.rnk=3", "foo", "prune.sparsity.x=3", "alpha=2") == [
        "x.yaml:2: name: must be text; put it in quotes: '123'",
        "x.yaml:2: model: this key is missing",
        "x.yaml:3: modl: unknown key; did you mean model?",
        "x.yaml:5: prune.method: must be one of magnitude, wanda, sparsegpt, ria, admm, not wnda; did you mean wanda?",
        "x.yaml:7: prune.sparsity: 0.7 contradicts pattern: 2:4, which is 0.5; leave it out",
        "x.yaml:8: prune.calibration: must be a section with keys of its own, not 5",
        "x.yaml:10: tune.learning_rat: unknown key; did you mean learning_rate?",
        "x.yaml:11: tune.rank: must be a whole number, not the text '16'",
        "x.yaml:12: tune.alpha: must be a number, not true",
        "x.yaml:13: tune.rank: given twice; the first is on line 11",
        "x.yaml:15: tune.data.datset: unknown key; did you mean dataset?",
        "x.yaml:17: eval.tasks: must be a list, for example [boolq]",
        "x.yaml:18: eval.models: must be one of dense, pruned, tuned, not prund; did you mean pruned?",
        "x.yaml:19: eval.limit: 1.5 is neither a whole number of documents nor a share below 1",
        "x.yaml:20: eval.batch_size: is empty; give a value, or remove the key to use the default",
        "x.yaml:21: seed: must be at least 0, not -1",
        "x.yaml:22: rank: unknown key; did you mean tune.rank?",
        "override tune.epochs=abc: must be a number, not abc",
        "override tune.rnk=3: unknown key; did you mean tune.rank?",
        "override foo: must be key=value",
        "override prune.sparsity.x=3: prune.sparsity is a single value and has no keys of its own",
        "override alpha=2: unknown key; did you mean tune.alpha?",
    ]


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("tune:\n", "x.yaml:3: tune: is empty; write `tune: {}` for the defaults, or remove the stage"),
        ("", "x.yaml:1: there is no stage: give at least one of prune, tune, pack, eval"),
        ("tune: 5\n", "x.yaml:3: tune: must be a section with keys of its own, not 5"),
        ("tune: {}\neval:\n  models: [pruned]\n",
         "x.yaml:5: eval.models: pruned is not made by this recipe, which has dense, tuned"),
        ("prune:\n  pattern: unstructured\n",
         "x.yaml:4: prune.pattern: unstructured needs a sparsity, for example sparsity: 0.5"),
        ("prune:\n  pattern: 24\n", "x.yaml:4: prune.pattern: must be N:M, for example 2:4, or unstructured, not 24"),
        ("prune:\n  sparsity: 1.5\n", "x.yaml:4: prune.sparsity: must be below 1, not 1.5"),
        ("prune:\n  sparsity: .nan\n", "x.yaml:4: prune.sparsity: must be below 1, not .nan"),
        ("tune:\n  alpha: .nan\n", "x.yaml:4: tune.alpha: must be a finite number, not .nan"),
        ("tune:\n  alpha: 1e999\n", "x.yaml:4: tune.alpha: must be a finite number, not 1e999"),
        ("tune:\n  rank: .inf\n", "x.yaml:4: tune.rank: must be a whole number, not .inf"),
        ("tune:\n  rank: 0\n", "x.yaml:4: tune.rank: must be above 0, not 0"),
        ("tune:\n  rank: 16.0\n", "x.yaml:4: tune.rank: must be a whole number, not 16.0"),
        (f"tune:\n  rank: {'9' * 30}\n", f"x.yaml:4: tune.rank: must be a whole number, not {'9' * 30}"),
        ("tune:\n  gradient_checkpointing: yes\n",
         "x.yaml:4: tune.gradient_checkpointing: must be true or false, not yes"),
        ("tune: {}\ndata_dir: ''\n", "x.yaml:4: data_dir: must not be an empty text"),
        ("eval:\n  models: []\n", "x.yaml:4: eval.models: must have at least one entry"),
        ("eval:\n  tasks: [rte, rte]\n", "x.yaml:4: eval.tasks: rte is listed twice"),
        ("eval:\n  tasks: []\n", "x.yaml:4: eval: neither tasks nor perplexity is given: there is nothing to evaluate"),
        ("tune: {}\nzzz: 1\n",
         "x.yaml:4: zzz: unknown key; known here: name, model, prune, tune, pack, eval, data_dir, seed, deterministic"),
        ("tune: {data: {max_length: a}}\n", "x.yaml:3: tune.data.max_length: must be a whole number, not a"),
    ],
)  # fmt: skip
def test_one_problem(rest: str, expected: str) -> None:
    assert problems(BASE + rest) == [expected]


def test_rules_between_keys_are_checked_beside_wrong_types() -> None:
    assert problems(BASE + "tune:\n  min_learning_rate: 1\n  rank: x\n") == [
        "x.yaml:4: tune.min_learning_rate: 1 is above learning_rate: 0.001, the default of method: lors",
        "x.yaml:5: tune.rank: must be a whole number, not x",
    ]


def test_every_broken_rule_is_reported() -> None:
    text = (
        "tune:\n  max_tokens: 9\n  max_steps: 3\n  data: {stream: off}\neval: {models: [pruned], tasks: [rte, rte]}\n"
    )
    assert problems(BASE + text) == [
        "x.yaml:4: tune.max_tokens: max_steps says how long to train too; give one of them",
        "x.yaml:4: tune.max_tokens: it counts streamed text, and data.stream is off",
        "x.yaml:7: eval.tasks: rte is listed twice",
        "x.yaml:7: eval.models: pruned is not made by this recipe, which has dense, tuned",
    ]


def test_a_rule_is_not_reported_for_a_key_that_is_wrong_itself() -> None:
    assert problems(BASE + "prune:\n  pattern: unstructured\n  sparsity: half\n") == [
        "x.yaml:5: prune.sparsity: must be a number, not half"
    ]


def test_missing_key_points_at_its_section() -> None:
    assert problems("name: a\ntune: {}\nmodel:\n  dtype: auto\n") == ["x.yaml:3: model.path: this key is missing"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml:1: the file is empty"),
        ("# only a comment\n", "x.yaml:1: the file is empty"),
        ("\n- a\n", "x.yaml:2: the file must hold settings"),
        ("just text", "x.yaml:1: the file must hold settings"),
        (b"name: a\nmodel: \xff\n", "x.yaml:2: not UTF-8 text (byte 0xff)"),
        ("name: a\n\tb: c\n", "x.yaml:2: a tab is used where YAML wants spaces"),
        ("name: a\x00\n", "x.yaml:1: the character U+0000"),
        ("name: a\n---\nname: b\n", "x.yaml:2: a second document"),
        ("name: a\n? [a]\n: b\n", "x.yaml:2: a key must be a plain text"),
        ("name: @a\n", "x.yaml:1: a text that starts with a special character must be in quotes"),
        ("name: a: b\n", "x.yaml:1: not valid YAML: a `: ` stands where no key can be"),
        ("name: a\nx: [1,\n", "x.yaml:3: not valid YAML: a list"),
        ("a: !!python/object:os.system x\n", "x.yaml:1: the tag !!python/object:os.system is not allowed"),
        ("a: 1\nb: !custom {}\n", "x.yaml:2: the tag !custom is not allowed"),
        ("a: &a [*a]\n", "x.yaml:1: *a refers to a value that contains it"),
        ("a: *b\n", "x.yaml:1: *b refers to an anchor &b that is not defined"),
        ("[" * 10_000, "x.yaml:1: nested more than 32 levels deep"),
        ("{a: " * 10_000, "x.yaml:1: nested more than 32 levels deep"),
        ("- " * 10_000, "x.yaml:1: nested more than 32 levels deep"),
        ("a: <<\nb:\n  <<: 3\n", "x.yaml:3: << must be given a mapping"),
        ("x" * 5_000_000, "x.yaml:1: larger than 1 MB"),
        (f"x: [{'1,' * 400_000}]", "x.yaml:1: more than 10000 values"),
    ],
)
def test_unreadable_text(text: str | bytes, expected: str) -> None:
    (line,) = problems(text)
    assert line.startswith(expected)


def test_aliases_do_not_multiply() -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for known, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} [{', '.join(['*' + known] * 10)}]")
    assert problems("\n".join(lines)) == ["x.yaml:4: more than 10000 values, aliases counted where they are used"]


def test_many_problems_are_cut_short() -> None:
    lines = problems("".join(f"key{number}: 1\n" for number in range(9000)))
    assert len(lines) == 41
    assert lines[-1].endswith("more problems")


def test_no_file_and_a_folder() -> None:
    for path, message in ((Path("none.yaml"), "none.yaml: cannot be read"), (Path(), ".: cannot be read")):
        with pytest.raises(UsageError) as caught:
            load_recipe(path)
        assert caught.value.message.startswith(message)


def test_byte_order_mark_windows_lines_and_quoted_text() -> None:
    recipe = load(b"\xef\xbb\xbf" + (BASE + "tune: {}\ndata_dir: '12'\n").replace("\n", "\r\n").encode())
    assert recipe.data_dir == "12"
    assert load(BASE + "tune: {}\ndata_dir: !!str 12\n").data_dir == "12"


def test_merge_keys_and_anchors() -> None:
    recipe = load(
        BASE + "prune:\n  calibration: &c {dataset: pydoc, seed: 3}\ntune:\n  data: {<<: {dataset: x}, dataset: y}\n"
    )
    assert recipe.prune is not None
    assert recipe.prune.calibration.dataset == "pydoc"
    assert recipe.tune is not None
    assert recipe.tune.data.dataset == "y"
    merged = problems(BASE + "prune:\n  calibration: &c {dataset: 3}\ntune:\n  data: {<<: *c}\n")
    assert merged[-1] == "x.yaml:4: tune.data.dataset: must be text; put it in quotes: '3'"


def test_overrides() -> None:
    recipe = load(
        BASE + "tune: {}\n", "prune.method=wanda", "eval.tasks=[boolq, rte]", "prune.pattern=2:4", "tune=null"
    )
    assert recipe.prune == PruneConfig(method="wanda", pattern="2:4")
    assert recipe.tune is None
    assert recipe.eval == EvalConfig(models=("dense", "pruned"), tasks=("boolq", "rte"))
    again = load(BASE + "tune: {rank: 3}\n", "tune.rank=4", "tune.rank=5", "tune.data.dataset=a=b")
    assert again.tune is not None
    assert (again.tune.rank, again.tune.data.dataset) == (5, "a=b")


def test_override_problems() -> None:
    assert problems(BASE + "tune: {min_learning_rate: 1e-6}\n", "tune.learning_rate=1e-7") == [
        "override tune.learning_rate=1e-7: tune.min_learning_rate: 1e-06 is above learning_rate: 1e-07"
    ]
    assert problems(BASE, "tune={rank: x}", "eval.tasks=[", "=3", "data_dir=\x00") == [
        "override tune={rank: x}: tune.rank: must be a whole number, not x",
        "override eval.tasks=[: not valid YAML: a list `[…]` or mapping `{…}` is not closed, or something in it "
        "cannot be read (while parsing a flow node)",
        "override =3: must be key=value",
        r"override data_dir=\x00: the character U+0000 may not stand in a YAML file",
    ]
    assert problems(BASE + "tune: {}\n", "eval.system_instruction=Use the # sign", "data_dir=# x") == [
        "override eval.system_instruction=Use the # sign: # sign is a comment; leave it out, or quote all: "
        """'eval.system_instruction="Use the # sign"'""",
        """override data_dir=# x: # x is a comment; leave it out, or quote all: 'data_dir="# x"'""",
    ]
    for whole in ('"Use the # sign"', "{system_instruction: 'Use the # sign'} # a note"):
        recipe = load(BASE + "eval: {}\n", f"eval{'' if whole[0] == '{' else '.system_instruction'}={whole}")
        assert recipe.eval is not None
        assert recipe.eval.system_instruction == "Use the # sign"
    assert problems(BASE + "tune: {}\n", "tune=null") == [
        "override tune=null: there is no stage: give at least one of prune, tune, pack, eval"
    ]
    assert problems(BASE + "tune: {rank: 5, rnk: 1}", "tune={}", "model={}") == [
        "override model={}: model.path: this key is missing"
    ]


def test_seed_is_handed_down_only_where_none_is_set() -> None:
    recipe = load(BASE + "seed: 7\nprune: {}\ntune: {seed: 3}\n")
    assert recipe.prune is not None
    assert recipe.tune is not None
    assert (recipe.prune.calibration.seed, recipe.tune.seed) == (7, 3)
    assert load(BASE + "tune: {}\n", "seed=9").tune == TuneConfig(seed=9)
    given = BASE + "seed: 7\nprune: {calibration: {seed: 1}}\ntune: {seed: 3}\n"
    for overrides, seeds in ((["seed=9"], (9, 9)), (["tune.seed=4", "seed=9"], (9, 4)), (["tune={seed: 4}"], (1, 4))):
        recipe = load(given, *overrides)  # the command line comes after the file
        assert recipe.prune is not None
        assert recipe.tune is not None
        assert (recipe.prune.calibration.seed, recipe.tune.seed) == seeds
    assert problems(BASE + "seed: x\ntune: {}\nprune: {}\n") == ["x.yaml:3: seed: must be a whole number, not x"]


def test_load_stage() -> None:
    Path("p.yaml").write_text("method: wanda\ncalibration: {dataset: c4}\n")
    flags = {"calibration.num_samples": 4, "calibration.dataset": "pydoc", "sparsity": None, "pattern": "4:8"}
    config = load_stage("prune", Path("p.yaml"), ["pattern=1:4"], flags)
    assert isinstance(config, PruneConfig)
    assert (config.method, config.pattern) == ("wanda", "4:8")
    assert (config.calibration.dataset, config.calibration.num_samples) == ("pydoc", 4)
    assert load_stage("eval", None, []) == EvalConfig()
    assert load_stage("eval", None, [], {"tasks": ("rte",)}) == EvalConfig(tasks=("rte",))


def test_load_stage_problems() -> None:
    Path("p.yaml").write_text("method: wnda\ntune: {}\n")
    with pytest.raises(UsageError) as caught:
        load_stage("prune", Path("p.yaml"), ["sparsity=2", "foo"], {"calibration.num_samples": 0, "pattern": "4:2"})
    assert caught.value.message.splitlines() == [
        "p.yaml:1: method: must be one of magnitude, wanda, sparsegpt, ria, admm, not wnda; did you mean wanda?",
        "p.yaml:2: tune: unknown key; known here: method, pattern, sparsity, refit, reconstruct_epochs, "
        "reconstruct_batch_size, true_sequential, channel_permutation, layer_sparsity, quantize, skip, calibration",
        "override sparsity=2: must be below 1, not 2",
        "override foo: must be key=value",
        "--num-samples: must be above 0, not 0",
        "--pattern: pattern: 4:2 keeps nothing or prunes nothing; N:M needs 0 < N < M",
    ]
    with pytest.raises(UsageError, match="--calibration: must not be an empty text"):
        load_stage("prune", None, [], {"calibration.dataset": ""})


TEXTS = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        ["2:4", "no", "1e5", "08", "0o17", "null", "~", ".nan", "<<", "=", "a\n---\nb", "*a", "- x", "\u2028"]
    ),
)


@given(TEXTS, st.floats(1e-300, 1e300), st.integers(0, 2**32 - 1))
def test_dump_is_read_back(text: str, number: float, seed: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    recipe = Recipe(
        name="2024-01-01",
        model=ModelConfig(path=text),
        prune=PruneConfig(method="wanda"),
        tune=TuneConfig(alpha=number, learning_rate=2e-5, seed=seed),
        eval=EvalConfig(models=("dense",), tasks=("rte", text + "x"), perplexity=(text,)),
        data_dir=text,
    )
    path = Path("round.yaml")
    path.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(path) == recipe


def test_dump_of_a_stage() -> None:
    config = TuneConfig(rank=3, learning_rate=2e-5)
    Path("t.yaml").write_text(dump_recipe(config))
    assert load_stage("tune", Path("t.yaml"), []) == config


def test_schema_describes_every_section() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert schema["title"] == "lors recipe"
    assert schema["$defs"]["TuneConfig"]["properties"]["min_learning_rate"]["description"]
    assert "\n" not in schema["$defs"]["ModelConfig"]["properties"]["dtype"]["description"]
    assert schema["additionalProperties"] is False


def test_a_recipes_prefix_in_a_stage_is_named() -> None:
    for written, meant in (("tune.gradient=exakt", "gradient"), ("tune.data.dataset=x", "data.dataset")):
        with pytest.raises(UsageError, match=rf"unknown key; did you mean {meant}\?"):
            load_stage("tune", None, [written])
    with pytest.raises(UsageError, match="unknown key; the nearest here are"):
        load_stage("tune", None, ["tune.gradiant=exact"])
    with pytest.raises(UsageError, match="unknown key; write --data-dir FOLDER"):
        load_stage("eval", None, ["data_dir=x"])


@pytest.mark.parametrize("written", ["0.5e9", "5e8", "500000000"])
def test_a_budget_of_tokens_may_be_written_as_a_float(written: str) -> None:
    config = load_stage("tune", None, [f"max_tokens={written}"])
    assert isinstance(config, TuneConfig)
    assert (config.max_tokens, type(config.max_tokens)) == (500_000_000, int)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_tokens=0.5"], "must be a whole number, not 0.5"),
        (["max_tokens=1"], "must be above 1, not 1"),
        (["max_tokens=9", "max_steps=3"], "max_steps says how long to train too"),
        (["max_tokens=9", "data.stream=off"], "it counts streamed text, and data.stream is off"),
        (["data.packing=none"], "must be one of concatenated, isolated, separate, not none"),
        (["data.template=vicunna"], "did you mean vicuna?"),
    ],
)
def test_wrong_settings_of_tuning_data(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_stage("tune", None, overrides)


def test_what_is_to_be_written_can_be_written(tmp_path: Path) -> None:
    """A list with a bare star is no YAML, and a section without settings has none to list."""
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {path: m}\ntune: {skip: '*.q_proj'}\npack: {level: 3}\n")
    with pytest.raises(UsageError) as told:
        load_recipe(path)
    assert 'r.yaml:3: tune.skip: must be a list, for example ["*.q_proj"]' in told.value.message
    assert "r.yaml:4: pack.level: unknown key; pack has no settings: write {}" in told.value.message
