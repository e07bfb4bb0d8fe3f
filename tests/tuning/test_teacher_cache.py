"""The teacher's predictions on disk: the loss is the uncached one, and they are made once, whatever happens."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import signalled
from killed_runs import log
from safetensors.numpy import load_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from lors_cli.data.samples import IGNORED, PadCollator, Sample
from lors_cli.errors import ResourceError, UsageError
from lors_cli.recipe.schema import DistillConfig, ModelConfig, PruneConfig, TeacherCacheConfig, TuneConfig
from lors_cli.tuning import teacher as teachers
from lors_cli.tuning import teacher_cache
from lors_cli.tuning.estimate import bytes_a_label
from lors_cli.tuning.head import Teacher, causal_lm_loss
from lors_cli.tuning.stage import stage_fingerprint, tune
from lors_cli.tuning.teacher_cache import CachedTeacher, TeacherCache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(teacher_cache, "FILE_LABELS", 40)
    return tmp_path / "cache/teacher"


def _samples() -> list[Sample]:
    """Plain ones, some labels left out; two texts in one; one without a label."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (14, 9, 12, 5)]
    texts = {"input_ids": ids[2], "labels": [IGNORED, *ids[2][1:5], IGNORED, *ids[2][6:]],
             "position_ids": [*range(5), *range(7)]}  # fmt: skip
    return [{"input_ids": ids[0], "labels": [*[IGNORED] * 4, *ids[0][4:11], *[IGNORED] * 3]},
            {"input_ids": ids[1], "labels": ids[1]}, texts,
            {"input_ids": ids[3], "labels": [ids[3][0], *[IGNORED] * 4]}]  # fmt: skip


def _filled(config: TeacherCacheConfig, dense: PreTrainedModel) -> TeacherCache:
    cache = TeacherCache(config, "teacher:0", 258, CPU, "float32")
    cache.fill(cache.missing(_samples()), Teacher(dense, 1.0, 1.0))
    cache.look()
    return cache


@pytest.mark.parametrize("order", [[0, 1, 3], [2, 0], [1, 2, 0, 3], [3]])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 2.5)])
def test_with_all_of_the_vocabulary_loss_and_gradient_are_the_uncached_ones(
    order: list[int], weight: float, temperature: float, sparse_llama: Callable[..., PreTrainedModel]
) -> None:
    student, dense = sparse_llama(), sparse_llama(seed=1)
    cache = _filled(TeacherCacheConfig(top_k=258, dtype="float32"), dense)
    assert not cache.missing(_samples())
    batch = PadCollator(257)([_samples()[index] for index in order])
    norm = student.model.norm.weight.requires_grad_(True)
    found = []
    for teacher in (Teacher(dense, weight, temperature), CachedTeacher(cache, weight, temperature)):
        loss = causal_lm_loss(student, batch, 20, teacher=teacher)
        loss.backward()
        found.append((loss.detach(), norm.grad))
        norm.grad = None
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-6)


def test_few_tokens_in_half_the_bytes_are_bounded_by_the_full_divergence(
    sparse_llama: Callable[..., PreTrainedModel],
) -> None:
    student, dense = sparse_llama(), sparse_llama(seed=1)
    batch = PadCollator(257)(_samples()[:2])
    full = float(causal_lm_loss(student, batch, 1, teacher=Teacher(dense, 1.0, 1.0)))
    found = []
    for dtype in ("float32", "float16"):
        cache = _filled(TeacherCacheConfig(top_k=64, dtype=dtype), dense)  # type: ignore[arg-type]
        found.append(float(causal_lm_loss(student, batch, 1, teacher=CachedTeacher(cache, 1.0, 1.0))))
    wanted = batch["labels"][:, 1:] != IGNORED
    plain = {key: value for key, value in batch.items() if key != "labels"}
    p, q = (F.softmax(model(**plain).logits[:, :-1][wanted], -1) for model in (dense, student))
    kept = p.topk(64).indices
    events = [torch.cat([side.gather(1, kept), 1 - side.gather(1, kept).sum(1, keepdim=True)], 1) for side in (p, q)]
    expected = float(F.kl_div(events[1].log(), events[0], reduction="sum"))
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert 0 < found[0] <= full
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_the_bytes_a_label_are_those_on_disk(sparse_llama: Callable[..., PreTrainedModel], cache_root: Path) -> None:
    config = TeacherCacheConfig(top_k=50)
    _filled(config, sparse_llama(seed=1))
    labels = sum(sum(label != IGNORED for label in sample["labels"][1:]) for sample in _samples())
    data = 0
    for path in cache_root.rglob("*.safetensors"):
        data += sum(part.nbytes for name, part in load_file(path).items() if name in ("ids", "log_p", "log_rest"))
    assert data == labels * bytes_a_label(config, 258) == labels * (50 * (2 + 2) + 4)
    assert bytes_a_label(TeacherCacheConfig(dtype="float32"), 128_256) == 64 * 8 + 4


@pytest.fixture
def cached(config: TuneConfig, tmp_path: Path, sparse_llama: Callable[..., Any], tiny_tokenizer: Any) -> TuneConfig:
    """Forty rows, twice over, learnt from another random model."""
    sparse_llama(torch.bfloat16, seed=5).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    distill = DistillConfig(teacher=str(tmp_path / "dense"), weight=0.7, cache=TeacherCacheConfig(top_k=258))
    return replace(config, max_steps=None, epochs=2.0, batch_size=8, distill=distill)


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in log(out)]


