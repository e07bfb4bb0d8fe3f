"""The settings of `tune`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from lors_cli.errors import UsageError
from lors_cli.recipe.columns import ColumnsConfig, Name, NotNegative, Positive, Rate, Seed
from lors_cli.recipe.section import Section

TuneMethod = Literal["lors", "sqft", "sqft-gc", "spp", "spp-gc", "hira", "hira-gc", "lora"]
Template = Literal["alpaca", "alpaca_short", "vicuna", "chat"]
Packing = Literal["concatenated", "isolated", "separate"]
Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]
RATES = {"lors": 3e-3, "sqft": 3e-3, "spp": 3e-2, "hira": 1e-2, "lora": 3e-3}
GRADIENT_RATE = 1e-3
"""Learning rates that are taken where none is given: by method from a random start, and from the gradient's directions.
Found on SmolLM2-135M at a scale of 4 (docs/tuning.md)."""


def data_name(data: Mapping[str, Any]) -> str | None:
    """The source in a `data` section's plain values; of several `slimpajama 70 %, alpaca 30 %`."""
    mix = data.get("mix") or ()
    if not mix:
        return data.get("dataset")
    shares = [(data.get("dataset"), 1 - sum(part["weight"] for part in mix))]
    shares += [(part["dataset"], part["weight"]) for part in mix]
    return ", ".join(f"{name} {100 * share:.3g} %" for name, share in shares)


def _whole(value: Any) -> Any:
    """0.5e9 as the whole number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, kw_only=True)
class MixConfig(Section):
    """A further source, mixed into the text to tune on. What it does not say is as by default, not as in `data`."""

    dataset: Name
    """As `data.dataset`; a mix names each once."""
    weight: Annotated[float, Field(gt=0, lt=1)]
    """Share of all samples (not of tokens) that are of this source."""
    split: Name = "train"
    """Of a dataset; a file has no other."""
    columns: ColumnsConfig | None = None
    """What the columns of a file or dataset are called, where they are not found or several would do."""
    num_samples: Positive | None = None
    """At most so many samples; default: all of them."""
    template: Template = "alpaca"
    """What an instruction is written into."""
    train_on_prompt: bool = False
    """Instructions: learn the prompt's tokens too."""
    packing: Packing | None = None
    """How texts share a sample. Default: text concatenated, instructions separate."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Tokenise text in the background while it is trained on."""


@dataclass(frozen=True, kw_only=True)
class TuneDataConfig(Section):
    """The text to tune on."""

    dataset: Name = "alpaca"
    """alpaca, c4, pydoc, slimpajama, wikitext2, a file, or a dataset on the hub (org/name,
    org/name:configuration@revision)."""
    split: Name = "train"
    """Of a dataset; a file has no other."""
    columns: ColumnsConfig | None = None
    """What the columns of a file or dataset are called, where they are not found or several would do; others are not
    looked at."""
    max_length: Positive = 512
    """Tokens a sample: instructions are cut there, text is packed to it."""
    num_samples: Positive | None = None
    """At most so many samples; default: all of them (streamed text: as many as the steps need)."""
    template: Template = "alpaca"
    """What an instruction is written into: Stanford Alpaca's prompt, alpaca-lora's short one, Vicuna's, or chat, the
    tokenizer's own chat template."""
    train_on_prompt: bool = False
    """Instructions: learn the prompt's tokens too, not the response alone."""
    packing: Packing | None = None
    """How texts share a sample. concatenated: one after the other, each seeing those before it. isolated: positions
    start anew with each text and none sees another; instructions can be packed so too, whole, several a sample.
    separate: one a sample, instructions alone. Default: text concatenated, instructions separate."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Tokenise text in the background while it is trained on, with a cache on disk, instead of all of it before.
    auto: on for text from the hub, local files above 64 MiB, and max_tokens."""
    shuffle_buffer: Positive = 4096
    """Streamed text: so many consecutive packed samples are shuffled together."""
    mix: tuple[MixConfig, ...] = ()
    """Further sources, each with its weight; dataset has the share that they leave."""

    @property
    def parts(self) -> tuple[tuple[float, TuneDataConfig], ...]:
        """Every source with its share of the samples: this one, then those that are mixed in."""
        own = replace(self, mix=()) if self.mix else self
        found = [(round(1 - sum(part.weight for part in self.mix), 12), own)]
        for part in self.mix:
            given = {entry.name: getattr(part, entry.name) for entry in fields(part) if entry.name != "weight"}
            found.append((float(part.weight), replace(own, **given)))
        return tuple(found)

    @property
    def is_isolated(self) -> bool:
        """Whether texts of a source share samples without seeing one another."""
        return any(part.packing == "isolated" for _, part in self.parts)


