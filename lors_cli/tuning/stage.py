"""The tuning stage: `tune` recovers a sparse model with adapters and merges them back, zeros kept."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli.errors import UsageError
from lors_cli.files import atomic, hashes, records
from lors_cli.machine import environment, processes
from lors_cli.models.blocks import PrunableWeight, prunable_weights
from lors_cli.output import console, progress
from lors_cli.output.console import counted
from lors_cli.recipe.resolved import resolved_tune
from lors_cli.recipe.schema import ModelConfig, TuneConfig
from lors_cli.sparsity import Pattern
from lors_cli.tuning.data import as_read, data_identity, data_metrics, load_data
from lors_cli.tuning.needed import require_packages
from lors_cli.tuning.teacher import teacher_model, with_teacher

if TYPE_CHECKING:
    from lors_cli.data.samples import TuneData
    from lors_cli.tuning.training.step_log import StepLog
    from lors_cli.tuning.training.trackers import TrackedRun
    from lors_cli.tuning.training.trainer import AdapterTrainer

STAGE_VERSION = 3
INSTRUCTIONS_VERSION = 5
"""The same for instructions: 5 since an empty answer of a conversation is not learnt."""
SQFT_ON_GRID = 10
"""Added to either for SQFT that is quantization-aware, since its merged weights are summed in float32."""
WITHOUT_EFFECT = (
    "save_steps", "keep_checkpoints", "max_bad_steps", "report_to", "gradient_checkpointing", "merged_cache", "base",
    "parallelism",
)  # fmt: skip
"""Settings that change how the work is done, not what comes out."""
UNSAID: dict[str, Any] = {
    "skip": (), "lr_schedule": "cosine", "optim": "adamw", "spike_factor": None, "val_size": None, "eval_steps": None,
    "early_stopping_patience": None, "load_best_model_at_end": None, "quantization_aware": False,
    "gradient": "approximate", "adam_betas": (0.9, 0.999),
}  # fmt: skip
"""Settings that fingerprints have only where they are not this, since earlier versions did not have them."""
CHECKPOINTS_NAME = "checkpoints"
LOG_NAME = "log.jsonl"


def stage_fingerprint(config: TuneConfig, model_fingerprint: str, data_dir: Path | None) -> str:
    """The fingerprint of `tune`'s result; cheap, no model is loaded.

    Args:
        config: the stage's settings, their teacher filled in (`with_teacher`).
    """
    return hashes.fingerprint("tune", *_identity(config, model_fingerprint, data_dir))


def stage_inputs(config: TuneConfig, model_fingerprint: str, data_dir: Path | None) -> dict[str, Any]:
    """What a result is made from beside its settings: fingerprints of what is read, and the version of the code."""
    version, _, inputs = _identity(config, model_fingerprint, data_dir)
    return {**inputs, "version": version}


def _identity(
    config: TuneConfig, model_fingerprint: str, data_dir: Path | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The version of the code, the settings and the inputs that make a result what it is."""
    from lors_cli.models.sources import model_fingerprint as fingerprint_model

    settings = {key: value for key, value in asdict(config).items() if key not in WITHOUT_EFFECT}
    settings.update(alpha=float(config.alpha), per_device_batch_size=config.micro_batch_size, init=config.start,
                    rounding=config.weight_rounding, learning_rate=config.peak_learning_rate)  # fmt: skip
    settings.update(load_best_model_at_end=config.loads_best or None,
                    val_size=config.val_size and float(config.val_size))  # fmt: skip
    if config.early_stopping_patience is None and not config.loads_best:
        settings["eval_steps"] = None  # it moves no weight
    for key, usual in UNSAID.items():
        if settings[key] == usual:
            del settings[key]
    if config.max_steps is not None or config.max_tokens is not None:
        del settings["epochs"]
    if config.start == "kaiming":
        del settings["init_samples"]
    settings["data"], read = data_identity(config, data_dir)
    inputs = {"model": model_fingerprint, **read.inputs}
    if config.distill is not None:
        inputs["teacher"] = fingerprint_model(teacher_model(config.distill))
        settings["distill"] = {"weight": config.distill.weight, "temperature": float(config.distill.temperature)}
        if config.distill.cache is not None:
            settings["distill"]["cache"] = asdict(config.distill.cache)
    version = INSTRUCTIONS_VERSION if read.has_instructions else STAGE_VERSION
    if config.quantization_aware and config.method.startswith("sqft"):
        version += SQFT_ON_GRID
    return version, settings, inputs