def test_it_is_made_once_and_read_in_every_epoch_and_run(
    sparse_checkpoint: Path, cached: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.distill is not None
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(cached, model, tmp_path / "first")
    assert len(_losses(tmp_path / "first")) == 10
    plain = replace(cached, distill=replace(cached.distill, cache=None))
    assert stage_fingerprint(cached, "base", None) != stage_fingerprint(plain, "base", None)
    monkeypatch.setattr(teachers, "load_teacher", None)  # nothing of it is needed any more
    tune(cached, model, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


@pytest.mark.long
def test_a_run_learns_what_it_learns_without_and_others_share_it(
    sparse_checkpoint: Path, cached: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.distill is not None
    model = ModelConfig(path=str(sparse_checkpoint))
    tune(cached, model, tmp_path / "first")
    tune(replace(cached, distill=replace(cached.distill, cache=None)), model, tmp_path / "plain")
    assert _losses(tmp_path / "first") == pytest.approx(_losses(tmp_path / "plain"), rel=5e-3)  # bfloat16
    monkeypatch.setattr(teachers, "load_teacher", None)
    other = replace(cached, seed=3, rank=2, batch_size=4, max_steps=3, distill=replace(cached.distill, temperature=2.0))
    tune(other, model, tmp_path / "other")
    assert len(_losses(tmp_path / "other")) == 3


def test_what_a_killed_run_has_made_is_gone_on_with(
    sparse_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, cache_root: Path
) -> None:
    config, teacher = TeacherCacheConfig(top_k=9), Teacher(sparse_llama(seed=1), 1.0, 1.0)
    samples: list[Sample] = [{"input_ids": [n, *range(20)], "labels": [n, *range(20)]} for n in range(11)]

    def opened() -> TeacherCache:
        cache = TeacherCache(config, "teacher:0", 258, CPU, "float32")
        cache.look()
        return cache

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in cache_root.glob("*/[!.]*.safetensors")}

    cache = opened()
    cache.fill(cache.missing(samples), teacher)
    whole = files()
    assert len(whole) == 6  # two samples have 40 labels
    shutil.rmtree(cache_root)
    write, written = TeacherCache.write, []

    def dies(self: TeacherCache, entries: Any) -> None:
        if len(written) == 2:
            (self.folder / ".0000.safetensors.partial").write_bytes(b"half")
            raise RuntimeError("killed")
        written.append(list(entries))
        write(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "write", dies)
        cache = opened()
        with pytest.raises(RuntimeError, match="killed"):
            cache.fill(cache.missing(samples), teacher)
    cache = opened()
    missing = cache.missing(samples)
    assert len(missing) == 11 - 4
    cache.fill(missing, teacher)
    assert files() == whole

    broken = sorted(cache_root.glob("*/[!.]*.safetensors"))[0]
    broken.write_bytes(b"nothing")
    teacher_cache._opened.cache_clear()
    cache = opened()
    assert broken.name not in files()
    assert len(cache.missing(samples)) in (1, 2)
    cache.fill(cache.missing(samples), teacher)
    assert files() == whole


@pytest.mark.long
def test_killed_for_good_while_it_is_made_on_a_real_model(shared_dir: Path, tmp_path: Path) -> None:
    from lors_cli.pruning import prune

    dense = str(shared_dir / "data/models/stories260k")
    prune(PruneConfig(method="magnitude"), dense, tmp_path / "sparse")

    def call(out: str) -> list[str]:
        return ["tune", str(tmp_path / "sparse"), "--out", str(tmp_path / out), "--data-dir", str(shared_dir / "data"),
                "data.num_samples=40", "max_steps=4", "batch_size=8", "distill={cache: {}}"]  # fmt: skip

    killed = signalled(signal.SIGKILL, ".safetensors", *call("broken"))
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "cache/teacher").glob("*/[!.]*.safetensors"))
    assert list((tmp_path / "cache/teacher").glob("*/.*.partial"))
    done = signalled(signal.SIGKILL, "never", *call("broken"))
    assert done.returncode == 0, done.stderr
    assert "samples to compute" in " ".join(done.stderr.split())
    again = signalled(signal.SIGKILL, "never", *call("again"))
    assert "all there" in again.stderr
    assert "loading the teacher" not in again.stderr
    broken, whole = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("broken", "again"))
    assert broken == whole


def test_a_disk_without_room_ends_it_with_4_before_the_teacher_is_loaded(
    sparse_checkpoint: Path, cached: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "load_teacher", None)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
        with pytest.raises(ResourceError, match=r"labels of 1,036 bytes.*are free in") as caught:
            tune(cached, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
    assert caught.value.exit_code == 4
    monkeypatch.setenv("LORS_CACHE_GIB", "0.0001")
    with pytest.raises(ResourceError, match=r"the cache of teacher in .* may take"):
        tune(cached, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")


def test_more_tokens_than_there_are_is_refused(sparse_checkpoint: Path, cached: TuneConfig, tmp_path: Path) -> None:
    assert cached.distill is not None
    config = replace(cached, distill=replace(cached.distill, cache=TeacherCacheConfig(top_k=259)))
    with pytest.raises(UsageError, match="top_k: 259 is more than the vocabulary of 258"):
        tune(config, ModelConfig(path=str(sparse_checkpoint)), tmp_path / "tune")
