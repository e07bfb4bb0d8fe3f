"""The merge of a model that was trained in shards: its base is read, merged and written block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lors_cli.grid import Grid
from lors_cli.models.blocks import block_weights
from lors_cli.models.loading import MAX_SHARD_SIZE
from lors_cli.models.streaming import BlockwiseModel
from lors_cli.models.tensor_files import Entry, Loader, write_checkpoint
from lors_cli.output import progress
from lors_cli.recipe.schema import TuneConfig
from lors_cli.sparsity import LayerSparsity, Pattern, measure
from lors_cli.tuning.attach import adapter_parameters, put_adapters
from lors_cli.tuning.merge import MergeCounts, merge_layer
from lors_cli.tuning.norms import trained_norms


class BlockMerge:
    """Merges what was trained into the blocks of its base, one at a time.

    Args:
        source: the base; no adapter is on it.
        trained: the model in shards.
        layers: full names of the adapted linears.
        grids: of the base, where it lies on such.
    """

    def __init__(
        self, config: TuneConfig, source: BlockwiseModel, trained: PreTrainedModel, layers: list[str],
        grids: Mapping[str, Grid],
    ) -> None:  # fmt: skip
        self.config, self.source, self.layers, self.grids = config, source, layers, grids
        self._counts: dict[int, MergeCounts] = {}
        self._trained, self._norms = adapter_parameters(trained), trained_norms(trained)
        self._measured: dict[str, LayerSparsity] = {}
        self._present = ExitStack()
        self._index: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def write(self, folder: Path, patterns: Mapping[str, Pattern | None]) -> list[LayerSparsity]:
        """The merged weights as a checkpoint's files; the sparsity of those that are named with what they keep to."""
        blocks = range(len(self.source.blocks))
        with progress.progress("merge", len(blocks), "blocks") as task, self._present, torch.no_grad():
            tensors: list[tuple[Entry, Loader]] = []
            tensors += [(entry, partial(self._outer, name)) for name, entry in self.source.outer_entries().items()]
            tensors += [each for index in blocks for each in self._entries(index, patterns, task)]
            write_checkpoint(folder, tensors, max_shard_size=MAX_SHARD_SIZE)
        return [self._measured[name] for name in patterns]

    @property
    def counts(self) -> MergeCounts:
        """Of all blocks that were merged."""
        return MergeCounts(**{key: sum(getattr(each, key) for each in self._counts.values())
                              for key in ("kept", "moved", "zeroed")})  # fmt: skip

    def _outer(self, name: str) -> torch.Tensor:
        tensor, norm = self.source.read(name), self._norms.get(name)
        return tensor if norm is None else norm(tensor.to(norm.shift.device))

    def _entries(
        self, index: int, patterns: Mapping[str, Pattern | None], task: progress.Task
    ) -> Iterator[tuple[Entry, Loader]]:
        def load(name: str) -> torch.Tensor:
            if self._index != index:
                self._merge(index, patterns)
                task.advance()
            return self._tensors[name]

        for name, tensor in self.source.checkpoint_tensors(index).items():
            yield Entry.of(name, tensor), partial(load, name)

    def _merge(self, index: int, patterns: Mapping[str, Pattern | None]) -> None:
        """Have one block merged, in place of the one before."""
        source, prefix = self.source, f"{self.source.prefix}.{index}"
        self._present.close()
        self._tensors = {}
        block = self._present.enter_context(source.block(index))
        counts = self._counts[index] = MergeCounts()
        layers = [name for name in self.layers if name.startswith(f"{prefix}.")]
        adapted = put_adapters(self.config, source.network, layers, self.grids, norms=False)
        for name, parameter in adapter_parameters(source.network).items():
            parameter.copy_(self._trained[name])
        for name, layer in adapted.items():
            merge_layer(source.network, name, layer, counts)
        for name, parameter in block.named_parameters(prefix=prefix):
            if name in self._norms:
                parameter.copy_(self._norms[name](parameter))
        for name, weight in block_weights(block, prefix).items():
            if name in patterns:
                self._measured[name] = measure(name, weight.matrix, patterns[name])
        self._index, self._tensors = index, source.checkpoint_tensors(index)