def tune(
    config: TuneConfig, model: ModelConfig | str | Path, out: Path | str, *, data_dir: Path | str | None = None
) -> records.StageRecord:
    """Tune a sparse causal LM and write adapter and merged checkpoint; an interrupted call resumes from its last one.

    Args:
        model: sparse; a folder or hub id, or its settings.
        out: stage folder, which all processes see.
        data_dir: local datasets; default `$LORS_DATA_DIR`, else the hub.

    Returns:
        The stage's record; its metrics hold losses, throughput and the merged model's sparsity.

    Raises:
        UsageError: the model has no sparse linear, or the loss broke.
        SparsityError: the merged model breaks the base's zeros; nothing is published.
    """
    with processes.joined():
        return _tune(config, ModelConfig.of(model), Path(out), Path(data_dir) if data_dir else None)


def _tune(config: TuneConfig, model: ModelConfig, out: Path, data_dir: Path | None) -> records.StageRecord:
    from lors_cli.machine.devices import resolve_device, set_seed
    from lors_cli.models.loading import load_tokenizer
    from lors_cli.models.sources import model_fingerprint
    from lors_cli.tuning.attach import adaptable_layers
    from lors_cli.tuning.block_merge import BlockMerge
    from lors_cli.tuning.grids import base_grids
    from lors_cli.tuning.merge import write_card
    from lors_cli.tuning.prompt_format import fit_to_prompt
    from lors_cli.tuning.results import adapter_config, write_results
    from lors_cli.tuning.training.checkpoints import begin_anew_in
    from lors_cli.tuning.training.distributed import say_how
    from lors_cli.tuning.training.preparation import prepare_trainer
    from lors_cli.tuning.training.sharding import load_trainable
    from lors_cli.tuning.training.step_log import StepLog

    started = time.monotonic()
    require_packages(config)
    config = with_teacher(config, model)
    base_fingerprint = model_fingerprint(model)
    version, settings, read = _identity(config, base_fingerprint, data_dir)
    fingerprint = hashes.fingerprint("tune", version, settings, read)
    inputs = {**read, "version": version, "path": model.path}
    stored, template = as_read(resolved_tune(config), data_dir)
    console.info(f"  model: {model.path}")
    grids = base_grids(model, needed=config.quantization_aware)
    with progress.busy("reading the tokenizer"):
        tokenizer = load_tokenizer(model)
    say_how(config)
    network, source = load_trainable(config, model)
    processes.from_main(lambda: begin_anew_in(out / CHECKPOINTS_NAME, fingerprint, str(network.dtype)))
    weights = prunable_weights(network) if source is None else source.weights()
    patterns = processes.from_main(lambda: sparse_layers(weights, Path(model.path)))
    layers = adaptable_layers(network, patterns, config.skip)
    data = load_data(config, network, tokenizer, data_dir)
    set_seed(config.seed)
    made = {"config": stored, "inputs": inputs}
    log = StepLog(processes.from_main(lambda: _running_log(out, records.work_dir(out, fingerprint, made))))
    schedule = config
    if data.num_steps not in (None, config.max_steps):  # a stream's samples are those of all epochs
        schedule = replace(config, epochs=1.0, max_steps=None, max_tokens=None)
    trainer = prepare_trainer(schedule, network, layers, data, tokenizer, out / CHECKPOINTS_NAME, fingerprint,
                              device=resolve_device(model.device), grids=grids, source=source)  # fmt: skip
    trainer.started = started
    training = _train(trainer, data, log, _tracked_run(config, model, out, fingerprint))
    data.close()

    def write() -> records.StageRecord:
        adapter = adapter_config(config, network, layers, model, base_fingerprint, template, patterns, source)
        staging = records.staging_dir(out)
        prompt = fit_to_prompt(network if source is None else source.network, tokenizer, template)
        merging = None if source is None else BlockMerge(config, source, network, layers, grids)
        metrics = {**training, **data_metrics(data), **prompt,
                   **write_results(staging, network, tokenizer, adapter, patterns, grids, merging),
                   **_left_dense(Path(model.path))}  # fmt: skip
        write_card(
            staging, model, base_fingerprint, hashes.plain(stored), metrics, [read["data"], *read.get("mix", ())]
        )
        atomic.write_bytes(staging / LOG_NAME, log.path.read_bytes())
        record = records.StageRecord(
            "tune", fingerprint, hashes.plain(stored), inputs, metrics,
            environment.environment(), round(trainer.elapsed_s, 2), {},
        )  # fmt: skip
        return records.publish(out, record)

    return processes.from_main(write)


def _tracked_run(config: TuneConfig, model: ModelConfig, out: Path, fingerprint: str) -> TrackedRun:
    """What trackers are told of this run; it is called as its run folder is."""
    from lors_cli.tuning.training.trackers import TrackedRun

    folder = out.absolute()
    told = {"model": model.path, "tune": hashes.plain(resolved_tune(config)), "code": environment.code_version()}
    name = folder.parent.name if folder.name == "tune" else folder.name
    return TrackedRun(name, told, folder, processes.from_main(lambda: records.work_dir(out, fingerprint)))


