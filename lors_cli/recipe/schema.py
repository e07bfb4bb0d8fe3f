"""The schema of a recipe: one frozen dataclass a stage.

A recipe is read by `lors_cli.recipe.loading`, which checks types, ranges and unknown keys with pydantic. Built from
Python, the classes check only the rules between their keys. Every stage function takes its own stage's config and
paths, never the whole recipe, so each works alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lors_cli.recipe.columns import ColumnsConfig, Name, NotNegative, Positive, Rate, Seed
from lors_cli.recipe.rules import Section

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
ModelRole = Literal["dense", "pruned", "tuned"]
TuneMethod = Literal["lors", "sqft", "sqft-gc", "spp", "spp-gc", "hira", "lora"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
SEVEN_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")


def _whole(value: Any) -> Any:
    """0.5e9 as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model that the pipeline starts from."""

    path: Name
    """Hub id, folder, .gguf file, or package://module/file.gguf."""
    dtype: Dtype = "auto"
    """Number format of the weights. auto: the checkpoint's own (bfloat16 for a .gguf), float32 on a CPU that has
    no bfloat16 instructions."""
    revision: Name = "main"
    """Branch, tag or commit on the hub."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto: the first GPU, else the CPU. Not part of a stage's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Section):
    """The text that shows the pruner what the inputs of each layer look like."""

    dataset: Name = "c4"
    """alpaca, c4, pydoc, slimpajama, wikitext2, or a file (.jsonl .json .csv .parquet .txt …; tokens: .safetensors)."""
    columns: ColumnsConfig | None = None
    """What a file's columns are called, where they are not found or several would do; others are not looked at."""
    num_samples: Positive | None = None
    """Sequences. Default 128; a pre-tokenised file is used whole."""
    sequence_length: Positive | None = None
    """Tokens a sequence. Default 2048 or the model's limit; a pre-tokenised file is used whole."""
    batch_size: Positive = 8
    """Sequences a forward pass."""
    offload: Literal["auto", "device", "cpu", "disk"] = "auto"
    """Where hidden states are kept between blocks. auto: on the device if they take at most half of its free memory,
    else in CPU memory, else on disk. Not part of a stage's fingerprint."""
    seed: Seed = 0
    """Of the choice of sequences. Default: the recipe's."""


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
    the dense block's outputs (EBFT, arXiv:2402.12419). The best recovery without training, and the slowest."""
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
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Which text, and how much of it."""

    @property
    def sequential(self) -> bool:
        """Whether groups are pruned one after the other (`true_sequential`, or what the method implies)."""
        if self.method == "magnitude" and not self.refit:
            return False
        return self.method == "admm" if self.true_sequential is None else self.true_sequential


@dataclass(frozen=True, kw_only=True)
class TuneDataConfig(Section):
    """The text to tune on."""

    dataset: Name = "alpaca"
    """alpaca, c4, pydoc, slimpajama, wikitext2, or a file."""
    columns: ColumnsConfig | None = None
    """What a file's columns are called, where they are not found or several would do; others are not looked at."""
    max_length: Positive = 512
    """Tokens a sample: instructions are cut there, text is packed to it."""
    num_samples: Positive | None = None
    """At most so many samples; default: all of them (streamed text: as many as the steps need)."""
    template: Literal["alpaca", "alpaca_short", "vicuna", "chat"] = "alpaca"
    """What an instruction is written into: Stanford Alpaca's prompt, alpaca-lora's short one, Vicuna's, or chat, the
    tokenizer's own chat template."""
    train_on_prompt: bool = False
    """Instructions: learn the prompt's tokens too, not the response alone."""
    packing: Literal["concatenated", "isolated", "separate"] | None = None
    """How texts share a sample. concatenated: one after the other, each seeing those before it. isolated: positions
    start anew with each text and none sees another; instructions can be packed so too, whole, several a sample.
    separate: one a sample, instructions alone. Default: text concatenated, instructions separate."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Tokenise text in the background while it is trained on, with a cache on disk, instead of all of it before.
    auto: on for text from the hub, local files above 64 MiB, and max_tokens."""
    shuffle_buffer: Positive = 4096
    """Streamed text: so many consecutive packed samples are shuffled together."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """Learning from the dense model's predictions beside the labels; it is held in memory too."""

    teacher: Name | None = None
    """The dense model, with the same vocabulary. Default: the one that the sparse model was pruned from."""
    revision: Name = "main"
    """Branch, tag or commit of the teacher on the hub."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the divergence from the teacher in the loss; the rest is cross-entropy with the labels."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of both softmaxes (arXiv:1503.02531)."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Section):
    """Recovery training that keeps the zeros."""

    method: TuneMethod = "lors"
    """lors, or what it is compared with: sqft, spp (both also -gc: their layers computed again in backward), hira, and
    lora, whose merge fills the zeros."""
    rank: Positive = 16
    """Inner size of lora_B·lora_A. spp: a divisor of every layer's outputs."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """Numerator of the update's scale."""
    use_rslora: bool = True
    """Scale the update by alpha/sqrt(rank), as the LoRS authors run it (rsLoRA, arXiv:2312.03732), else alpha/rank."""
    init: Literal["gradient", "gradient-exact", "kaiming"] | None = None
    """Start lora_A from the loss gradient's right singular vectors (gradient: from sketches of it, in one pass over the
    samples; gradient-exact: from the gradient itself, in a pass for every eighth of the layers), or from a
    Kaiming-uniform draw. Default: gradient for lors, kaiming for the others, as their authors have it."""
    init_samples: Positive = 8
    """Samples the gradient is summed over."""
    rounding: Literal["nearest", "stochastic"] | None = None
    """How merged weights are rounded to bfloat16. nearest loses updates below half of bfloat16's step; stochastic keeps
    them on average, by a threshold for each weight that is fixed by its place. Default: stochastic for lors; the others
    have nearest alone."""
    merged_cache: Literal["auto", "off", "on"] = "auto"
    """lors: keep every merged weight while its adapters are unchanged (from the forward pass to the backward pass, and
    over the micro-batches of a step), or build it anew for each use. auto: on if that takes at most a quarter of the
    free memory. Not part of a stage's fingerprint."""
    base: Literal["plain", "compressed"] = "plain"
    """lors: hold the sparse weights as they are, or, of 2:4 weights, only the kept values and their positions (9/16 of
    the memory in bfloat16, the same results; without a CUDA GPU each is restored before it is merged, which takes
    longer). Not part of a stage's fingerprint."""
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    """Which text, and how much of it."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    """Peak of the cosine schedule. Scale times rate acts as one knob: each method needs its own."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Learning rate of lora_B over that of lora_A, which is learning_rate (LoRA+, arXiv:2402.12354)."""
    train_norms: bool = False
    """Train the parameters of normalisation layers too, in float32 (PERP, arXiv:2312.15230); not for lora, whose
    adapter files have no place for them."""
    norms_lr_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Learning rate of the norms over learning_rate; a parameter's steps are in units of its root mean square."""
    distill: DistillConfig | None = None
    """Learn from the dense model's predictions too."""
    min_learning_rate: Rate = 0.0
    """Floor of the cosine schedule; lora_B's is loraplus_lr_ratio times it."""
    warmup_steps: NotNegative = 0
    """Optimiser steps in which the learning rate rises to its peak."""
    weight_decay: Rate = 0.0
    """AdamW's, on the adapters."""
    max_grad_norm: Rate = 1.0
    """Clip the gradient's norm to this; 0 turns clipping off."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """Passes over the data."""
    max_steps: Positive | None = None
    """Optimiser steps; overrides epochs."""
    max_tokens: Annotated[int, BeforeValidator(_whole), Field(gt=1)] | None = None
    """Tokens of streamed text to train on, such as 0.5e9, exactly: the last sample and the last step are cut to it.
    Overrides epochs."""
    batch_size: Positive = 32
    """Samples an optimiser step, over all devices and accumulation."""
    per_device_batch_size: Positive | None = None
    """Samples a forward pass. Default: the largest divisor of batch_size up to 4."""
    gradient_checkpointing: bool = False
    """Compute each decoder block again in backward instead of keeping its activations."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (`--nproc`, torchrun) hold the model. ddp: each the whole of it. fsdp: each a shard of
    every decoder block's frozen weights, gathered block by block when they are used. Not part of a stage's
    fingerprint."""
    save_steps: Positive = 100
    """Optimiser steps between training checkpoints."""
    keep_checkpoints: Positive = 2
    """So many of the newest training checkpoints stay on disk."""
    max_bad_steps: NotNegative = 0
    """Optimiser steps of the whole run that may be bad, their loss or gradient not finite: such a step changes no
    weight, and the run goes on with the next samples. One more ends it, with the last checkpoint kept. Not part of a
    stage's fingerprint: a run that was ended goes on with a higher one."""
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A step is bad too if its loss or its gradient's norm is above so many times its median over the last 50 good
    steps (from the tenth on). Default: only what is not finite is bad."""
    tensorboard: bool = False
    """Write TensorBoard events to tune/tensorboard too (needs the tensorboard package)."""
    seed: Seed = 0
    """Of the samples' order and of the adapters' start. Default: the recipe's."""

    @property
    def start(self) -> Literal["gradient", "gradient-exact", "kaiming"]:
        """How lora_A starts: `init`, or what the method implies."""
        return self.init or ("gradient" if self.method == "lors" else "kaiming")

    @property
    def weight_rounding(self) -> Literal["nearest", "stochastic"]:
        """How merged weights are rounded to bfloat16: `rounding`, or what the method implies."""
        return self.rounding or ("stochastic" if self.method == "lors" else "nearest")

    @property
    def scale(self) -> float:
        """The factor s of the update s·lora_B·lora_A."""
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank

    @property
    def micro_batch_size(self) -> int:
        """Samples a forward pass."""
        if self.per_device_batch_size is not None:
            return self.per_device_batch_size
        return max(size for size in range(1, min(4, self.batch_size) + 1) if self.batch_size % size == 0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Zero-shot tasks and perplexities to measure."""

    models: Annotated[tuple[ModelRole, ...], Field(min_length=1)] | None = None
    """Which of dense, pruned, tuned. Default: those that the recipe makes."""
    tasks: tuple[Name, ...] = SEVEN_TASKS
    """Names of lm-evaluation-harness tasks, or pydoc_choice."""
    perplexity: tuple[Name, ...] = ()
    """Texts for token perplexity: wikitext2 (the papers' join), wikitext2-lines, pydoc, c4, slimpajama, or a file."""
    limit: Positive | None = None
    """At most so many documents a task."""
    batch_size: Positive = 8
    """Sequences a forward pass; of choices that share their context, as many as have no more tokens than so many of
    the longest sequence. Scores move slightly with it, so it is part of the results' fingerprint."""
    perplexity_windows: Positive | None = None
    """At most so many windows of each text."""
    perplexity_length: Positive | None = None
    """Tokens a window. Default 2048 or the model's limit."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A whole pipeline; a stage that is left out is not run."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the run folder, runs/<name>, unless --out is given."""
    model: ModelConfig
    """What is pruned; without `prune`, what is tuned or scored."""
    prune: PruneConfig | None = None
    """Dense to sparse."""
    tune: TuneConfig | None = None
    """Sparse to recovered, zeros kept."""
    eval: EvalConfig | None = None
    """Scores of the models there are."""
    data_dir: Name | None = None
    """Folder with local copies of the datasets; default $LORS_DATA_DIR, else the hub."""
    seed: Seed = 0
    """Seed of every stage that does not set its own."""
    deterministic: bool = False
    """Take only operations that give the same bits each time (docs/reproducibility.md). On a CPU whose number of
    threads stays the same they do so without it; on a GPU it costs some speed. Not part of a stage's fingerprint."""

    def roles(self) -> tuple[ModelRole, ...]:
        """The models that exist once the recipe has run."""
        made: list[ModelRole] = ["dense"]
        if self.prune:
            made.append("pruned")
        if self.tune:
            made.append("tuned")
        return tuple(made)

    def with_defaults(self) -> Recipe:
        """The recipe with what follows between its stages filled in: what is run and hashed."""
        tune, evaluation = self.tune, self.eval
        if tune and tune.distill and tune.distill.teacher is None and self.prune:
            distill = replace(tune.distill, teacher=self.model.path, revision=self.model.revision)
            tune = replace(tune, distill=distill)
        if evaluation and evaluation.models is None:
            evaluation = replace(evaluation, models=self.roles())
        changed = tune is not self.tune or evaluation is not self.eval
        return replace(self, tune=tune, eval=evaluation) if changed else self


STAGES = ("prune", "tune", "eval")
STAGE_CONFIGS: dict[str, Any] = {"prune": PruneConfig, "tune": TuneConfig, "eval": EvalConfig}
