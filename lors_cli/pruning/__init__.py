"""The block-by-block pruning driver: `prune` turns a dense checkpoint into a sparse one.

For every decoder block: run it on the calibration inputs and sum statistics, prune its linears group by group,
run it again so that the next block sees what the pruned one puts out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors_cli import console, run_dir
from lors_cli.errors import SparsityError, UsageError
from lors_cli.sparsity import LayerSparsity, Pattern, measure, summarise

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from lors_cli.pruning.calibration import BlockArguments, InputGroup
    from lors_cli.pruning.statistics import InputStatistics, Kind
    from lors_cli.recipe import ModelConfig, PruneConfig

STAGE_VERSION = 1
STATISTICS: dict[str, Kind] = {
    "magnitude": "none", "wanda": "norm", "ria": "norm", "sparsegpt": "hessian", "admm": "hessian",
}  # fmt: skip


def statistics_kind(config: PruneConfig) -> Kind:
    """What must be known of the inputs: what the method looks at, or the Hessian when weights are refitted."""
    return "hessian" if config.refit else STATISTICS[config.method]


def prune_group(
    method: str, weights: Sequence[torch.Tensor], statistics: InputStatistics, pattern: Pattern
) -> list[torch.Tensor]:
    """Prune linears that share their input.

    Args:
        method: a key of `STATISTICS`.
        weights: (out_features_i, in_features) each.
        statistics: of the shared input, of the kind the method needs.
        pattern: how many weights stay.

    Returns:
        The pruned weights, in the order given.
    """
    from lors_cli.pruning.admm import admm
    from lors_cli.pruning.magnitude import magnitude
    from lors_cli.pruning.ria import ria
    from lors_cli.pruning.sparsegpt import sparsegpt
    from lors_cli.pruning.wanda import wanda

    together: dict[str, Callable[..., list[torch.Tensor]]] = {"sparsegpt": sparsegpt, "admm": admm}
    if method in together:
        return together[method](weights, statistics, pattern)
    if method == "magnitude":
        return [magnitude(weight, pattern) for weight in weights]
    one: dict[str, Callable[..., torch.Tensor]] = {"wanda": wanda, "ria": ria}
    return [one[method](weight, statistics, pattern) for weight in weights]


def refit_group(
    weights: Sequence[torch.Tensor], pruned: Sequence[torch.Tensor], statistics: InputStatistics
) -> list[torch.Tensor]:
    """Solve for the kept weights of linears that share their input anew, on the masks that pruning chose.

    Args:
        weights: (out_features_i, in_features) each, dense.
        pruned: the same with zeros.
        statistics: Hessian of the shared input.

    Returns:
        The refitted weights in the dtypes and the order given.
    """
    import torch

    from lors_cli.pruning.refit import refit

    rows = [weight.shape[0] for weight in weights]
    solved = refit(torch.cat([*weights]), torch.cat([*pruned]), statistics.hessian())
    return [part.to(weight.dtype) for part, weight in zip(solved.split(rows), weights, strict=True)]


def stage_fingerprint(config: PruneConfig, model_fingerprint: str, data_dir: Path | None) -> str:
    """The fingerprint of `prune`'s result; cheap, no model is loaded.

    Args:
        config: the stage's settings.
        model_fingerprint: of the dense model.
        data_dir: local datasets.
    """
    settings = {**asdict(config), "sparsity": Pattern.of(config).sparsity}
    inputs = {"model": model_fingerprint}
    if statistics_kind(config) == "none":
        del settings["calibration"]
    else:
        from lors_cli.text import fingerprint_source

        dataset = settings["calibration"].pop("dataset")
        inputs["calibration"] = fingerprint_source(dataset, split="train", data_dir=data_dir)
    return run_dir.fingerprint("prune", STAGE_VERSION, settings, inputs)


def prune(config: PruneConfig, model: ModelConfig, out: Path, *, data_dir: Path | None = None) -> run_dir.StageRecord:
    """Prune a causal LM and write the sparse checkpoint; an interrupted call goes on at its last block.

    Args:
        config: method, pattern, calibration.
        model: the dense model.
        out: stage folder (DESIGN §4).
        data_dir: local datasets, None for the hub.

    Returns:
        The stage's record; its metrics hold sparsity and pattern of every pruned linear.

    Raises:
        SparsityError: a weight came out denser than promised; nothing is published.
        UsageError: the model or one of its layers cannot be pruned so, or `out` is the model itself.
    """
    from lors_cli.models import load_model, load_tokenizer
    from lors_cli.sources import model_fingerprint

    started = time.monotonic()
    if Path(model.path).expanduser().resolve() == out.resolve():
        raise UsageError(f"{out} is the model itself and would be overwritten.", "Choose another --out.")
    pattern = Pattern.of(config)
    base_fingerprint = model_fingerprint(model)
    fingerprint = stage_fingerprint(config, base_fingerprint, data_dir)
    console.info(f"  loading {model.path}")
    tokenizer = load_tokenizer(model)
    network = load_model(model)
    driver = _Driver(config, network, pattern, out / run_dir.WORK_NAME)
    driver.check()
    batches = _calibration_batches(config, network, tokenizer, data_dir)
    run_dir.work_dir(out, fingerprint)
    if batches:
        driver.prune_blocks(batches)
    else:
        driver.prune_without_data()
    metrics = {**summarise(_verified(driver.layers(), pattern), pattern), **driver.metrics(),
               "dtype": str(network.dtype).removeprefix("torch."),
               "commit": getattr(network.config, "_commit_hash", None)}  # fmt: skip
    staging = run_dir.staging_dir(out)
    _write_checkpoint(staging, network, tokenizer, config, model, metrics)
    record = run_dir.StageRecord(
        "prune", fingerprint, run_dir.plain(config), {"model": base_fingerprint, "path": model.path}, metrics,
        run_dir.environment(), round(time.monotonic() - started, 2), {},
    )  # fmt: skip
    return run_dir.publish(out, record)


def _write_checkpoint(
    staging: Path,
    network: Any,
    tokenizer: Any,
    config: PruneConfig,
    model: ModelConfig,
    metrics: dict[str, Any],
) -> None:
    from lors_cli.models import save_checkpoint
    from lors_cli.report.card import model_card

    save_checkpoint(network, tokenizer, staging)
    card = model_card(base_model=model.path, prune=run_dir.plain(config), tune=None, metrics=metrics,
                      environment=run_dir.environment())  # fmt: skip
    run_dir.write_text(staging / "README.md", card)


def _calibration_batches(
    config: PruneConfig, network: PreTrainedModel, tokenizer: Any, data_dir: Path | None
) -> list[torch.Tensor]:
    """The calibration sequences; none for a method that looks at weights alone."""
    from lors_cli.models import model_max_length
    from lors_cli.tokens import calibration_tokens

    if statistics_kind(config) == "none":
        return []
    calibration = config.calibration
    tokens = calibration_tokens(calibration, tokenizer, model_max_length=model_max_length(network), data_dir=data_dir)
    console.info(f"  calibration: {calibration.dataset}, {tokens.shape[0]} × {tokens.shape[1]} tokens")
    return list(tokens.split(calibration.batch_size))


def _verified(layers: list[LayerSparsity], pattern: Pattern) -> list[LayerSparsity]:
    broken = [layer for layer in layers if layer.violations]
    if broken:
        raise SparsityError(
            f"{len(broken)} pruned weights break {pattern}, first {broken[0].name} with {broken[0].violations} "
            "violations; nothing was written.",
            "This is a fault of the pruning method: please report it with the recipe.",
        )
    return layers


@dataclass
class _Driver:
    """One pruning run over a loaded model, with its resumable state in `work`."""

    config: PruneConfig
    network: PreTrainedModel
    pattern: Pattern
    work: Path
    phases_s: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_sequences: int = 0

    def check(self) -> None:
        """Refuse what can't be pruned before any work is done."""
        for name, linear in self._linears().items():
            self.pattern.check_shape(name, linear.weight.shape)

    def _linears(self) -> dict[str, nn.Linear]:
        from lors_cli.models import prunable_linears

        return prunable_linears(self.network)

    def layers(self) -> list[LayerSparsity]:
        """Every pruned linear, measured."""
        return [measure(name, linear.weight, self.pattern) for name, linear in self._linears().items()]

    def metrics(self) -> dict[str, Any]:
        """Calibration size and seconds a phase."""
        if not self.num_tokens:
            return {}
        calibration = {"num_samples": self.num_sequences, "tokens": self.num_tokens}
        return {
            "calibration": calibration,
            "phases_s": {key: round(value, 2) for key, value in self.phases_s.items()},
        }

    def prune_without_data(self) -> None:
        """Methods that look at weights alone."""
        from lors_cli.pruning.statistics import InputStatistics

        linears = self._linears()
        with console.progress("prune", len(linears), "linears") as task:
            for linear in linears.values():
                (pruned,) = prune_group(self.config.method, [linear.weight.data], InputStatistics("none"), self.pattern)
                linear.weight.data.copy_(pruned)
                task.advance()

    def prune_blocks(self, batches: list[torch.Tensor]) -> None:
        """Methods that look at the inputs of each layer."""
        from lors_cli.models import decoder_blocks
        from lors_cli.pruning.calibration import capture

        prefix, blocks = decoder_blocks(self.network)
        self.num_sequences = sum(batch.shape[0] for batch in batches)
        self.num_tokens = sum(batch.numel() for batch in batches)
        hidden, arguments = capture(self.network, list(blocks), batches)
        with console.progress("prune", len(blocks), "blocks") as task:
            first = self._resume(blocks, hidden)
            task.skip(first)
            for index in range(first, len(blocks)):
                self._prune_block(f"{prefix}.{index}", blocks[index], hidden, arguments[index])
                with self._phase("save"):
                    self._save(index, blocks[index], hidden, last=index == len(blocks) - 1)
                task.advance(note=self._spent())

    def _prune_block(
        self, prefix: str, block: nn.Module, hidden: list[torch.Tensor], arguments: BlockArguments
    ) -> None:
        import torch

        from lors_cli.models import block_linears

        linears = block_linears(block, prefix)
        with torch.no_grad():
            for group in self._collect(block, linears, hidden, arguments):
                with self._phase("solve"):
                    weights = [linears[name].weight.data for name in group.names]
                    pruned = prune_group(self.config.method, weights, group.statistics, self.pattern)
                    if self.config.refit:
                        pruned = refit_group(weights, pruned, group.statistics)
                    for weight, new in zip(weights, pruned, strict=True):
                        weight.copy_(new)
            with self._phase("recompute"):
                for index, batch in enumerate(hidden):
                    hidden[index] = arguments.run(block, batch)

    def _collect(
        self,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        hidden: list[torch.Tensor],
        arguments: BlockArguments,
    ) -> list[InputGroup]:
        """Run the block on every batch, listening at its linears."""
        from lors_cli.pruning.calibration import InputRecorder

        recorder = InputRecorder(linears, statistics_kind(self.config))
        try:
            with self._phase("capture"):
                for batch in hidden:
                    arguments.run(block, batch)
                    recorder.end_batch()
        finally:
            recorder.close()
        return recorder.groups

    def _save(self, index: int, block: nn.Module, hidden: list[torch.Tensor], *, last: bool) -> None:
        """Keep the block and the next one's inputs; the inputs' file is the sign that the block is done."""
        from safetensors.torch import save

        weights = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
        run_dir.write_bytes(self.work / f"block_{index:04d}.safetensors", save(weights))
        inputs = {} if last else {f"{number:06d}": batch.contiguous() for number, batch in enumerate(hidden)}
        run_dir.write_bytes(self.work / f"inputs_{index + 1:04d}.safetensors", save(inputs))
        (self.work / f"inputs_{index:04d}.safetensors").unlink(missing_ok=True)

    def _resume(self, blocks: nn.ModuleList, hidden: list[torch.Tensor]) -> int:
        """Load what an interrupted run has done; the number of finished blocks."""
        from safetensors.torch import load_file

        saved = sorted(self.work.glob("inputs_*.safetensors"))
        if not saved:
            return 0
        done = int(saved[-1].stem.split("_")[1])
        for index in range(done):
            blocks[index].load_state_dict(load_file(self.work / f"block_{index:04d}.safetensors"))
        device = hidden[0].device
        if done < len(blocks):
            inputs = load_file(saved[-1])
            hidden[:] = [inputs[f"{number:06d}"].to(device) for number in range(len(hidden))]
        console.info(f"  going on after {done} of {len(blocks)} blocks done by an earlier run")
        return done

    def _spent(self) -> str:
        return " ".join(f"{name} {seconds:.0f}s" for name, seconds in self.phases_s.items())

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        import torch

        started = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.phases_s[name] = self.phases_s.get(name, 0.0) + time.monotonic() - started
