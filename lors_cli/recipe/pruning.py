"""The settings of `prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from lors_cli.recipe.columns import ColumnsConfig, Name, NotNegative, Positive, Seed
from lors_cli.recipe.section import Section


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Section):
    """The text that shows the pruner what the inputs of each layer look like."""

    dataset: Name = "c4"
    """alpaca, c4, pydoc, slimpajama, wikitext2, a file (.jsonl .json .csv .parquet .txt …; tokens: .safetensors), or a
    dataset on the hub (org/name, org/name:configuration@revision)."""
    split: Name = "train"
    """Of a dataset; a file has no other."""
    columns: ColumnsConfig | None = None
    """What the columns of a file or dataset are called, where they are not found or several would do; others are not
    looked at."""
    num_samples: Positive | None = None
    """Sequences. Default 128; a pre-tokenised file is used whole."""
    sequence_length: Positive | None = None
    """Tokens a sequence. Default 2048 or the model's limit; a pre-tokenised file is used whole."""
    batch_size: Positive = 8
    """Sequences a forward pass; where blocks are reconstructed that is `reconstruct_batch_size`."""
    offload: Literal["auto", "device", "cpu", "disk"] = "auto"
    """Where hidden states are kept between blocks. auto: on the device if they take at most half of its free memory,
    else in CPU memory, else on disk. Not part of a stage's fingerprint."""
    seed: Seed = 0
    """Of the choice of sequences. Default: the recipe's."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Section):
    """Kept weights rounded to few values while others are removed, so that `lors pack` needs few bits for them."""

    bits: Literal[4, 8] = 4
    """Of a kept weight's code; a group of weights takes 2^bits values at most."""
    group_size: Literal[32, 64, 128] = 128
    """Consecutive inputs of a row that share a scale, whatever is kept of them."""
    symmetric: bool = True
    """The values of a group lie around 0 alike. false: it has a zero point of its own (8 bits more a group)."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Section):
    """Which weights to remove, and how the rest makes up for them."""

    method: Literal["magnitude", "wanda", "sparsegpt", "ria", "admm"] = "sparsegpt"
    """How the weights to remove are chosen; sparsegpt and admm also move the kept ones (docs/pruning.md)."""
    pattern: Annotated[str, Field(pattern=r"^(unstructured|[0-9]{1,4}:[0-9]{1,4})$")] = "2:4"
    """N:M keeps at most N of every M consecutive inputs of a row; unstructured needs `sparsity`."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of weights set to zero; with N:M it may be left out."""
    refit: bool = False
    """Solve for the kept weights anew on the mask that the method chose (least squares on the layer's outputs)."""
    reconstruct_epochs: NotNegative = 0
    """Passes over the calibration samples in which the kept weights of each block are then tuned by gradients to give
    what the block gives in the dense model (EBFT, arXiv:2402.12419). The best recovery without training, and the
    slowest."""
    reconstruct_batch_size: Positive = 1
    """Calibration samples in one step of these, which several processes share. More give fewer and larger steps."""
    true_sequential: bool | None = None
    """Prune each group of linears (q/k/v, o, gate/up, down) on inputs from the already pruned ones before it, in one
    pass of each block, and not the whole block on its dense inputs in two. Faster and mostly better, at the price of
    holding the activations of all samples inside a block. Default: on for admm, off for the others, as their papers'
    codes do it."""
    channel_permutation: bool = False
    """N:M only: first reorder the inputs of down_proj and o_proj (with the rows that make them) so that the largest
    scores share fewer groups; the dense model's function stays."""
    layer_sparsity: Literal["uniform", "owl"] = "uniform"
    """Unstructured only: the same sparsity for every block, or less for blocks with many outliers (OWL)."""
    quantize: QuantizeConfig | None = None
    """Round the kept weights to 4 or 8 bits as well: sparsegpt finds mask and rounded weights in one sweep; admm rounds
    in every iteration, solves for what its mask keeps and rounds that; the others choose the mask, and GPTQ
    (arXiv:2210.17323) rounds what is kept. With `refit` sparsegpt takes the mask that it finds without rounding, and
    admm does what it does without. Default: weights stay floats."""
    skip: tuple[Name, ...] = ()
    """Weights that stay dense: full names, or globs of them such as `model.layers.0.*` and `*.down_proj`. The sparsity
    asked for is that of the others."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Which text, and how much of it."""

    @property
    def sequential(self) -> bool:
        """Whether groups are pruned one after the other (`true_sequential`, or what the method implies)."""
        if self.method == "magnitude" and not (self.refit or self.quantize):
            return False
        return self.method == "admm" if self.true_sequential is None else self.true_sequential
