"""Time and scores of zero-shot multiple choice: lm-evaluation-harness's own loop against ours.

python benchmarks/eval_speed.py --data-dir DATA --limit 60 --rounds 3 --out results.json

Both score the same requests of the same loaded model at the same batch size. A round runs them one after the other,
in turns of who is first; a ratio is hflm's over ours, taken round by round. Timed is what lm-eval calls: from the
requests' text to their log-likelihoods, tokenising included. `cpu_s` is the process's processor time over all its
threads, which other work on the machine disturbs less than `elapsed_s`. `agreement` is the share of
documents on which both choose the same answer (by acc's and by acc_norm's rule); `batch_agreement` is that of hflm
with itself at half the batch size, which says what rounding alone does.

What `--out` holds of the same settings is kept, and missing rounds are added.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import MODEL
from common import cell, ratios, screen_of, software

from lors_cli.bench.measure import rotated, spread
from lors_cli.evaluation import harness
from lors_cli.evaluation.entries import resolve, tasks_of
from lors_cli.files import atomic
from lors_cli.models.loading import load_model, load_tokenizer
from lors_cli.recipe.schema import EvalConfig, ModelConfig

TASKS = ("hellaswag", "arc_easy", "arc_challenge")
ARMS = ("hflm", "lors")
CLOCKS = ("elapsed_s", "cpu_s")
METRICS = ("acc", "acc_norm")


def task_requests(name: str, data_dir: Path | None, limit: int | None, folder: Path) -> tuple[Any, list[Any]]:
    """lm-eval's task and the requests of its first documents."""
    with harness._quiet():
        (entry,) = tasks_of(resolve(EvalConfig(tasks=(name,))))
        task = harness.load_task(entry, data_dir=data_dir, folder=folder)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task, task.instances


