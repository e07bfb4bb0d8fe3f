"""The schema of a recipe: one frozen dataclass a stage.

A recipe is read by `lors_cli.recipe.loading`, which checks types, ranges and unknown keys with pydantic. Built from
Python, the classes check the same themselves (`section`). Every stage function takes its own stage's config and
paths, never the whole recipe, so each works alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lors_cli.recipe.columns import ColumnsConfig as ColumnsConfig
from lors_cli.recipe.columns import Name, Seed
from lors_cli.recipe.evaluation import SEVEN_TASKS as SEVEN_TASKS
from lors_cli.recipe.evaluation import EvalConfig as EvalConfig
from lors_cli.recipe.evaluation import ModelRole as ModelRole
from lors_cli.recipe.packing import PackConfig as PackConfig
from lors_cli.recipe.pruning import CalibrationConfig as CalibrationConfig
from lors_cli.recipe.pruning import PruneConfig as PruneConfig
from lors_cli.recipe.pruning import QuantizeConfig as QuantizeConfig
from lors_cli.recipe.section import Section
from lors_cli.recipe.tuning import DistillConfig as DistillConfig
from lors_cli.recipe.tuning import MixConfig as MixConfig
from lors_cli.recipe.tuning import TeacherCacheConfig as TeacherCacheConfig
from lors_cli.recipe.tuning import TuneConfig as TuneConfig
from lors_cli.recipe.tuning import TuneDataConfig as TuneDataConfig
from lors_cli.recipe.tuning import TuneMethod as TuneMethod

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model that the pipeline starts from."""

    path: Name
    """Hub id, folder, .gguf file, or package://module/file.gguf."""
    dtype: Dtype = "auto"
    """Number format of the weights. auto: the checkpoint's own (bfloat16 for a .gguf); on a CPU bfloat16 for float16,
    and float32 where it has no bfloat16 instructions."""
    revision: Name = "main"
    """Branch, tag or commit on the hub."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto: the first GPU, else the CPU. Not part of a stage's fingerprint."""
    add_bos_token: bool | None = None
    """Whether the tokenizer puts its BOS token before a text: before prompts of tasks, instructions and isolated
    texts; if true also before each window of a perplexity. Calibration and concatenated text are cut from running
    text, without. Default: as the tokenizer has it. Gemma needs true where its tokenizer adds none."""

    @classmethod
    def of(cls, model: ModelConfig | str | Path) -> ModelConfig:
        """The model that is meant: settings as they are, or those of a folder or hub id."""
        return model if isinstance(model, ModelConfig) else cls(path=str(model))


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
    pack: PackConfig | None = None
    """The last of these models in a packed copy."""
    eval: EvalConfig | None = None
    """Scores of the models there are."""
    data_dir: Name | None = None
    """Folder with local copies of the datasets; default $LORS_DATA_DIR, else the hub."""
    seed: Seed = 0
    """Seed of every stage that does not set its own; given later than the file, on the command line or by a sweep, also
    of those that the file gives one."""
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
            given = tune.distill.revision
            revision = self.model.revision if given == DistillConfig.revision else given
            tune = replace(tune, distill=replace(tune.distill, teacher=self.model.path, revision=revision))
        if evaluation and evaluation.models is None:
            evaluation = replace(evaluation, models=self.roles())
        changed = tune is not self.tune or evaluation is not self.eval
        return replace(self, tune=tune, eval=evaluation) if changed else self


STAGES = ("prune", "tune", "pack", "eval")
STAGE_CONFIGS: dict[str, Any] = {"prune": PruneConfig, "tune": TuneConfig, "pack": PackConfig, "eval": EvalConfig}
