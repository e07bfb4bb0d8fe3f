"""The table of short texts: escaped, by prompt, of the models that are evaluated."""

from __future__ import annotations

import json
from pathlib import Path

from lors_cli.output.markdown import to_markdown
from lors_cli.report.html import to_html
from lors_cli.report.results import Scores
from lors_cli.report.samples import samples


def write(folder: Path, label: str, *said: tuple[str, str]) -> None:
    path = folder / "eval" / "texts" / f"{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [{"prompt": prompt, "text": text} for prompt, text in said]
    path.write_text(json.dumps({"fingerprint": "0", "format": "plain", "texts": texts}))


def test_models_under_each_prompt_with_text_that_can_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path, "dense", ("A?", "one"), ("B?", "<script>alert(1)</script> | **x**\n\x1b[31mred"))
    write(tmp_path, "tuned", ("A?", "two"), ("B?", ""))
    blocks = samples(tmp_path, {role: Scores("eval", {}) for role in ("dense", "tuned")})
    text = to_markdown(blocks)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| **A?** |  |", "| dense | one |", "| tuned | two |", "| **B?** |  |",
        "| dense | \\<script\\>alert(1)\\</script\\> \\| \\*\\*x\\*\\* �\\[31mred |", "| tuned | (nothing) |",
    ]  # fmt: skip
    page = to_html(["# t", *blocks], {})
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | **x**" in page
    assert "\x1b" not in page + text


def test_models_that_are_not_evaluated_and_broken_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "dense", ("A?", "one"))
    assert samples(tmp_path, {"dense": Scores("eval", None)}) == []
    (tmp_path / "eval/texts/dense.json").write_text('{"texts": [{"prompt": 1}]}')
    assert samples(tmp_path, {"dense": Scores("eval", {})}) == []