def arms(model: Any, tokenizer: Any, batch_size: int) -> dict[str, Any]:
    """The two scorers, and lm-eval's at half the batch size."""
    from lm_eval.models.huggingface import HFLM

    from lors_cli.evaluation.shown_model import ShownModel

    def plain(size: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, softmax_dtype="float32")

    with harness._quiet():
        ours = ShownModel(model, tokenizer, batch_size, "lors")
        return {"hflm": plain(batch_size), "half": plain(max(1, batch_size // 2)), "lors": ours}


def timed(lm: Any, requests: list[Any]) -> tuple[dict[str, float], list[tuple[float, bool]]]:
    """Seconds of scoring, and the results."""
    with harness._quiet():
        started, cpu_started = time.perf_counter(), time.process_time()
        results = lm.loglikelihood(requests, disable_tqdm=True)  # floats: a GPU has finished
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"elapsed_s": round(elapsed, 3), "cpu_s": round(cpu, 3)}, results


def by_document(requests: Sequence[Any], results: Sequence[tuple[float, bool]]) -> dict[int, list[tuple[float, bool]]]:
    """The choices' results in order."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for request, result in sorted(zip(requests, results, strict=True), key=lambda pair: (pair[0].doc_id, pair[0].idx)):
        found.setdefault(request.doc_id, []).append(result)
    return found


def scores(task: Any, requests: Sequence[Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Accuracies as lm-eval's task computes them."""
    documents = {request.doc_id: request.doc for request in requests}
    each = [task.process_results(documents[doc_id], found) for doc_id, found in by_document(requests, results).items()]
    return {name: round(sum(row[name] for row in each) / len(each), 6) for name in METRICS}


def agreement(
    requests: Sequence[Any], some: Sequence[tuple[float, bool]], other: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Share of documents with the same answer, and the largest and the mean difference of log-likelihoods."""
    lengths = {(request.doc_id, request.idx): max(1, len(request.args[1].lstrip())) for request in requests}
    ours, theirs = (by_document(requests, results) for results in (some, other))

    def answer(doc_id: int, found: list[tuple[float, bool]], normed: bool) -> int:
        return max(range(len(found)), key=lambda i: found[i][0] / (lengths[doc_id, i] if normed else 1))

    shares = {
        name: sum(answer(doc_id, ours[doc_id], normed) == answer(doc_id, theirs[doc_id], normed) for doc_id in ours)
        / len(ours)
        for name, normed in zip(METRICS, (False, True), strict=True)
    }
    apart = [abs(one[0] - two[0]) for one, two in zip(some, other, strict=True)]
    return {
        **{name: round(share, 6) for name, share in shares.items()},
        "max_difference": round(max(apart), 6),
        "mean_difference": round(sum(apart) / len(apart), 6),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of one task's rounds."""
    return {
        clock: {
            **{arm: spread([number[arm][clock] for number in rounds]) for arm in ARMS},
            "hflm/lors": ratios(rounds, "hflm", "lors", clock),
        }
        for clock in CLOCKS
    }


def measure(settings: dict[str, Any], data_dir: Path | None, rounds: int, out: Path | None) -> dict[str, Any]:
    """Every round that the results file does not hold."""
    results = (atomic.read_json(out) if out else None) or {"settings": settings, **software(), "tasks": {}}
    if results["settings"] != settings:
        raise SystemExit(f"{out} holds results of other settings: {results['settings']}")
    torch.set_num_threads(settings["threads"])
    config = ModelConfig(path=settings["model"], dtype=settings["dtype"], device=settings["device"])
    lms = arms(load_model(config), load_tokenizer(config), settings["batch_size"])
    for name in settings["tasks"]:
        found = results["tasks"].setdefault(name, {"rounds": []})
        with tempfile.TemporaryDirectory() as folder:
            task, requests = task_requests(name, data_dir, settings["limit"], Path(folder))
        for arm in ARMS:
            timed(lms[arm], requests[:32])  # warm-up
        for number in range(len(found["rounds"]), rounds):
            times, answers = {}, {}
            for arm in rotated(ARMS, number):
                times[arm], answers[arm] = timed(lms[arm], requests)
            found["rounds"].append({arm: times[arm] for arm in ARMS})
            found["num_requests"], found["num_documents"] = len(requests), len(by_document(requests, answers["lors"]))
            found["scores"] = {arm: scores(task, requests, answers[arm]) for arm in ARMS}
            found["agreement"] = agreement(requests, answers["lors"], answers["hflm"])
            found["summary"] = summary(found["rounds"])
            if number + 1 == rounds:
                _, answers["half"] = timed(lms["half"], requests)
                found["batch_agreement"] = agreement(requests, answers["half"], answers["hflm"])
            if out:
                atomic.write_json(out, results)
    return results


def show(results: dict[str, Any]) -> None:
    """The medians as a table."""
    screen = screen_of()
    for name, found in results["tasks"].items():
        screen.print(f"{name}, {found['num_documents']} documents")
        for clock, figures in found["summary"].items():
            seconds = ", ".join(f"{arm} {cell(figures[arm])}" for arm in ARMS)
            screen.print(f"  {clock}: {seconds}; hflm/lors {cell(figures['hflm/lors'], 2)}")
        for arm, values in found["scores"].items():
            screen.print(f"  {arm}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
        for title, key in (("lors and hflm", "agreement"), ("hflm and hflm at half the batch size", "batch_agreement")):
            same = found[key]
            screen.print(
                f"  {title}: same answer {same['acc']:.4f} (acc_norm {same['acc_norm']:.4f}), "
                f"log-likelihoods differ by {same['mean_difference']:.2g}, at most {same['max_difference']:.2g}"
            )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept = ("model", "dtype", "device", "tasks", "limit", "batch_size", "threads")
    settings = {name: getattr(options, name) for name in kept} | {"tasks": list(options.tasks)}
    show(measure(settings, options.data_dir, options.rounds, options.out))


if __name__ == "__main__":
    main()
