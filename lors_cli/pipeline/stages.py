"""The doors to the stages. Nothing else in the pipeline or above it asks what kind of stage it has before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lors_cli.data.sources import Row, Split, TextSource, Want
from lors_cli.data.tokenising import check_length
from lors_cli.errors import UsageError
from lors_cli.evaluation import estimate as evaluation_estimate
from lors_cli.evaluation.entries import Task, resolve, shots_text, tasks_of
from lors_cli.files.hashes import plain
from lors_cli.machine import processes
from lors_cli.models.needs import RECORDS, Estimate
from lors_cli.models.packed import stage as packing
from lors_cli.models.size import ModelSize, try_size
from lors_cli.output.console import counted
from lors_cli.pruning import estimate as pruning_estimate
from lors_cli.pruning import stage as pruning
from lors_cli.pruning.facts import statistics_kind
from lors_cli.recipe.columns import ColumnsConfig
from lors_cli.recipe.resolved import resolved_prune
from lors_cli.recipe.schema import EvalConfig, ModelConfig, PackConfig, PruneConfig, TuneConfig, TuneDataConfig
from lors_cli.recipe.tuning import data_name
from lors_cli.sparsity import Pattern
from lors_cli.tuning import estimate as tuning_estimate
from lors_cli.tuning import stage as tuning
from lors_cli.tuning.needed import require_packages
from lors_cli.tuning.teacher import teacher_model, with_teacher

Config = PruneConfig | TuneConfig | PackConfig | EvalConfig


@dataclass(frozen=True)
class Text:
    """A source of text, as `open_source` takes it."""

    name: str
    split: Split
    want: Want = "text"
    columns: ColumnsConfig | None = None
    chosen: str | None = None
    fits: Callable[[TextSource, list[Row]], object] = lambda source, rows: None
    """UsageError if the stage's settings are not for what the source gives; of its rows the first are looked at."""


@dataclass(frozen=True)
class Reads:
    """What a stage reads beside its models."""

    texts: Sequence[Text] = ()
    tasks: Sequence[Task] = ()
    teacher: ModelConfig | None = None
    teacher_is_cached: bool = False
    """Whether its weights may be needed no more."""
    chat: bool = False
    """Whether the models must have a chat template."""


@dataclass(frozen=True)
class Stage:
    """What can be asked of a stage. A door takes the stage's own config first, then what it says.

    Args:
        run: models by role, folder, data_dir.
        needs: the model's size, number of processes; peak memory of each, and disk.
        operations: the model's size, number of models, data_dir; None where not known.
        describe: models by role; a few words for people.
        reads: texts, tasks and a teacher.
        makes: the role of the model that comes out, None where scores do.
        fingerprint: of the one model it reads, data_dir; None for scores, which have theirs piece by piece.
        prepare: the model; the config with what depends on it filled in.
        shortage: the model, its size, number of processes; why the free memory is too small, and what to do. None: by
            `needs` alone.
        fits: the model's size; UsageError if its linears cannot take the pattern or rank, or are none to skip, or a
            sequence is longer than it can take.
        check_shared: number of processes; UsageError if they cannot share the work.
        check_packages: MissingError if a package that the settings ask for is not installed.
        stored: data_dir; the config as `stage.json` has it.
        inputs: of the one model it reads, its fingerprint, and data_dir; what `stage.json` has of what it reads.
        foresee: models by role, without those yet to be made; one line on what will come out, found by looking at
            them, for a dry run.
        gives_template: data_dir; whether the model that comes out will have a chat template, whatever it is made of.
        without_effect: dotted keys of settings that change how the work is done, not what comes out.
    """

    run: Callable[[Any, dict[str, ModelConfig], Path, Path | None], None]
    needs: Callable[[Any, ModelSize, int], Estimate]
    operations: Callable[[Any, ModelSize, int, Path | None], float | None]
    describe: Callable[[Any, dict[str, ModelConfig]], str]
    reads: Callable[[Any], Reads]
    makes: str | None = None
    fingerprint: Callable[[Any, str, Path | None], str] | None = None
    prepare: Callable[[Any, ModelConfig], Any] = lambda config, model: config
    shortage: Callable[[Any, ModelConfig, ModelSize, int], tuple[str, str] | None] | None = None
    fits: Callable[[Any, ModelSize], None] = lambda config, size: None
    check_shared: Callable[[Any, int], None] = lambda config, num_processes: None
    check_packages: Callable[[Any], None] = lambda config: None
    stored: Callable[[Any, Path | None], Any] = lambda config, data_dir: config
    inputs: Callable[[Any, str, Path | None], dict[str, Any]] | None = None
    foresee: Callable[[Any, dict[str, ModelConfig]], str] = lambda config, models: ""
    gives_template: Callable[[Any, Path | None], bool] = lambda config, data_dir: False
    without_effect: Collection[str] = ()

    def leaves(self, config: Config, size: ModelSize) -> int:
        """Bytes on disk once it is done."""
        disk = self.needs(config, size, 1).disk
        return min(size.num_bytes + RECORDS, disk) if self.makes else disk


