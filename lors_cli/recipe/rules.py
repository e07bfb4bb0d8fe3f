"""The rules between a recipe's keys: a table a section, of `(key, is_broken, message, rule)`.

`is_broken` gives something true for a config that breaks the rule. The message is a template in which `c` is that
config and `found` is what `is_broken` gave; `key` is the setting that it speaks of, "" for the section as a whole.
`rule` is what docs/recipe.md says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

Rule = tuple[str, Callable[[Any], Any], str, str]
OWL_SPREAD = 0.08
"""How far the sparsity of a block may lie from the model's (OWL's λ)."""
LEAST_ZEROS = 0.25
"""Share of a weight that is zero, below which it is not packed: it would hardly be smaller."""


def broken(config: Any) -> Iterator[tuple[str, str]]:
    """The key and the message of every rule that a config of the recipe breaks."""
    for key, is_broken, message, _ in RULES.get(type(config).__name__, ()):
        found = is_broken(config)
        if found:
            yield key, message.format(c=config, found=found)


def _blind(c: Any) -> bool:
    """Whether pruning looks at no inputs."""
    return bool(c.method == "magnitude" and not (c.refit or c.quantize))


def implied_sparsity(pattern: str) -> float | None:
    """The sparsity that N:M has; None when it keeps nothing or prunes nothing, and for unstructured."""
    if pattern == "unstructured":
        return None
    n, m = (int(part) for part in pattern.split(":"))
    return 1 - n / m if 0 < n < m else None


def _contradicted_sparsity(c: Any) -> float | None:
    """The sparsity that the pattern has, when another is given."""
    implied = implied_sparsity(c.pattern)
    agrees = implied is None or c.sparsity is None or math.isclose(c.sparsity, implied, abs_tol=1e-9)
    return None if agrees else implied


def _above_peak(c: Any) -> str | None:
    """The peak of the learning rate, when its floor is above it."""
    if c.min_learning_rate <= c.peak_learning_rate:
        return None
    return f"{c.peak_learning_rate:g}" + ("" if c.learning_rate is not None else f", the default of method: {c.method}")


def _not_shardable(c: Any) -> str | None:
    """What needs whole weights, when they are sharded."""
    whole = {"init": "gradient-exact", "base": "packed", "merged_cache": "on"} if c.parallelism == "fsdp" else {}
    return next((f"{key}: {value}" for key, value in whole.items() if getattr(c, key) == value), None)


def _without_val_size(c: Any) -> str | None:
    """The first setting that is about held-out losses, where there are none."""
    about = ("eval_steps", "early_stopping_patience", "load_best_model_at_end") if c.val_size is None else ()
    return next((key for key in about if getattr(c, key)), None)


def _no_share_left(c: Any) -> float:
    """The weights of a mix together, when they leave nothing for the first source."""
    total = sum(part.weight for part in c.mix or () if isinstance(part.weight, (int, float)))
    return float(total) if total >= 1 - 1e-9 else 0.0


def _twice(values: Any) -> str:
    """The values that are listed more than once."""
    return ", ".join(sorted({value for value in values or () if values.count(value) > 1}))


def _not_made(c: Any) -> str | None:
    """Which models are evaluated without being made, and which there are."""
    missing = [role for role in dict.fromkeys((c.eval and c.eval.models) or ()) if role not in c.roles()]
    if not missing:
        return None
    return f"{', '.join(missing)} is not made by this recipe, which has {', '.join(c.roles())}"


def _too_few_zeros(c: Any) -> float | None:
    """The sparsity that a model has before it is packed, where that is too low for any of its weights."""
    if not (c.pack and c.prune) or c.prune.layer_sparsity != "uniform":  # owl gives some blocks more
        return None
    if c.prune.quantize and (c.tune is None or c.tune.quantization_aware):  # codes, however few zeros there are
        return None
    sparsity = c.prune.sparsity or implied_sparsity(c.prune.pattern)
    return sparsity if sparsity is not None and sparsity < LEAST_ZEROS else None


def _no_row(c: Any) -> bool:
    """Whether columns make no kind of row, or several."""
    given = set(c.names)
    kinds = ("text",), ("messages", "system"), ("instruction", "output", "input", "system", "history")
    needed = {"text"}, {"messages"}, {"instruction", "output"}
    return not any(least <= given <= set(most) for least, most in zip(needed, kinds, strict=True))


RULES: dict[str, tuple[Rule, ...]] = {
    "Recipe": (
        ("", lambda c: not (c.prune or c.tune or c.pack or c.eval),
         "there is no stage: give at least one of prune, tune, pack, eval",
         "At least one of `prune`, `tune`, `pack` and `eval` is there. A stage without settings is `prune: {}`."),
        ("eval.models", _not_made, "{found}",
         "`eval.models` names only models that the recipe makes."),
        ("tune.quantization_aware",
         lambda c: c.tune and c.tune.quantization_aware and c.prune and not c.prune.quantize,
         "it keeps the weights on the grid that prune.quantize puts them on, and prune has no quantize",
         "`tune.quantization_aware` needs a base with a grid: `prune.quantize` where the recipe prunes."),
        ("prune.reconstruct_epochs",
         lambda c: c.prune and c.prune.reconstruct_epochs and c.model.dtype == "float16",
         "gradients do not fit into float16; set model.dtype: bfloat16",
         "`prune.reconstruct_epochs` needs a `model.dtype` other than `float16`."),
        ("pack", lambda c: c.pack and c.tune and c.tune.method == "lora" and not c.tune.skip,
         "tune.method: lora fills the zeros when it is merged, and a dense model cannot be packed",
         "`pack` is not for `tune.method: lora`, which fills the zeros of all layers but those of `tune.skip`."),
        ("pack", _too_few_zeros,
         f"it needs {LEAST_ZEROS:.0%} of zeros, and prune makes {{found:g}} of the weights zero",
         f"`pack` needs {LEAST_ZEROS:.0%} of zeros where `prune` makes them, or the codes of `prune.quantize`."),
    ),
    "ColumnsConfig": (
        ("", _no_row, "columns must be text, or messages (and system), or instruction and output (and input, system, "
         "history)",
         "`text`, or `messages` (and `system`), or `instruction` and `output` (and `input`, `system`, `history`)."),
    ),
    "QuantizeConfig": (
        ("symmetric", lambda c: c.bits == 8 and not c.symmetric,
         "8 bits are symmetric: bfloat16 could not tell the values of other grids apart; leave it out",
         "`symmetric: false` needs `bits: 4`."),
    ),
    "PruneConfig": (
        ("true_sequential", lambda c: c.true_sequential and _blind(c),
         "magnitude looks at no inputs; choose another method",
         "`true_sequential` needs a method that looks at inputs: not `magnitude`, unless `refit` or `quantize` is on."),
        ("layer_sparsity",
         lambda c: c.layer_sparsity == "owl" and (c.pattern != "unstructured" or c.method == "magnitude"),
         "owl needs pattern: unstructured and a method that looks at inputs",
         "`layer_sparsity: owl` needs `pattern: unstructured` and a method other than `magnitude`."),
        ("sparsity",
         lambda c: c.layer_sparsity == "owl" and c.sparsity and not OWL_SPREAD < c.sparsity < 1 - OWL_SPREAD,
         f"owl lets blocks have {OWL_SPREAD} less and more than {{c.sparsity:g}}, which must stay between 0 and 1",
         f"`layer_sparsity: owl` needs a `sparsity` above {OWL_SPREAD} and below {1 - OWL_SPREAD}."),
        ("reconstruct_epochs", lambda c: c.reconstruct_epochs and _blind(c),
         "magnitude takes no calibration samples; choose another method",
         "`reconstruct_epochs` needs calibration samples: not `magnitude`, unless `refit` or `quantize` is on."),
        ("reconstruct_batch_size", lambda c: c.reconstruct_batch_size > 1 and not c.reconstruct_epochs,
         "nothing is reconstructed; give reconstruct_epochs",
         "`reconstruct_batch_size` needs `reconstruct_epochs`."),
        ("channel_permutation", lambda c: c.channel_permutation and c.pattern == "unstructured",
         "groups of M are what it fills; it needs a pattern N:M",
         "`channel_permutation` needs a pattern N:M."),
        ("pattern", lambda c: c.pattern == "unstructured" and c.sparsity is None,
         "unstructured needs a sparsity, for example sparsity: 0.5",
         "`pattern: unstructured` needs `sparsity`."),
        ("pattern", lambda c: c.pattern != "unstructured" and implied_sparsity(c.pattern) is None,
         "{c.pattern} keeps nothing or prunes nothing; N:M needs 0 < N < M",
         "N:M needs 0 < N < M, and M divides the inputs of every pruned weight."),
        ("sparsity", _contradicted_sparsity,
         "{c.sparsity} contradicts pattern: {c.pattern}, which is {found:g}; leave it out",
         "`sparsity` beside N:M is 1 − N/M, or left out."),
    ),
    "TuneDataConfig": (
        ("mix", _no_share_left, "the weights add up to {found:g}, which leaves nothing for dataset: {c.dataset}",
         "The weights of a `mix` add up to less than 1; `dataset` has the rest."),
        ("mix", lambda c: c.mix and _twice([c.dataset, *(str(part.dataset) for part in c.mix)]),
         "{found} is listed twice; dataset is among the sources that are mixed",
         "A `mix` names no source twice, `dataset` included."),
    ),
    "TuneConfig": (
        ("init", lambda c: c.start != "kaiming" and c.method.removesuffix("-gc") in ("spp", "hira"),
         "{c.init} is for additive updates, and {c.method} multiplies the weight",
         "`init` other than `kaiming` is for additive updates: not for `spp`, `hira` and their `-gc`."),
        ("gradient", lambda c: c.gradient != "approximate" and c.method != "lors",
         "{c.gradient} is for method: lors, and the gradients of {c.method} are exact as they are",
         "`gradient` other than `approximate` is for `lors`: the others' gradients are exact."),
        ("merged_cache", lambda c: c.merged_cache == "on" and c.method != "lors",
         "it is for method: lors, and method is {c.method}",
         "`merged_cache: on` is for `lors`."),
        ("rounding", lambda c: c.rounding == "stochastic" and c.method != "lors" and not c.quantization_aware,
         "stochastic is for method: lors, and method is {c.method}",
         "`rounding: stochastic` is for `lors`, and for `quantization_aware`."),
        ("quantization_aware",
         lambda c: c.quantization_aware and c.method.removesuffix("-gc") not in ("lors", "sqft"),
         "it is for method: lors and sqft, and method is {c.method}",
         "`quantization_aware` is for `lors` and `sqft`, on a base with a grid."),
        ("base", lambda c: c.base == "packed" and c.method != "lors",
         "packed is for method: lors, and method is {c.method}",
         "`base: packed` is for `lors`."),
        ("parallelism", _not_shardable, "fsdp shards the weights, and {found} needs them whole",
         "`parallelism: fsdp` excludes `init: gradient-exact`, `base: packed` and `merged_cache: on`."),
        ("train_norms", lambda c: c.train_norms and c.method == "lora",
         "PEFT's LoRA files have no place for trained norms; choose another method",
         "`train_norms` is not for `lora`."),
        ("norms_lr_ratio", lambda c: c.norms_lr_ratio != 1.0 and not c.train_norms, "it is for train_norms: true",
         "`norms_lr_ratio` is for `train_norms: true`."),
        ("max_tokens", lambda c: c.max_tokens is not None and c.max_steps is not None,
         "max_steps says how long to train too; give one of them",
         "`max_tokens` excludes `max_steps`."),
        ("max_tokens", lambda c: c.max_tokens is not None and c.data.stream == "off",
         "it counts streamed text, and data.stream is off",
         "`max_tokens` needs streamed text: not `data.stream: off`."),
        ("data.mix", lambda c: c.data.mix and c.max_steps is None,
         "it needs max_steps: sources of different length have no epochs in common",
         "`data.mix` needs `max_steps`; a source that ends before starts again, shuffled anew."),
        ("min_learning_rate", _above_peak, "{c.min_learning_rate:g} is above learning_rate: {found}",
         "`min_learning_rate` is at most `learning_rate`, or what the method implies for it."),
        ("min_learning_rate", lambda c: c.min_learning_rate and c.lr_schedule == "constant",
         "it is the floor of a rate that falls, and lr_schedule is constant",
         "`min_learning_rate` is for `lr_schedule: cosine` and `linear`."),
        ("warmup_steps", lambda c: c.max_steps is not None and c.warmup_steps >= c.max_steps,
         "the learning rate never reaches its peak: max_steps is {c.max_steps}",
         "`warmup_steps` is below `max_steps`."),
        ("val_size", lambda c: c.val_size is not None and c.val_size > 1 and c.val_size % 1,
         "{c.val_size:g} is neither a number of samples nor a share below 1",
         "`val_size` is a whole number of samples, or a share below 1."),
        ("eval_steps", _without_val_size, "{found} needs val_size, the samples to hold out",
         "`eval_steps`, `early_stopping_patience` and `load_best_model_at_end` need `val_size`."),
        ("adam_betas", lambda c: c.adam_betas is not None and len(c.adam_betas) != 2,
         "must be two numbers, such as [0.9, 0.999]",
         "`adam_betas` is two numbers."),
        ("report_to", lambda c: _twice(c.report_to), "{found} is listed twice",
         "Nothing is listed twice in `report_to`."),
        ("batch_size", lambda c: c.per_device_batch_size is not None and c.batch_size % c.per_device_batch_size,
         "{c.batch_size} is not a multiple of per_device_batch_size: {c.per_device_batch_size}",
         "`batch_size` is a multiple of `per_device_batch_size`."),
    ),
    "EvalConfig": (
        ("models", lambda c: _twice(c.models), "{found} is listed twice",
         "Nothing is listed twice in `models`, `tasks` or `perplexity`."),
        ("tasks", lambda c: _twice(c.tasks), "{found} is listed twice",
         "Nothing is listed twice in `models`, `tasks` or `perplexity`."),
        ("perplexity", lambda c: _twice(c.perplexity), "{found} is listed twice",
         "Nothing is listed twice in `models`, `tasks` or `perplexity`."),
        ("limit", lambda c: c.limit is not None and c.limit > 1 and c.limit % 1,
         "{c.limit:g} is neither a whole number of documents nor a share below 1",
         "`limit` is a whole number, or a share below 1."),
        ("fewshot_as_multiturn", lambda c: c.fewshot_as_multiturn and not c.apply_chat_template,
         "it needs apply_chat_template: true",
         "`fewshot_as_multiturn` needs `apply_chat_template: true`."),
        ("", lambda c: not c.tasks and not c.perplexity,
         "neither tasks nor perplexity is given: there is nothing to evaluate",
         "`tasks` or `perplexity` names something."),
    ),
}  # fmt: skip