@dataclass(frozen=True, kw_only=True)
class TeacherCacheConfig(Section):
    """The teacher's likeliest tokens at every label, on disk: made once, and read in every epoch and by every run that
    takes the same samples, which need neither the teacher's memory nor its forward pass."""

    top_k: Positive = 64
    """Tokens a label; all others count as one, so that the divergence is at most that from all of the vocabulary."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the logarithms of their probabilities."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """Learning from the dense model's predictions beside the labels; it is held in memory too, unless cache is set."""

    teacher: Name | None = None
    """The dense model, with the same vocabulary. Default: the one that the sparse model was pruned from."""
    revision: Name = "main"
    """Branch, tag or commit of the teacher on the hub."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the divergence from the teacher in the loss; the rest is cross-entropy with the labels."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of both softmaxes (arXiv:1503.02531)."""
    cache: TeacherCacheConfig | None = None
    """Keep the teacher's predictions on disk, in $LORS_CACHE_DIR; `cache: {}` takes the defaults."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Section):
    """Recovery training that keeps the zeros."""

    method: TuneMethod = "lors"
    """lors, or what it is compared with: sqft, spp, hira (each also -gc: what it keeps of a layer beside its input is
    computed again in backward), and lora, whose merge fills the zeros."""
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
    """How merged weights are rounded to bfloat16, or with quantization_aware to their grid. nearest loses updates below
    half of a step; stochastic keeps them on average, by a threshold for each weight that is fixed by its place.
    Default: stochastic for lors and on a grid; the others have nearest alone."""
    quantization_aware: bool = False
    """lors and sqft, on a base that was pruned with prune.quantize: round merged weights to its grid, scales and zero
    points kept, so that the tuned model has the base's bits a weight, exactly as it was trained. Otherwise the tuned
    model's weights leave the grid, and take their number format's bits."""
    gradient: Literal["approximate", "exact", "rotating"] = "approximate"
    """lors: the adapters' gradients. approximate: the mask is left out of them, as in the paper. exact: it is in them,
    which is SQFT's mathematics at LoRS's memory, for one more product a layer. rotating: exact in every fourth layer,
    in the next step in those next to them."""
    merged_cache: Literal["auto", "off", "on"] = "auto"
    """lors: keep every merged weight while its adapters are unchanged (from the forward pass to the backward pass, and
    over the micro-batches of a step), or build it anew for each use. auto: on if that takes at most a quarter of the
    free memory. Not part of a stage's fingerprint."""
    base: Literal["plain", "packed"] = "plain"
    """lors: hold the sparse weights as they are, or packed, their kept values and a bit a place (at 50 % in bfloat16
    9/16 of the memory, the same results; the C kernel on a CPU, and for 2:4 the one on a GPU, reads them so, elsewhere
    each is unpacked before it is merged, which takes longer). Not part of a stage's fingerprint."""
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    """Which text, and how much of it."""
    skip: tuple[Name, ...] = ()
    """Pruned linears that get no adapter and stay as they are: full names, or globs of them such as `model.layers.0.*`
    and `*.down_proj`."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak of the schedule. Scale times rate acts as one knob: each method needs its own. Default: what a search found
    at a scale of 4, 3e-3 for lors, sqft and lora (1e-3 with init: gradient), 3e-2 for spp, 1e-2 for hira."""
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
    """Floor of a cosine or linear schedule; lora_B's is loraplus_lr_ratio times it."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after the warm-up: it falls to min_learning_rate along half a cosine or a line, or
    stays as it is."""
    warmup_steps: NotNegative = 0
    """Optimiser steps in which the learning rate rises from 0 to its peak. The first has rate 0, as in transformers;
    with warmup_steps: 1 the second has the peak."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.9, 0.999)
    """AdamW's decay of the mean gradient and of its mean square, a step, in 32 and in 8 bits. A lower first one follows
    the gradient sooner."""
    weight_decay: Rate = 0.0
    """AdamW's, on the adapters."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the optimiser's state in 8 bits, a quarter of the memory (arXiv:2110.02861; needs the
    bitsandbytes package; tensors below 4,096 numbers stay in 32 bits)."""
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
    weight, and training continues with the next samples. One more ends it, with the last checkpoint kept. Not part of a
    stage's fingerprint: a run that was ended resumes with a higher one."""
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A step is bad too if its loss or its gradient's norm is above so many times its median over the last 50 good
    steps (from the tenth on). As max_bad_steps is 0 by default, the first one then ends the run. Default: only what is
    not finite is bad."""
    val_size: Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_whole)] | None = None
    """Samples that are held out, or below 1 a share of them: never trained on, and their loss is measured during
    training. The same for every method, rank and seed. Default: none."""
    eval_steps: Positive | None = None
    """Optimiser steps between two held-out losses; there is one after the last step too. Default: a tenth of the
    run."""
    early_stopping_patience: Positive | None = None
    """End training after so many held-out losses in a row that are no better than the best before them. Default:
    train to the end."""
    load_best_model_at_end: bool | None = None
    """Merge the adapters of the step with the best held-out loss, not those of the last step; their checkpoint stays.
    Default: true with early_stopping_patience, else false."""
    report_to: tuple[Tracker, ...] = ()
    """Send the numbers of each step to these trackers too; each needs its package. Not part of a stage's
    fingerprint."""
    seed: Seed = 0
    """Of the samples' order and of the adapters' start. Default: the recipe's."""

    @property
    def start(self) -> Literal["gradient", "gradient-exact", "kaiming"]:
        """How lora_A starts: `init`, or what the method implies."""
        return self.init or ("gradient" if self.method == "lors" else "kaiming")

    @property
    def peak_learning_rate(self) -> float:
        """The schedule's peak: `learning_rate`, or what method and start imply."""
        if self.learning_rate is not None:
            return self.learning_rate
        method = self.method.removesuffix("-gc")
        if method not in RATES:
            raise UsageError(f"learning_rate: {method} has none of its own; give one.")
        return RATES[method] if self.start == "kaiming" else GRADIENT_RATE

    @property
    def weight_rounding(self) -> Literal["nearest", "stochastic"]:
        """How merged weights are rounded: `rounding`, or what the method or the grid implies."""
        return self.rounding or ("stochastic" if self.method == "lors" or self.quantization_aware else "nearest")

    @property
    def loads_best(self) -> bool:
        """Whether the merged model is that of the best held-out loss: `load_best_model_at_end`, or what is implied."""
        if self.load_best_model_at_end is None:
            return self.early_stopping_patience is not None
        return self.load_best_model_at_end

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