def stored_config(config: TuneConfig, data_dir: Path | None) -> TuneConfig:
    """The config as `stage.json` has it: what method and text imply is said."""
    return as_read(resolved_tune(config), data_dir)[0]


def _left_dense(folder: Path) -> dict[str, list[str]]:
    """What pruning skipped, for the record of the tuned model too."""
    from lors_cli.models.inspection import dense_layers

    names = dense_layers(records.read_record(folder))
    return {"dense_layers": names} if names else {}


def sparse_layers(weights: dict[str, PrunableWeight], folder: Path) -> dict[str, Pattern]:
    """Those of a model's prunable weights that the pruner made sparse.

    A folder written by `lors` says which; elsewhere every weight of a decoder block with at least 5 % zeros.

    Returns:
        Full names and the pattern each keeps to.

    Raises:
        UsageError: none is sparse.
    """
    from lors_cli.models.inspection import layer_patterns

    layers = layer_patterns(weights, records.read_record(folder))
    if not layers:
        raise UsageError("the model is dense: its decoder blocks have no zeros to keep.", "Prune it first: lors prune")
    return layers


def _running_log(out: Path, work: Path) -> Path:
    """Where to log steps: `log.jsonl`, unless that is a finished stage's, which stays until it is replaced.

    A log begun in `work` is gone on with: a kill while results were published may have left the old one in its place.
    """
    begun = (work / LOG_NAME).is_file()
    return (work if begun or records.read_record(out) is not None else out) / LOG_NAME


def _train(trainer: AdapterTrainer, data: TuneData, log: StepLog, run: TrackedRun) -> dict[str, Any]:
    """Run the trainer to its end, from the last checkpoint where there is one; the losses' metrics."""
    from lors_cli.models.quiet import quiet_libraries
    from lors_cli.tuning.training import fixed_batch
    from lors_cli.tuning.training.checkpoints import latest_checkpoint, remove_others
    from lors_cli.tuning.training.step_log import loss_text, step_metrics
    from lors_cli.tuning.training.stopping import stopping_gently
    from lors_cli.tuning.training.trackers import tracking

    last = processes.from_main(lambda: latest_checkpoint(trainer.folder, trainer.fingerprint))
    if last:
        trainer.resume(last)
        console.info(f"  resuming after step {trainer.step} of {trainer.num_steps} from {last}")
    logged = trainer.step - 1 if trainer.unlogged else trainer.step
    if processes.is_main():
        remove_others(trainer.folder, trainer.fingerprint)
        log.cut_after(logged)
    if trainer.validation.samples:
        samples = counted(len(trainer.validation.samples), "sample")
        console.info(f"  held-out loss: of {samples}, every {counted(trainer.validation.every, 'step')} (eval_steps)")
    batch = fixed_batch.choose(trainer, data)
    before = fixed_batch.measure(trainer, batch, untrained=True)
    with (
        progress.progress("tune", trainer.num_steps, "steps") as task,
        tracking(trainer.config.report_to, run, logged + 1) as track, quiet_libraries(), stopping_gently(trainer.stop),
    ):  # fmt: skip
        task.skip(trainer.step)

        def report(row: dict[str, Any]) -> None:
            # first: it ends a run that has lost its folder
            task.update(row["step"], f"loss {trainer.guard.loss:.3f} · {row['tokens_per_s']:.0f} tokens/s")
            log.append(row)
            track(row)
            if "val_loss" in row:
                console.info(f"  step {row['step']}: {trainer.validation.text}")

        trainer.run(report if processes.is_main() else lambda row: None)
    trainer.model.eval()
    if trainer.validation.is_over:
        console.info(f"  training ended early, after step {trainer.step} of {trainer.num_steps}")
    if trainer.config.loads_best:
        trainer.take_best()
        console.info(f"  the model is that of step {trainer.validation.best_step}")
    after = fixed_batch.measure(trainer, batch)
    if not math.isfinite(after):
        raise UsageError(f"the loss after training is {after}: the tuned model is of no use, and nothing was written.",
                         "Lower learning_rate, or use dtype: float32.")  # fmt: skip
    losses = {
        "loss_before": round(before, 6) if math.isfinite(before) else None, "loss_after": round(after, 6),
        "loss_samples": len(batch.indices), "loss_held_out": batch.held_out,
    }  # fmt: skip
    console.info(f"  loss {loss_text(losses)}")
    if not processes.is_main():
        return {}
    rows = log.rows()
    return {**step_metrics(rows), **losses, **trainer.validation.metrics(rows)}
