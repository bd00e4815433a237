"""All settings with their defaults, units and checks; reading.py reads them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.runtime.errors import check
from lockstep.settings.agents import EnvSettings, PpoSettings
from lockstep.settings.data import DataSettings
from lockstep.settings.learning import GradientSettings, OptimizerSettings, PipelineSettings
from lockstep.settings.model import ModelSettings, VitSettings
from lockstep.settings.run import (
    CheckpointSettings,
    CheckSettings,
    StallSettings,
    StopSettings,
    parse_loggers,
    parse_updates,
)

__all__ = [
    "CheckSettings",
    "CheckpointSettings",
    "DataSettings",
    "EnvSettings",
    "GradientSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PipelineSettings",
    "PpoSettings",
    "Settings",
    "StallSettings",
    "StopSettings",
    "VitSettings",
]


TASKS = {
    "classify": "lockstep.tasks.classify.Classify",
    "regress": "lockstep.tasks.regress.Regress",
    "ppo": "lockstep.tasks.ppo.Ppo",
}


@dataclass(frozen=True)
class Settings:
    """The settings of one run. The defaults train the reference network on the included digits, to 97 % accuracy."""

    run_dir: str | None = None
    """New folder for all files of the run; by default runs/<date and time>."""

    task: str = "classify"
    """classify: image classification; regress: from fields to fields or numbers; ppo: proximal policy optimization of
    an agent (Schulman et al. 2017); or a task of your own, my_package.MyTask."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of regress, or of a task of your own, by the names in its Options: see `--task regress --help`."""

    seed: int = 0
    """Seed of all random numbers: initial weights, order of samples, dropout."""

    num_epochs: int = 12
    """Passes over the training data; for ppo see ppo.total_steps."""

    precision: Literal["float32", "float64", "bf16"] = "float32"
    """Data type of parameters and arithmetic; bf16: mixed precision, parameters in float32 and most layers computed in
    bfloat16 (torch.autocast)."""

    log_interval: int = 100
    """Updates between two log lines; each costs one reduction over the ranks."""

    quiet: bool = False
    """Print only the result, warnings and errors."""

    loggers: str = "tensorboard"
    """Outputs of the metrics in addition to metrics.jsonl: any of tensorboard, csv and mlflow, separated by commas; or
    none."""

    hooks: str | None = None
    """Hooks of your own, my_package.MyHook, separated by commas: classes derived from lockstep.TrainerHook, of which
    every rank makes one, without arguments."""

    profile: str | None = None
    """Updates to profile, counted from 1, such as 20-24: writes a trace for Perfetto and prints a table of times."""

    evaluate_every: int | None = None
    """Epochs between two evaluations, by default 1; for ppo updates, by default 0; 0: only at the end."""

    parallel: Literal["replicated", "zero1", "zero2", "zero3", "pipeline"] = "replicated"
    """How the model is divided over the ranks. replicated: every rank holds all of it; zero1: the optimizer state is
    sharded; zero2: gradients too; zero3: parameters too (Rajbhandari et al. 2020); pipeline: blocks form stages."""

    env: EnvSettings = field(default_factory=EnvSettings)
    ppo: PpoSettings = field(default_factory=PpoSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    gradient: GradientSettings = field(default_factory=GradientSettings)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    stop: StopSettings = field(default_factory=StopSettings)
    stall: StallSettings = field(default_factory=StallSettings)

    def __post_init__(self) -> None:
        check(self.run_dir != "", "run_dir", "empty", "leave it out, or name a new folder")
        known = self.task in TASKS or "." in self.task
        check(known, "task", self.task, f"{', '.join(TASKS)}, or a task of your own, my_package.MyTask, is needed")
        check(0 <= self.seed < 2**63, "seed", self.seed, "it must lie in 0 ... 2^63 - 1")
        check(self.num_epochs >= 0, "num_epochs", self.num_epochs, "it must not be negative")
        check(self.log_interval >= 1, "log_interval", self.log_interval, "it must be at least 1")
        every = self.evaluate_every
        check(every is None or every >= 0, "evaluate_every", every, "it must not be negative")
        evaluates = bool(every) if self.task == "ppo" else every != 0
        for name, criterion in (("stop.early", self.stop.early), ("checkpoint.best", self.checkpoint.best)):
            check(criterion is None or evaluates, name, criterion, "it needs evaluations on the way: evaluate_every")
        scaled = self.optimizer.scale_learning_rate
        check(
            not scaled or self.data.batch_size_per_rank is not None,
            "optimizer.scale_learning_rate",
            scaled,
            "it needs data.batch_size_per_rank, with which the global batch grows with the number of ranks",
        )
        parse_loggers(self.loggers)
        named = all("." in name for name in self.hook_names)
        check(named, "hooks", self.hooks, "names of classes are needed, my_package.MyHook, with commas between them")
        if self.profile is not None:
            parse_updates(self.profile)
        self._check_parallel()
        if self.task == "ppo":
            self._check_ppo()

    @property
    def logger_names(self) -> list[str]:
        return parse_loggers(self.loggers)

    @property
    def hook_names(self) -> list[str]:
        return [name.strip() for name in self.hooks.split(",")] if self.hooks else []

    @property
    def profiled_updates(self) -> range:
        """The updates of `profile`, counted from 1; empty if it is not set."""
        return parse_updates(self.profile) if self.profile else range(0)

    def _check_parallel(self) -> None:
        gradient, how = self.gradient, self.parallel
        check(
            not self.model.compile or how in ("replicated", "zero1"),
            "model.compile",
            True,
            f"it does not go with {how}",
        )
        optimizer = self.optimizer.name
        whole = optimizer not in ("lars", "lamb") or not how.startswith("zero")
        check(whole, "optimizer.name", optimizer, f"it takes the norms of whole layers, which {how} shards")
        for name, value, usual in (("reduction", gradient.reduction, "sum"), ("wire", gradient.wire, "full")):
            fits = value == usual or how == "replicated" or (how == "pipeline" and name == "wire")
            check(fits, f"gradient.{name}", value, f"it does not go with {how}")
        check(
            gradient.bucket_mib is None or not how.startswith("zero"),
            "gradient.bucket_mib",
            gradient.bucket_mib,
            f"{how} sends gradients block by block",
        )

    def _check_ppo(self) -> None:
        how, checks = self.parallel, self.checks
        check(how in ("replicated", "zero1"), "parallel", how, "ppo acts on every rank, which needs the whole model")
        fix = "ppo cannot skip an update, of which some optimizer steps may be done"
        check(checks.non_finite == "stop", "checks.non_finite", checks.non_finite, fix)
        check(not checks.ledger, "checks.ledger", checks.ledger, "ppo has no data set whose samples could be recorded")
        check(self.model.name != "net", "model.name", "net", "ppo needs a policy: mlp or nature_cnn")