def _prune(config: PruneConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    (model,) = models.values()
    pruning.prune(config, model, out, data_dir=data_dir)


def _pruning(config: PruneConfig, models: dict[str, ModelConfig]) -> str:
    share = f" {config.sparsity:g}" if config.pattern == "unstructured" else ""
    rounded = f", rounded to {config.quantize.bits} bits" if config.quantize else ""
    return f"{config.method} {config.pattern}{share}{rounded}"


def _lies_here(model: ModelConfig) -> bool:
    """Whether a model is a folder that is there, not yet to be made or downloaded."""
    return (Path(model.path) / "config.json").is_file()


def _pruned_bits(config: PruneConfig, models: dict[str, ModelConfig]) -> str:
    """What quantised weights will take."""
    (model,) = models.values()
    size = try_size(model) if config.quantize and _lies_here(model) else None
    found = pruning_estimate.bits(config, size) if size else None
    return f"{found:.2f} bits a weight of the pruned linears, once they are packed" if found else ""


def _pruning_reads(config: PruneConfig) -> Reads:
    if statistics_kind(config) == "none":
        return Reads()
    calibration = config.calibration
    return Reads([Text(calibration.dataset, "train", columns=calibration.columns, chosen=calibration.split)])


def _pruning_fits(config: PruneConfig, size: ModelSize) -> None:
    for shape in dict.fromkeys(size.without(config.skip).linears):
        Pattern.of(config).check_shape("a linear", shape)
    if statistics_kind(config) != "none" and config.calibration.sequence_length is not None:
        check_length(config.calibration.sequence_length, size.max_length, "sequence_length")


def _tune(config: TuneConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    (model,) = models.values()
    tuning.tune(config, model, out, data_dir=data_dir)


def _tuning(config: TuneConfig, models: dict[str, ModelConfig]) -> str:
    length = counted(config.max_steps, "step") if config.max_steps else counted(config.epochs, "epoch")
    length = f"{config.max_tokens:,} tokens" if config.max_tokens else length
    return f"{config.method} rank {config.rank} on {data_name(plain(config.data))}, {length}"


def _tuning_reads(config: TuneConfig) -> Reads:
    teacher = teacher_model(config.distill) if config.distill and config.distill.teacher else None
    texts = [Text(data.dataset, "train", "instructions", data.columns, data.split, partial(_check_data, config, data))
             for _, data in config.data.parts]  # fmt: skip
    return Reads(texts, teacher=teacher, teacher_is_cached=bool(config.distill and config.distill.cache))


def _check_data(config: TuneConfig, data: TuneDataConfig, source: TextSource, rows: list[Row]) -> None:
    from lors_cli.data.instructions import rendered
    from lors_cli.data.prompts import TEMPLATES, template_text
    from lors_cli.data.stream.samples import check_stream, is_streamed
    from lors_cli.data.tokens import check_settings

    config = replace(config, data=data)
    if is_streamed(config, source):
        check_stream(config, source)
    check_settings(data, source)
    for number, row in enumerate(rows if source.kind == "instructions" and data.template in TEMPLATES else (), 1):
        rendered(row, partial(template_text, data.template), f"{source.name}, row {number}")


def _learns_template(config: TuneConfig, data_dir: Path | None) -> bool:
    from lors_cli.data.prompts import TEMPLATES
    from lors_cli.tuning.data import as_read

    return as_read(config, data_dir)[1] in TEMPLATES


def _teacher_cache(config: TuneConfig, models: dict[str, ModelConfig]) -> str:
    """What a teacher's predictions will take on disk."""
    if config.distill is None or config.distill.cache is None or config.distill.teacher is None:
        return ""
    size = try_size(teacher_model(config.distill))
    return tuning_estimate.teacher_cache(config, size.vocab_size) if size else ""


def _need_linears(size: ModelSize, can: str) -> None:
    """Refuse a model that could be pruned, but that nothing else can be done with."""
    if not size.has_linears:
        raise UsageError(
            f"only nn.Linear can be {can}, and the model's blocks hold Conv1D or experts in one tensor alone.",
            "Prune and evaluate it only.",
        )


def _tuning_fits(config: TuneConfig, size: ModelSize) -> None:
    from lors_cli.tuning.baselines import check_inputs, check_rank

    _need_linears(size, "tuned")
    adapted = size.without(config.skip).plain
    check_rank(config.method, config.rank, [rows for rows, _ in adapted.linears])
    if config.start != "kaiming":
        check_inputs(config.rank, {name: inputs for name, _, inputs, _ in adapted.layers})
    check_length(config.data.max_length, size.max_length, "max_length")


def _tuning_shared(config: TuneConfig, num_processes: int) -> None:
    from lors_cli.tuning.training.distributed import micro_batch_size

    micro_batch_size(config, num_processes)


def _evaluate(config: EvalConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    from lors_cli.evaluation.stage import evaluate

    evaluate(config, models, out, data_dir=data_dir)


def _evaluation(config: EvalConfig, models: dict[str, ModelConfig]) -> str:
    entries = resolve(config)
    shots = shots_text(entries)
    tasks = [entry.name for entry in entries] if len(entries) < 3 else [f"{len(entries)} tasks"]
    texts = ("3 short texts",) if config.generations else ()
    named = ", ".join((*tasks, *config.perplexity, *texts))
    return f"{', '.join(models)}: {named}{f' ({shots})' if shots else ''}"


def _evaluation_fits(config: EvalConfig, size: ModelSize) -> None:
    if config.perplexity and config.perplexity_length is not None:
        check_length(config.perplexity_length, size.max_length, "perplexity_length")


def _pack(config: PackConfig, models: dict[str, ModelConfig], out: Path, data_dir: Path | None) -> None:
    (model,) = models.values()
    processes.from_main(partial(packing.pack_model, config, model, out, data_dir=data_dir))


def _packed_size(config: PackConfig, models: dict[str, ModelConfig]) -> str:
    return "".join(packing.foreseen_size(model) for model in models.values() if _lies_here(model))


STAGES = {
    "prune": Stage(
        run=_prune,
        needs=pruning_estimate.needs,
        operations=lambda config, size, num_models, data_dir: pruning_estimate.operations(config, size),
        describe=_pruning,
        foresee=_pruned_bits,
        reads=_pruning_reads,
        fits=_pruning_fits,
        makes="pruned",
        fingerprint=pruning.stage_fingerprint,
        check_shared=pruning.check_shared,
        shortage=pruning_estimate.shortage,
        stored=lambda config, data_dir: resolved_prune(config),
        inputs=pruning.stage_inputs,
        without_effect=("calibration.offload",),
    ),
    "tune": Stage(
        run=_tune,
        needs=tuning_estimate.needs,
        operations=lambda config, size, num_models, data_dir: tuning_estimate.operations(config, size, data_dir),
        describe=_tuning,
        foresee=_teacher_cache,
        gives_template=_learns_template,
        reads=_tuning_reads,
        fits=_tuning_fits,
        makes="tuned",
        fingerprint=tuning.stage_fingerprint,
        prepare=with_teacher,
        check_shared=_tuning_shared,
        check_packages=require_packages,
        stored=tuning.stored_config,
        inputs=tuning.stage_inputs,
        without_effect=tuning.WITHOUT_EFFECT,
    ),
    "pack": Stage(
        run=_pack,
        needs=lambda config, size, num_processes: packing.needs(config, size),
        operations=lambda config, size, num_models, data_dir: float(size.num_parameters),
        describe=lambda config, models: "kept values, or their codes, and a mask of one bit a place",
        reads=lambda config: Reads(),
        fits=lambda config, size: _need_linears(size, "packed"),
        makes="packed",
        fingerprint=packing.stage_fingerprint,
        foresee=_packed_size,
        inputs=packing.stage_inputs,
    ),
    "eval": Stage(
        run=_evaluate,
        needs=lambda config, size, num_processes: evaluation_estimate.needs(config, size),
        operations=lambda config, size, num_models, data_dir: evaluation_estimate.operations(config, size, num_models),
        describe=_evaluation,
        fits=_evaluation_fits,
        without_effect=("models",),
        reads=lambda config: Reads(
            [Text(name, "validation") for name in config.perplexity],
            tasks_of(resolve(config)),
            chat=config.apply_chat_template,
        ),
    ),
}
"""In the order of a run."""
